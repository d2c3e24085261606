"""What a trial trains, how configurations are selected, and what the selected ones say about the test people."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from physio_dist.config import TuneConfig
from physio_dist.errors import UserError
from physio_dist.evaluation.head_training import Heads, Job
from physio_dist.evaluation.label_table import LabelTable
from physio_dist.evaluation.splits import Fold, permuted
from physio_dist.models.fusion.head import Head
from physio_dist.models.fusion.heads import input_kind
from physio_dist.models.fusion.reduction import Reduction, fit_reduction
from physio_dist.runtime.seeding import seed_of
from physio_dist.stats.scores import auc

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

SEARCHED = ("fused", "ecg", "eeg", "untrained")
"""Rows of the table of results that are searched for: what a trial's heads are given."""

MODALITIES = {"fused": ("ecg", "eeg"), "ecg": ("ecg",), "eeg": ("eeg",), "untrained": ("ecg", "eeg")}

# Heads trained at a time in the control with permuted labels.
_MOST_HEADS = 64


@dataclass(frozen=True)
class Study:
    """Everything that trials need; picklable, its large arrays are plain NumPy arrays.

    Attributes:
        options: of the sweep.
        table: the labelled windows.
        folds: their divisions.
        encoders: ``ecg``, ``eeg``, ``untrained_ecg``, ``untrained_eeg`` -> hash of each fold's encoder.
        inputs: ``<signal>/<hash>/<pooling>`` -> pooled features float32 ``[n, f]`` or ``[n, token, f]``, rows as in the
            table.
        handmade: hand-made features of each signal, float64 ``[n, f]``.
        reductions: ``<key of inputs>/<fold>/<inner split>`` -> what the rows to train on say of these features.
        about: what ``results.json`` says of the encoders.
        notes: what a reader of the results has to know.
        valid: of each signal bool ``[n, channel]``; a signal that is not named is there in all windows.
        features: ``<signal>/<hash>`` -> URL of the frozen features that were pooled; not those of untrained encoders.
    """

    options: TuneConfig
    table: LabelTable
    folds: tuple[Fold, ...]
    encoders: dict[str, tuple[str, ...]]
    inputs: dict[str, npt.NDArray[np.float32]]
    handmade: dict[str, npt.NDArray[np.float64]]
    reductions: dict[str, Reduction]
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    valid: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)
    features: dict[str, str] = field(default_factory=dict)

    def available(self, key: str) -> npt.NDArray[np.bool_] | None:
        """bool ``[n, token]`` or ``[n, 1]``: which windows have what is at this key of ``inputs``; None: all."""
        signal, _, kind = key.split("/")
        return token_mask(self.valid.get(signal), kind)

    def keys_of(self, row: str, pooling: str, fold: int) -> dict[str, str]:
        """The keys of what heads of a row are given in a fold, for each modality."""
        found = {}
        for signal in MODALITIES[row]:
            source = f"untrained_{signal}" if row == "untrained" else signal
            found[signal] = f"{signal}/{self.encoders[source][fold]}/{pooling}"
        return found


@dataclass
class TrialRecord:
    """What is known of a trial when it has ended, however it ended.

    Attributes:
        trial: its name.
        row: one of ``SEARCHED``.
        config: what was drawn or proposed for it (``proposals.py``).
        history: what :func:`train` yielded.
        last: name of a fold -> last epoch that counts in the selection for that fold; absent: all of them.
        seconds: how long it took.
    """

    trial: str
    row: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    last: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Choice:
    """What the validation people of a fold chose: a configuration, and the epoch after which its training ends.

    Attributes:
        config: one of :func:`candidates`.
        epoch: from 1.
        val_auc: AUC on the validation people.
        others: the next best configurations, whose heads have an equal say (``tune.ensemble_size``).
    """

    config: dict[str, Any]
    epoch: int
    val_auc: float
    others: tuple[Choice, ...] = ()

    @property
    def members(self) -> tuple[Choice, ...]:
        """All whose heads have a say, the best first."""
        return (replace(self, others=()), *self.others)


def token_mask(valid: npt.NDArray[np.bool_] | None, kind: str) -> npt.NDArray[np.bool_] | None:
    """What is there of inputs of a kind, ``[n, token]`` or ``[n, 1]``; channels are ``valid``, ``[n, channel]``."""
    if valid is None or kind == "channels_attention":
        return valid
    return np.asarray(valid.any(axis=1, keepdims=True))


def _jobs(study: Study, row: str, config: Mapping[str, Any], fold: int, label: Ints, purpose: str = "") -> list[Job]:
    """A fold's heads, one for each inner split."""
    keys, name = study.keys_of(row, input_kind(config), fold), study.folds[fold].name
    inputs = {signal: study.inputs[key] for signal, key in keys.items()}
    there = {signal: known for signal, key in keys.items() if (known := study.available(key)) is not None}
    found = []
    for i, (rows, _) in enumerate(study.folds[fold].inner):
        reductions = {signal: study.reductions[f"{key}/{name}/{i}"] for signal, key in keys.items()}
        found.append(Job(inputs, reductions, label, rows, f"{study.options.run.seed}/{row}/{name}/{i}{purpose}", there))
    return found


def reductions_of(
    inputs: Mapping[str, npt.NDArray[np.float32]], encoders: Mapping[str, Sequence[str]], folds: Sequence[Fold],
    most: int, valid: Mapping[str, npt.NDArray[np.bool_]] | None = None,
) -> dict[str, Reduction]:  # fmt: skip
    """What each inner split's rows to train on say of the features that its heads are given: ``Study.reductions``.

    Windows in which a signal is missing (``Study.valid``), and channels that are as tokens, have no part in it.

    Raises:
        UserError: a signal is missing in all rows of some inner split.
    """
    found = {}
    for key, values in inputs.items():
        signal, sha256, kind = key.split("/")
        there = token_mask((valid or {}).get(signal), kind)
        for number, fold in enumerate(folds):
            if sha256 in (encoders[signal][number], encoders[f"untrained_{signal}"][number]):
                for i, (rows, _) in enumerate(fold.inner):
                    mine = values[rows]
                    if there is not None:
                        mine = _kept(mine, there[rows])
                    if not len(mine):
                        raise UserError(
                            f"fold {fold.name}: the {signal.upper()} is missing in all windows of the people that some "
                            "head would be trained on; use fewer folds, or a set in which more people have it"
                        )
                    found[f"{key}/{fold.name}/{i}"] = fit_reduction(mine.reshape(-1, mine.shape[-1]), most)
    return found


def _kept(values: npt.NDArray[np.float32], there: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """The vectors, ``[any, f]``, that are there."""
    return values[there[:, 0]] if values.ndim == 2 else values[np.broadcast_to(there, values.shape[:2])]


def train(study: Study, row: str, config: dict[str, Any], only: str = "") -> Iterator[dict[str, float]]:
    """Train one configuration, the heads of all folds and inner splits at once.

    A head never sees a label or a feature of its fold's test people, nor, in training, of its validation people.

    Args:
        study: see :func:`physio_dist.evaluation.study.prepare`.
        row: one of ``SEARCHED``.
        config: of :mod:`physio_dist.evaluation.search_space`.
        only: name of the one fold to train for; empty: all.

    Yields:
        After each of ``tune.max_epochs`` epochs ``epoch`` (from 1), ``fold_<name>``: the AUC on the validation
        people of that fold, the mean over its inner splits, and ``val_auc``: the mean over folds.
    """
    label, numbers = study.table.label, [n for n, fold in enumerate(study.folds) if only in ("", fold.name)]
    folds = [study.folds[number] for number in numbers]
    jobs = [job for number in numbers for job in _jobs(study, row, config, number, label)]
    valid = [rows for fold in folds for _, rows in fold.inner]
    owner = [fold.name for fold in folds for _ in fold.inner]
    heads = Heads(jobs, len(study.table.classes), config)
    for epoch in range(1, study.options.tune.max_epochs + 1):
        heads.epoch()
        found: dict[str, list[float]] = {fold.name: [] for fold in folds}
        for name, rows, probability in zip(owner, valid, heads.probability(valid), strict=True):
            area = auc(label[rows], probability)
            # Folds are made so that every validation part has all classes.
            found[name].append(math.nan if area is None else area)
        each = {name: float(np.mean(areas)) for name, areas in found.items()}
        yield {
            "epoch": epoch,
            "val_auc": float(np.mean(list(each.values()))),
            **{f"fold_{name}": area for name, area in each.items()},
        }


def eligible_epochs(record: TrialRecord, fold: str) -> list[tuple[int, float]]:
    """Epochs of a trial that count in the selection for a fold, and the AUC on its validation people after each."""
    found = [(int(seen["epoch"]), float(seen.get(f"fold_{fold}", math.nan))) for seen in record.history]
    return [(epoch, area) for epoch, area in found if not math.isnan(area) and epoch <= record.last.get(fold, epoch)]


def select(study: Study, row: str, records: Sequence[TrialRecord]) -> list[Choice]:
    """For each fold on its own the configuration and epoch with the best AUC on that fold's validation people, and the
    next best ``tune.ensemble_size`` - 1 configurations, each at its own best epoch.

    Of equals the one that trains for fewer epochs, then the first in the alphabet of configurations: never by the order
    of ``records``.

    Raises:
        UserError: no trial of the row has come to the end of an epoch.
    """
    choices = []
    for fold in study.folds:
        found = []
        for record in records:
            if record.row != row:
                continue
            text = json.dumps(record.config, sort_keys=True)
            found += [(-area, epoch, text) for epoch, area in eligible_epochs(record, fold.name)]
        if not found:
            raise UserError(f"no trial of the row {row!r} finished an epoch that counts for fold {fold.name}")
        choices.append(best_choice(found, study.options.tune.ensemble_size))
    return choices


def best_choice(found: Sequence[tuple[float, int, str]], most: int) -> Choice:
    """The first of (minus AUC, epoch, configuration as JSON) with the next ``most`` - 1 configurations behind it."""
    each: dict[str, Choice] = {}
    for area, epoch, text in sorted(found):
        each.setdefault(text, Choice(json.loads(text), epoch, -area))
    first, *others = list(each.values())[:most]
    return replace(first, others=tuple(others))


def predict(study: Study, row: str, choices: Sequence[Choice]) -> list[Floats]:
    """What the selected heads, trained again, say about each fold's test people.

    Returns:
        For each fold float32 ``[test row, class]``: the mean of the probabilities of its inner splits' heads, of all
        configurations that were chosen.
    """
    return predict_ablated(study, row, choices, ["all"])["all"]


def predict_ablated(
    study: Study, row: str, choices: Sequence[Choice], wanted: Sequence[str]
) -> dict[str, list[Floats]]:
    """The same, and what else is asked for: ``uncalibrated`` probabilities, or a modality's name: the others withheld
    from the very same heads."""
    return _ensembles(study, row, choices, [study.table.label], [""], wanted)[0]


def trained_heads(study: Study, row: str, choices: Sequence[Choice]) -> list[list[list[Head]]]:
    """The heads behind :func:`predict`, for each fold and each of ``Choice.members`` one of each inner split.

    They stand by themselves: state and ``about()`` bring them back, and given what ``models.fusion.tokens`` makes of an
    encoder's features, with the kind that ``models.fusion_heads.input_kind`` tells, the mean of the softmax of their
    logits is the probability that the study reports.
    """
    found = []
    for number, (fold, choice) in enumerate(zip(study.folds, choices, strict=True)):
        mine = []
        for member in choice.members:
            heads = _trained(study, _jobs(study, row, member.config, number, study.table.label), member)
            if study.options.tune.calibrate:
                heads.calibrate([rows for _, rows in fold.inner])
            mine.append([heads.head(i) for i in range(len(fold.inner))])
        found.append(mine)
    return found


def _trained(study: Study, jobs: Sequence[Job], choice: Choice) -> Heads:
    heads = Heads(jobs, len(study.table.classes), choice.config)
    for _ in range(choice.epoch):
        heads.epoch()
    return heads


def _ensembles(
    study: Study, row: str, choices: Sequence[Choice], labels: Sequence[Ints], purposes: Sequence[str],
    wanted: Sequence[str] = ("all",),
) -> list[dict[str, list[Floats]]]:  # fmt: skip
    """The same for each of some ways to label the windows, for each fold."""
    found: list[dict[str, list[Floats]]] = [{view: [] for view in wanted} for _ in labels]
    for number, choice in enumerate(choices):
        said = [_of_member(study, row, member, number, labels, purposes, wanted) for member in choice.members]
        for i, parts in enumerate(found):
            for view, each in parts.items():
                mean = np.stack([one[i][view] for one in said]).mean(axis=0, dtype=np.float64)
                each.append(mean.astype(np.float32))
    return found


def _of_member(
    study: Study, row: str, choice: Choice, number: int, labels: Sequence[Ints], purposes: Sequence[str],
    wanted: Sequence[str],
) -> list[dict[str, Floats]]:  # fmt: skip
    """What the heads of one configuration say in one fold, for each way to label the windows."""
    fold, found = study.folds[number], list[dict[str, Floats]]()
    jobs = [
        _jobs(study, row, choice.config, number, label, purpose)
        for label, purpose in zip(labels, purposes, strict=True)
    ]  # fmt: skip
    each = len(fold.inner)
    step = max(1, _MOST_HEADS // each)
    for start in range(0, len(jobs), step):
        mine = jobs[start : start + step]
        heads = _trained(study, [job for some in mine for job in some], choice)
        tested = [fold.test] * len(heads.jobs)
        flat = {"uncalibrated": heads.probability(tested)} if "uncalibrated" in wanted else {}
        if study.options.tune.calibrate:
            heads.calibrate([rows for _, rows in fold.inner] * len(mine))
        for view in [view for view in wanted if view not in flat]:
            flat[view] = heads.probability(tested, None if view == "all" else view)
        for low in range(0, len(mine) * each, each):
            means = {view: np.stack(flat[view][low : low + each]).mean(axis=0, dtype=np.float64) for view in wanted}
            found.append({view: mean.astype(np.float32) for view, mean in means.items()})
    return found


def noisy(study: Study, signal: str) -> Study:
    """The study with one signal's features replaced by noise, drawn for each window on its own."""
    inputs = {}
    for key, values in study.inputs.items():
        if key.startswith(f"{signal}/"):
            rng = np.random.Generator(np.random.Philox(key=seed_of("noise", study.options.run.seed, key)))
            values = rng.standard_normal(values.shape, dtype=np.float32)
        inputs[key] = values
    # Where the signal was missing would tell of the window too.
    valid = {name: known for name, known in study.valid.items() if name != signal}
    most = max(study.options.search.components)
    reductions = reductions_of(inputs, study.encoders, study.folds, most, valid)
    return replace(study, inputs=inputs, valid=valid, reductions=reductions)


def control(study: Study, choices: Sequence[Choice], repeats: int) -> list[float]:
    """AUCs of the fused row's selected heads when trained and tested on labels permuted by recording within people.

    A study that leaks, through a person or a recording on both sides of a fold, stays above chance here.

    Returns:
        One AUC over all test windows for each permutation in which it is defined.
    """
    # Labels only: the folds, and with them what every head is tested on, stay as they are.
    labels = [permuted(study.table, seed_of("control", study.options.run.seed, i)).label for i in range(repeats)]
    purposes = [f"/permuted/{i}" for i in range(repeats)]
    rows = np.concatenate([fold.test for fold in study.folds])
    areas = []
    for label, parts in zip(labels, _ensembles(study, "fused", choices, labels, purposes), strict=True):
        if (area := auc(label[rows], np.concatenate(parts["all"]))) is not None:
            areas.append(area)
    return areas
