"""What is to be told from the signals: the windows of a shard set that carry a label, as one table."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from physio_dist.config import DataOptions
from physio_dist.data.format import tar
from physio_dist.data.format.index import ShardSet, open_set, read_sample_table
from physio_dist.data.loading.cache import ShardCache
from physio_dist.errors import UserError, closest
from physio_dist.evaluation.clips import PHASE, STIMULUS, Rest, clips_of, need_clips, rests_of

SIGNALS = ("ecg", "eeg")
MOST_CLASSES = 20
# The state behind simulated recordings, which their drives tell of.
HIDDEN = "arousal"
EEGMAT_LABEL = "task"
# What the labels of tasks of their own may say, the second being what is looked for.
EEGMAT = {EEGMAT_LABEL: ("rest", "arithmetic"), "counter": ("bad", "good")}
RATED = ("low", "high")
PUBLISHED = {"arousal": ("auc", 0.8479), "dominance": ("auc", 0.8669), "valence": ("f1", 0.8114)}
"""What arXiv 2512.15250 reports of emotions with DREAMER's scales; the other figure of each is not reported."""
UNKNOWN = (
    "the name of the data set, how people and clips were divided between training and test, where high begins on the "
    "scale of 1 to 5, whether the rest before a clip was subtracted, and how the F1 score is averaged over classes"
)
"""What its text leaves open, as far as we could find."""
_NEUTRAL = 3
_DRIVES = {signal: f"drive_{signal}" for signal in SIGNALS}


@dataclass(frozen=True)
class Table:
    """The labelled windows of a shard set, in its storage order.

    Attributes:
        keys: of the windows.
        sample: int64 ``[n]``, position of each window among all of the set: its row in the features.
        person: uint64 ``[n]``, pseudonym.
        recording: int64 ``[n]``, number of the recording a window was cut from.
        label: int64 ``[n]``, position in ``classes``.
        classes: names.
        split: uint8 ``[n]``, position in ``shards.index.SPLITS``.
        simulated: whether any of the set comes from a simulator.
        latent: only of simulated sets: float64 ``[n]``, the hidden drive of each signal.
        clip: where it was asked for: int64 ``[n]``, number of the clip that a window is of.
        rest: where it was asked for: what was recorded before each clip.
        notes: what a reader of results has to know: which windows are left out, what the classes stand for.
    """

    keys: list[str]
    sample: npt.NDArray[np.int64]
    person: npt.NDArray[np.uint64]
    recording: npt.NDArray[np.int64]
    label: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    split: npt.NDArray[np.uint8]
    simulated: bool
    latent: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    clip: npt.NDArray[np.int64] | None = None
    rest: Rest | None = None
    notes: tuple[str, ...] = ()


def shard_cache() -> ShardCache:
    """The node's cache of shards, at the place where pretraining keeps it unless told otherwise."""
    return ShardCache(DataOptions.cache_dir, DataOptions.cache_gb * 1e9)


def need_both(shards: ShardSet) -> None:
    """Refuse a set that is not paired.

    Raises:
        UserError: ECG or EEG is missing.
    """
    missing = [signal for signal in SIGNALS if signal not in shards.signals]
    if missing:
        raise UserError(
            f"tune.data={shards.url} has no {' and no '.join(missing)}, only {', '.join(sorted(shards.signals))}: "
            "fusion needs windows with both; convert the recordings with signals=ecg,eeg"
        )


def label_name(task: str, label: str | None) -> str:
    """The label that is asked for: the one given, else the task's own."""
    return label or (EEGMAT_LABEL if task == "eegmat" else "")


def published(task: str, label: str) -> dict[str, Any] | None:
    """What the paper that this fusion comes from reports of a task, as ``results.json`` has it; None of other tasks."""
    if task != "dreamer":
        return None
    metric, value = PUBLISHED[label]
    return {"source": "arXiv 2512.15250", "metric": metric, "value": value, "unknown": UNKNOWN}


def load_table(
    data: str, task: str, label: str | None, option: str = "tune.label", *,
    neutral: str = "low", clip: str = "", rest: bool = False,
) -> Table:  # fmt: skip
    """The windows that carry the label.

    Args:
        data: URL of a shard set; of one with both signals where the option is that of a sweep.
        task: ``labels``: the classes are the sorted values of ``label``; ``eegmat``: rest, then arithmetic, or bad,
            then good counters; ``dreamer``: low, then high ratings.
        label: name of the label; None for the task's own.
        option: by which the label was given.
        neutral: of ``dreamer``: a rating of 3 is ``high``, is ``low``, or its windows are left out (``drop``).
        clip: name of the label that tells which clip a window is of; empty where nobody asks.
        rest: whether the rest before each clip is asked for; windows without one are left out.

    Raises:
        UserError: a signal is missing, the label is not there, is no class label, is outside of its scale or has only
            one class, or windows do not say which clip they are of.
        DataError: the set is damaged.
    """
    shards = open_set(data)
    if option == "tune.label":
        need_both(shards)
    name = label_name(task, label)
    sidecar = read_sample_table(shards)
    facts = list(_facts(shards))
    keys = sidecar.keys(np.arange(shards.nsamples))
    labels = [found if isinstance(found := one.get("labels"), dict) else {} for one in facts]
    known = {word for one in labels for word in one}
    if name not in known:
        if not known:
            raise UserError(
                f"{option}={name}: the windows of {shards.url} have no labels at all; convert the recordings again "
                "with a table of labels and people (docs/data.md)"
            )
        hint = closest(name, known)
        there = f"; it has {', '.join(sorted(known))}" + (f"; {hint}" if hint else "")
        raise UserError(f"{option}={name}: no window of {shards.url} has that label{there}")
    if clip:
        need_clips(known, clip, data)
    values = [one.get(name) for one in labels]
    if task == "dreamer":
        values = [None if one.get(PHASE, STIMULUS) != STIMULUS else one.get(name) for one in labels]
    notes = []
    if left := sum(value is None for value in values):
        notes.append(f"{left} of {shards.nsamples} windows do not have the label and are left out.")
    if task == "dreamer":
        values, said = _rated(values, name, neutral, data)
        notes.append(said)
    sample = np.array([i for i, value in enumerate(values) if value is not None], dtype=np.int64)
    before = None
    if rest and len(sample):
        carrying = len(sample)
        sample, before = rests_of(labels, sidecar.person, clip, sample, data)
        notes.append(_about_rest(carrying - len(sample)))
    given = [values[i] for i in sample]
    classes = _classes(given, f"{option}={name}") if task == "labels" else _of_task(given, task, name, data)
    if len(classes) < 2:
        only = f"only the value {_word(classes[0])}" if classes else "no value"
        raise UserError(f"{option}={name}: {shards.url} has {only} of it; there is nothing to tell apart")
    number = {value: i for i, value in enumerate(classes)}
    recordings = [_recording(facts[i], keys[i]) for i in sample]
    told = [None if facts[i].get("record") is None else where for i, where in zip(sample, recordings, strict=True)]
    order = {recording: i for i, recording in enumerate(sorted(set(recordings)))}
    return Table(
        keys=[keys[i] for i in sample],
        sample=sample,
        person=sidecar.person[sample],
        recording=np.array([order[recording] for recording in recordings], dtype=np.int64),
        label=np.array([number[value] for value in given], dtype=np.int64),
        classes=tuple(_word(value) for value in classes),
        split=sidecar.split[sample],
        simulated=shards.simulated,
        latent=_latent([labels[i] for i in sample]) if shards.simulated and name == HIDDEN else {},
        clip=clips_of([labels[i] for i in sample], told, clip, data) if clip else None,
        rest=before,
        notes=tuple(notes),
    )


def _facts(shards: ShardSet) -> Iterator[dict[str, Any]]:
    cache = shard_cache()
    for number, info in enumerate(shards.shards):
        for member in tar.scan(io.BytesIO(cache.content(shards, number)), info.url):
            yield member.facts or {}


def _recording(facts: dict[str, Any], key: str) -> tuple[str, str]:
    """Shards of others may not say which recording a window is from: then it stands for itself."""
    record = facts.get("record")
    return str(facts.get("source", "")), f"key {key}" if record is None else f"record {record}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _of_task(values: Sequence[Any], task: str, name: str, data: str) -> list[Any]:
    """The classes of a task of its own that there are."""
    classes = RATED if task == "dreamer" else EEGMAT.get(name, EEGMAT[EEGMAT_LABEL])
    others = sorted({_word(value) for value in values} - set(classes))
    if others:
        raise UserError(
            f"tune.task={task}: label {name} of {data} also has {', '.join(others[:5])}; it must be "
            f"{' or '.join(classes)}. tune.task=labels tune.label={name} takes any classes"
        )
    present = set(values)
    return [value for value in classes if value in present]


def _rated(values: Sequence[Any], name: str, neutral: str, data: str) -> tuple[list[str | None], str]:
    """Ratings from 1 to 5 as low or high, and the rule in words."""
    others = sorted({_word(value) for value in values if value is not None and value not in (1, 2, 3, 4, 5)})
    if others:
        raise UserError(
            f"tune.task=dreamer: label {name} of {data} has {', '.join(others[:5])}; a rating is a whole number from 1 "
            "to 5"
        )
    middle = {"high": "high", "low": "low"}.get(neutral)
    words = [None if v is None else middle if v == _NEUTRAL else RATED[int(v > _NEUTRAL)] for v in values]
    count, of = sum(value == _NEUTRAL for value in values), sum(value is not None for value in values)
    what = f"counts as {middle}" if middle else "is left out"
    rule = f"tune.neutral={neutral}: {name} is high above 3 and low below; a rating of 3, the middle, {what}"
    return words, f"{rule} ({count} of {of} windows)."


def _about_rest(without: int) -> str:
    told = (
        "tune.baseline=subtract: from the features of each window the mean over the rest before its clip, of the same "
        "person, is subtracted; no label enters"
    )
    return f"{told}; {without} windows without a rest are left out." if without else f"{told}."


def _classes(values: Sequence[Any], asked: str) -> list[Any]:
    kinds = {type(value) for value in values}
    no_class = f"{asked} is no class label:"
    if not kinds <= {bool, int, str}:
        example = next(value for value in values if type(value) not in (bool, int, str))
        kind = "numbers with a fraction" if isinstance(example, float) else f"a {type(example).__name__}"
        raise UserError(f"{no_class} its values are {kind}, such as {_word(example)}; make classes of them first")
    if len(kinds) > 1:
        first = {type(value): value for value in reversed(values)}
        some = ", ".join(_word(first[kind]) for kind in sorted(kinds, key=str))
        raise UserError(f"{no_class} its values are of different kinds, such as {some}; write all of them as words")
    found = sorted(set(values))
    if len(found) > MOST_CLASSES:
        raise UserError(
            f"{no_class} it has {len(found)} different values ({', '.join(map(_word, found[:4]))}, ...), more than "
            f"{MOST_CLASSES}; make fewer classes of them first"
        )
    return found


def _latent(labels: Sequence[dict[str, Any]]) -> dict[str, npt.NDArray[np.float64]]:
    found = {}
    for signal, name in _DRIVES.items():
        drives = [one.get(name) for one in labels]
        if all(isinstance(drive, (int, float)) for drive in drives):
            found[signal] = np.array(drives, dtype=np.float64)
    return found if len(found) == len(_DRIVES) else {}
