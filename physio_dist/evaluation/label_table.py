"""Labelled windows of a shard set as one table, with the classes of each task."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from physio_dist.data.format import tar
from physio_dist.data.format.index import ShardSet
from physio_dist.data.handle import ShardSetHandle
from physio_dist.errors import UserError, closest
from physio_dist.evaluation.clips import (
    PHASE,
    STIMULUS,
    BaselinePeriod,
    clip_ids,
    find_baseline_periods,
    require_clips,
)
from physio_dist.runs.sweep_results import Published
from physio_dist.runtime.arrays import Float64Array, Int64Array, UInt8Array, UInt64Array

SIGNALS = ("ecg", "eeg")
MAX_CLASSES = 20
# The label of simulated recordings that their simulated drives depend on.
SIMULATED_LABEL = "arousal"
EEGMAT_LABEL = "task"
# Values of the labels of task eegmat; the second is the positive class.
EEGMAT = {EEGMAT_LABEL: ("rest", "arithmetic"), "counter": ("bad", "good")}
RATED = ("low", "high")
PUBLISHED_RESULTS = {"arousal": ("auc", 0.8479), "dominance": ("auc", 0.8669), "valence": ("f1", 0.8114)}
"""Metric and value that arXiv 2512.15250 reports for each of DREAMER's scales."""
UNKNOWN = (
    "the name of the data set, how people and clips were divided between training and test, where high begins on the "
    "scale of 1 to 5, whether the rest before a clip was subtracted, and how the F1 score is averaged over classes"
)
"""Details that its text leaves open."""
_NEUTRAL = 3
_DRIVES = {signal: f"drive_{signal}" for signal in SIGNALS}


@dataclass(frozen=True)
class LabelTable:
    """The labelled windows of a shard set, in its storage order.

    Attributes:
        keys: of the windows.
        sample: int64 ``[n]``, position of each window among all of the set: its row in the features.
        person: uint64 ``[n]``, pseudonym.
        recording: int64 ``[n]``, number of the recording a window was cut from.
        label: int64 ``[n]``, position in ``classes``.
        classes: names.
        split: uint8 ``[n]``, position in ``SPLITS``.
        simulated: whether any of the set comes from a simulator.
        simulated_drive: for each signal float64 ``[n]``, the simulator's hidden drive; empty for real recordings.
        clip: int64 ``[n]``, number of each window's clip; None where clips were not requested.
        baseline: the baseline period before each clip; None where it was not requested.
        notes: notes for readers of results: windows left out, meaning of the classes.
    """

    keys: list[str]
    sample: Int64Array
    person: UInt64Array
    recording: Int64Array
    label: Int64Array
    classes: tuple[str, ...]
    split: UInt8Array
    simulated: bool
    simulated_drive: dict[str, Float64Array] = field(default_factory=dict)
    clip: Int64Array | None = None
    baseline: BaselinePeriod | None = None
    notes: tuple[str, ...] = ()


def require_paired(shards: ShardSet) -> None:
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
    """Name of the label: ``label``, else the task's default."""
    return label or (EEGMAT_LABEL if task == "eegmat" else "")


def published_result(task: str, label: str) -> Published | None:
    """The figure that the paper of this fusion reports of a task; None of other tasks."""
    if task != "dreamer":
        return None
    metric, value = PUBLISHED_RESULTS[label]
    return Published("arXiv 2512.15250", metric, value, UNKNOWN)


def load_label_table(
    data: ShardSetHandle, task: str, label: str | None, option: str = "tune.label", *,
    neutral: str = "low", clip: str = "", baseline: bool = False,
) -> LabelTable:  # fmt: skip
    """Read the windows that carry a label.

    Args:
        data: the shard set.
        task: ``labels``: the classes are the sorted values of ``label``; ``eegmat``: rest, then arithmetic, or bad,
            then good counters; ``dreamer``: low, then high ratings.
        label: name of the label; None for the task's own.
        option: name of the option that holds the label, for messages.
        neutral: for ``dreamer``: a rating of 3 is ``high``, is ``low``, or its windows are left out (``drop``).
        clip: name of the label that numbers clips; empty: clips are not read.
        baseline: find the baseline period before each clip and leave out windows without one.

    Raises:
        UserError: the label is missing, is no class label, is outside of its scale or has only one class, or windows do
            not say which clip they are of.
        DataError: the set is damaged.
    """
    shards, sample_table = data.index, data.sample_table
    url, name = shards.url, label_name(task, label)
    facts = list(_facts(data))
    keys = sample_table.keys(np.arange(shards.nsamples))
    labels = [label if isinstance(label := window.get("labels"), dict) else {} for window in facts]
    known = {word for label in labels for word in label}
    if name not in known:
        if not known:
            raise UserError(
                f"{option}={name}: the windows of {shards.url} have no labels at all; convert the recordings again "
                "with a table of labels and people (docs/guides/data.md)"
            )
        hint = closest(name, known)
        available = f"; it has {', '.join(sorted(known))}" + (f"; {hint}" if hint else "")
        raise UserError(f"{option}={name}: no window of {shards.url} has that label{available}")
    if clip:
        require_clips(known, clip, url)
    values = [label.get(name) for label in labels]
    if task == "dreamer":
        values = [None if label.get(PHASE, STIMULUS) != STIMULUS else label.get(name) for label in labels]
    notes = []
    if left := sum(value is None for value in values):
        notes.append(f"{left} of {shards.nsamples} windows do not have the label and are left out.")
    if task == "dreamer":
        values, rule = _rated(values, name, neutral, url)
        notes.append(rule)
    sample = np.array([i for i, value in enumerate(values) if value is not None], dtype=np.int64)
    periods = None
    if baseline and len(sample):
        labelled = len(sample)
        sample, periods = find_baseline_periods(labels, sample_table.person, clip, sample, url)
        notes.append(_baseline_note(labelled - len(sample)))
    targets = [values[i] for i in sample]
    classes = _classes(targets, f"{option}={name}") if task == "labels" else _task_classes(targets, task, name, url)
    if len(classes) < 2:
        only = f"only the value {_word(classes[0])}" if classes else "no value"
        raise UserError(f"{option}={name}: {shards.url} has {only} of it; there is nothing to tell apart")
    number = {value: i for i, value in enumerate(classes)}
    recordings = [_recording(facts[i], keys[i]) for i in sample]
    clip_recordings = [
        None if facts[i].get("record") is None else recording for i, recording in zip(sample, recordings, strict=True)
    ]
    order = {recording: i for i, recording in enumerate(sorted(set(recordings)))}
    return LabelTable(
        keys=[keys[i] for i in sample],
        sample=sample,
        person=sample_table.person[sample],
        recording=np.array([order[recording] for recording in recordings], dtype=np.int64),
        label=np.array([number[value] for value in targets], dtype=np.int64),
        classes=tuple(_word(value) for value in classes),
        split=sample_table.split[sample],
        simulated=shards.simulated,
        simulated_drive=_simulated_drive([labels[i] for i in sample])
        if shards.simulated and name == SIMULATED_LABEL
        else {},
        clip=clip_ids([labels[i] for i in sample], clip_recordings, clip, url) if clip else None,
        baseline=periods,
        notes=tuple(notes),
    )


def _facts(data: ShardSetHandle) -> Iterator[dict[str, Any]]:
    """JSON of every window, in storage order."""
    for number, info in enumerate(data.index.shards):
        for member in tar.scan(io.BytesIO(data.cache.content(data.index, number)), info.url):
            yield member.facts or {}


def _recording(facts: dict[str, Any], key: str) -> tuple[str, str]:
    """Source and recording of a window; in shards of others that lack the record, each window is its own recording."""
    record = facts.get("record")
    return str(facts.get("source", "")), f"key {key}" if record is None else f"record {record}"


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _task_classes(values: Sequence[Any], task: str, name: str, data: str) -> list[Any]:
    """Classes of task eegmat or dreamer that occur among ``values``."""
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
    """Binarize ratings from 1 to 5; also return the rule in words."""
    others = sorted({_word(value) for value in values if value is not None and value not in (1, 2, 3, 4, 5)})
    if others:
        raise UserError(
            f"tune.task=dreamer: label {name} of {data} has {', '.join(others[:5])}; a rating is a whole number from 1 "
            "to 5"
        )
    middle = {"high": "high", "low": "low"}.get(neutral)
    words = [None if v is None else middle if v == _NEUTRAL else RATED[int(v > _NEUTRAL)] for v in values]
    neutral_count, rated = sum(value == _NEUTRAL for value in values), sum(value is not None for value in values)
    effect = f"counts as {middle}" if middle else "is left out"
    rule = f"tune.neutral={neutral}: {name} is high above 3 and low below; a rating of 3, the middle, {effect}"
    return words, f"{rule} ({neutral_count} of {rated} windows)."


def _baseline_note(without: int) -> str:
    rule = (
        "tune.baseline=subtract: from the features of each window the mean over the rest before its clip, of the same "
        "person, is subtracted; no label enters"
    )
    return f"{rule}; {without} windows without a rest are left out." if without else f"{rule}."


def _classes(values: Sequence[Any], option: str) -> list[Any]:
    kinds = {type(value) for value in values}
    no_class = f"{option} is no class label:"
    if not kinds <= {bool, int, str}:
        example = next(value for value in values if type(value) not in (bool, int, str))
        kind = "numbers with a fraction" if isinstance(example, float) else f"a {type(example).__name__}"
        raise UserError(f"{no_class} its values are {kind}, such as {_word(example)}; make classes of them first")
    if len(kinds) > 1:
        first = {type(value): value for value in reversed(values)}
        some = ", ".join(_word(first[kind]) for kind in sorted(kinds, key=str))
        raise UserError(f"{no_class} its values are of different kinds, such as {some}; write all of them as words")
    classes = sorted(set(values))
    if len(classes) > MAX_CLASSES:
        raise UserError(
            f"{no_class} it has {len(classes)} different values ({', '.join(map(_word, classes[:4]))}, ...), more than "
            f"{MAX_CLASSES}; make fewer classes of them first"
        )
    return classes


def _simulated_drive(labels: Sequence[dict[str, Any]]) -> dict[str, Float64Array]:
    """For each signal float64 ``[n]``, the simulator's drive; empty where labels lack one."""
    columns = {signal: [label.get(name) for label in labels] for signal, name in _DRIVES.items()}
    if not all(isinstance(drive, (int, float)) for drives in columns.values() for drive in drives):
        return {}
    return {signal: np.array(drives, dtype=np.float64) for signal, drives in columns.items()}
