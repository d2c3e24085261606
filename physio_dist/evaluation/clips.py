"""Which clip (film, stimulus) a window is of, what was recorded before it, and what that says of the features."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from physio_dist.errors import UserError, closest

Ints = npt.NDArray[np.int64]
T = TypeVar("T", bound=np.floating)

# The label that tells what somebody rated from the rest before it.
PHASE, STIMULUS, BASELINE = "phase", "stimulus", "baseline"


@dataclass(frozen=True)
class Rest:
    """The windows of the rest before each clip, for the rows of a table.

    Attributes:
        sample: int64 ``[m]``, position of each of these windows among all of the set.
        of: int64 ``[m]``, number of the rest that it is a window of.
        before: int64 ``[n]``, the rest before each row of the table.
    """

    sample: Ints
    of: Ints
    before: Ints


def need_clips(known: Collection[str], name: str, data: str) -> None:
    """Refuse a set whose labels ``known`` do not tell clips apart.

    Raises:
        UserError: there is no label of that name.
    """
    if name not in known:
        hint = f"; {closest(name, known)}" if closest(name, known) else ""
        raise UserError(
            f"tune.clip={name}: no window of {data} says by that label which clip it is of; it has "
            f"{', '.join(sorted(known))}{hint}. Give tune.clip=NAME, or a protocol that does not ask for clips"
        )


def clips_of(
    labels: Sequence[dict[str, Any]], recording: Sequence[tuple[str, str] | None], name: str, data: str
) -> Ints:  # fmt: skip
    """The clip of each window, as a number.

    A clip's windows are whole recordings: were they less, splitting by clip would divide a recording, and a window's
    neighbours would train what it tests.

    Args:
        labels: of each window.
        recording: of each window; None where the set does not tell.
        name: of the label.
        data: the set, for messages.

    Raises:
        UserError: windows without the label, several clips in one recording, or recordings that are not known.
    """
    asked = f"tune.clip={name}"
    found = [one.get(name) for one in labels]
    if missing := sum(value is None for value in found):
        raise UserError(f"{asked}: {missing} of {len(found)} windows of {data} do not say which clip they are of")
    words = [json.dumps(value) for value in found]
    if None in recording:
        raise UserError(
            f"{asked}: {data} does not say which recording a window is of, so clips cannot be told from pieces of a "
            "recording; convert the recordings again"
        )
    of: dict[Any, str] = {}
    for window, word in zip(recording, words, strict=True):
        if of.setdefault(window, word) != word:
            raise UserError(
                f"{asked}: a recording of {data} has both {of[window]} and {word}. Clips that are pieces of a "
                "recording would be a split by window; name a label that is the same throughout a recording"
            )
    number = {word: i for i, word in enumerate(sorted(set(words)))}
    return np.array([number[word] for word in words], dtype=np.int64)


def rests_of(
    labels: Sequence[dict[str, Any]], person: npt.NDArray[np.uint64], clip: str, rows: Ints, data: str
) -> tuple[Ints, Rest]:
    """The rows that have a rest before them, and these rests.

    Args:
        labels: of each window of the set.
        person: uint64 ``[window]``, pseudonyms.
        clip: name of the label that tells clips apart.
        rows: int64, windows that are asked about.
        data: the set, for messages.

    Raises:
        UserError: none has.
    """

    def moment(window: int) -> tuple[int, str]:
        return int(person[window]), json.dumps(labels[window].get(clip))

    sample = [i for i, one in enumerate(labels) if one.get(PHASE) == BASELINE and one.get(clip) is not None]
    number: dict[tuple[int, str], int] = {}
    of = [number.setdefault(moment(i), len(number)) for i in sample]
    kept = [i for i in rows.tolist() if moment(i) in number]
    if not kept:
        raise UserError(
            f"tune.baseline=subtract: no window of {data} has the same person and {clip} as one whose label {PHASE} is "
            f"{BASELINE}; convert DREAMER.mat with physio-dist shard dreamer, or set tune.baseline=none"
        )
    before = np.array([number[moment(i)] for i in kept], dtype=np.int64)
    return np.array(kept, dtype=np.int64), Rest(np.array(sample, dtype=np.int64), np.array(of, dtype=np.int64), before)


def since_rest(values: Callable[[Ints], npt.NDArray[T]], sample: Ints, rest: Rest | None) -> npt.NDArray[T]:
    """Features of windows, less the mean of the rest before their clip.

    No label enters, and nothing of another person or clip: the rest is recorded before the clip, so that whoever uses
    the classifier on somebody new has it too. Of logarithms of powers the difference is the logarithm of their ratio.

    Args:
        values: gives features ``[window, ...]`` of windows by their positions in the set; NaN where one is unknown.
        sample: int64 ``[n]``, positions of the windows that are asked for.
        rest: None leaves the features as they are.

    Returns:
        ``[n, ...]``; NaN where the rest has no window in which a feature is known.
    """
    own = values(sample)
    if rest is None:
        return own
    still = values(rest.sample).astype(np.float64)
    shape = (int(rest.of.max()) + 1, *own.shape[1:])
    total, known = np.zeros(shape), np.zeros(shape)
    np.add.at(total, rest.of, np.nan_to_num(still))
    np.add.at(known, rest.of, np.isfinite(still))
    mean = np.where(known > 0, total / np.maximum(known, 1), np.nan)
    return (own - mean[rest.before]).astype(own.dtype)
