"""Clips (films, stimuli): the clip of each window, the baseline period before it, and its subtraction from features."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from physio_dist.errors import UserError, closest
from physio_dist.runtime.arrays import Int64Array, UInt64Array

T = TypeVar("T", bound=np.floating)

# The label that separates rated recordings from the baseline period before them, and its values.
PHASE, STIMULUS, BASELINE = "phase", "stimulus", "baseline"


@dataclass(frozen=True)
class BaselinePeriod:
    """Windows of the baseline period before each clip, for the rows of a table.

    Attributes:
        sample: int64 ``[m]``, position in the set of each baseline window.
        period: int64 ``[m]``, number of the period that it belongs to.
        before: int64 ``[n]``, number of the period before each row of the table.
    """

    sample: Int64Array
    period: Int64Array
    before: Int64Array

    def select(self, rows: Int64Array) -> BaselinePeriod:
        """Keep some rows of the table."""
        return replace(self, before=self.before[rows])


def require_clips(known: Collection[str], name: str, data: str) -> None:
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


def clip_ids(
    labels: Sequence[dict[str, Any]], recording: Sequence[tuple[str, str] | None], name: str, data: str
) -> Int64Array:  # fmt: skip
    """Number the clips of some windows.

    A clip's windows are whole recordings. Otherwise a split by clip would divide a recording, and a test window's
    neighbours would be trained on.

    Args:
        labels: of each window.
        recording: of each window; None where the set does not tell.
        name: of the label.
        data: the set, for messages.

    Returns:
        int64 ``[window]``.

    Raises:
        UserError: windows without the label, several clips in one recording, or unknown recordings.
    """
    option = f"tune.clip={name}"
    values = [window.get(name) for window in labels]
    if missing := sum(value is None for value in values):
        raise UserError(f"{option}: {missing} of {len(values)} windows of {data} do not say which clip they are of")
    words = [json.dumps(value) for value in values]
    if None in recording:
        raise UserError(
            f"{option}: {data} does not say which recording a window is of, so clips cannot be told from pieces of a "
            "recording; convert the recordings again"
        )
    clip_of: dict[Any, str] = {}
    for window, word in zip(recording, words, strict=True):
        if clip_of.setdefault(window, word) != word:
            raise UserError(
                f"{option}: a recording of {data} has both {clip_of[window]} and {word}. Clips that are pieces of a "
                "recording would be a split by window; name a label that is the same throughout a recording"
            )
    number = {word: i for i, word in enumerate(sorted(set(words)))}
    return np.array([number[word] for word in words], dtype=np.int64)


def find_baseline_periods(
    labels: Sequence[dict[str, Any]], person: UInt64Array, clip: str, rows: Int64Array, data: str
) -> tuple[Int64Array, BaselinePeriod]:
    """Find the baseline period before each window: same person, same clip, phase ``baseline``.

    Args:
        labels: of each window of the set.
        person: uint64 ``[window]``, pseudonyms.
        clip: name of the label that tells clips apart.
        rows: int64, windows to look for.
        data: the set, for messages.

    Returns:
        The windows of ``rows`` that have a baseline period, and these periods.

    Raises:
        UserError: none has.
    """

    def moment(window: int) -> tuple[int, str]:
        return int(person[window]), json.dumps(labels[window].get(clip))

    sample = [i for i, label in enumerate(labels) if label.get(PHASE) == BASELINE and label.get(clip) is not None]
    number: dict[tuple[int, str], int] = {}
    period = [number.setdefault(moment(i), len(number)) for i in sample]
    available = [i for i in rows.tolist() if moment(i) in number]
    if not available:
        raise UserError(
            f"tune.baseline=subtract: no window of {data} has the same person and {clip} as one whose label {PHASE} is "
            f"{BASELINE}; convert DREAMER.mat with physio-dist shard dreamer, or set tune.baseline=none"
        )
    before = np.array([number[moment(i)] for i in available], dtype=np.int64)
    periods = BaselinePeriod(np.array(sample, dtype=np.int64), np.array(period, dtype=np.int64), before)
    return np.array(available, dtype=np.int64), periods


def subtract_baseline(
    values: Callable[[Int64Array], npt.NDArray[T]], sample: Int64Array, baseline: BaselinePeriod | None
) -> npt.NDArray[T]:
    """Subtract from features of windows their mean over the baseline period before the clip.

    No label enters, and nothing of another person or clip: the baseline is recorded before the clip, so whoever uses
    the classifier on a new person has it too. For logarithms of powers the difference is the logarithm of their ratio.

    Args:
        values: function of positions in the set that returns their features ``[window, ...]``; NaN where unknown.
        sample: int64 ``[n]``, positions of the windows.
        baseline: None leaves the features as they are.

    Returns:
        ``[n, ...]``; NaN where a feature is unknown in all windows of the baseline period.
    """
    features = values(sample)
    if baseline is None:
        return features
    resting = values(baseline.sample).astype(np.float64)
    shape = (int(baseline.period.max()) + 1, *features.shape[1:])
    total, count = np.zeros(shape), np.zeros(shape)
    np.add.at(total, baseline.period, np.nan_to_num(resting))
    np.add.at(count, baseline.period, np.isfinite(resting))
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return (features - mean[baseline.before]).astype(features.dtype)
