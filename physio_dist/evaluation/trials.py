"""Trials of a study: their inputs, the training of one configuration, and the selection among all of them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from physio_dist.config import TuneConfig
from physio_dist.errors import UserError
from physio_dist.evaluation.head_training import Heads, Job
from physio_dist.evaluation.label_table import LabelTable
from physio_dist.evaluation.splits import Fold
from physio_dist.models.fusion.heads import input_kind
from physio_dist.models.fusion.reduction import Reduction, fit_reduction
from physio_dist.runtime.arrays import BoolArray, Float32Array, Float64Array, Int64Array
from physio_dist.stats.scores import auc

SEARCHED = ("fused", "ecg", "eeg", "untrained")
"""Rows of the table of results whose configurations are searched."""

MODALITIES = {"fused": ("ecg", "eeg"), "ecg": ("ecg",), "eeg": ("eeg",), "untrained": ("ecg", "eeg")}
"""Inputs of each of these rows."""


class EncoderRole(NamedTuple):
    """The encoders of a signal that a row uses: pretrained, or untrained ones as a baseline."""

    signal: str
    pretrained: bool = True


class EncoderKey(NamedTuple):
    """One encoder: its signal and the hash of its weights."""

    signal: str
    sha256: str


class InputKey(NamedTuple):
    """Pooled features of one encoder."""

    signal: str
    sha256: str
    pooling: str

    @property
    def encoder(self) -> EncoderKey:
        """The encoder that made them."""
        return EncoderKey(self.signal, self.sha256)


class ReductionKey(NamedTuple):
    """Reduction of pooled features by the training rows of one inner split of a fold."""

    inputs: InputKey
    fold: str
    inner: int


@dataclass(frozen=True)
class Study:
    """Inputs of all trials; picklable, its large arrays are plain NumPy arrays.

    Attributes:
        options: of the sweep.
        table: the labelled windows.
        folds: their divisions.
        encoders: for each role the hash of each fold's encoder.
        inputs: pooled features, float32 ``[n, f]`` or ``[n, token, f]``, rows as in the table.
        handcrafted: handcrafted features of each signal, float64 ``[n, f]``.
        reductions: see :func:`reductions_of`.
        about: description of the encoders in ``results.json``.
        notes: notes for readers of the results.
        valid: for each signal bool ``[n, channel]``; a signal that is not a key is valid in all windows.
        features: URLs of the frozen features of pretrained encoders.
    """

    options: TuneConfig
    table: LabelTable
    folds: tuple[Fold, ...]
    encoders: dict[EncoderRole, tuple[str, ...]]
    inputs: dict[InputKey, Float32Array]
    handcrafted: dict[str, Float64Array]
    reductions: dict[ReductionKey, Reduction]
    about: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    valid: dict[str, BoolArray] = field(default_factory=dict)
    features: dict[EncoderKey, str] = field(default_factory=dict)

    def available(self, key: InputKey) -> BoolArray | None:
        """Availability of inputs, bool ``[n, token]`` or ``[n, 1]``; None: available in all windows."""
        return token_mask(self.valid.get(key.signal), key.pooling)

    def keys_of(self, row: str, pooling: str, fold: int) -> dict[str, InputKey]:
        """Keys of a row's inputs in a fold, by signal."""
        pretrained = row != "untrained"
        return {
            signal: InputKey(signal, self.encoders[EncoderRole(signal, pretrained)][fold], pooling)
            for signal in MODALITIES[row]
        }


@dataclass
class TrialRecord:
    """History of a trial, however it ended.

    Attributes:
        trial: its name.
        row: one of ``SEARCHED``.
        config: its configuration (``search_space.py``).
        history: what :func:`train` yielded.
        last: for a fold the last epoch that its selection may choose; absent: any.
        seconds: duration.
    """

    trial: str
    row: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    last: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Choice:
    """Configuration and number of epochs that a fold's validation people selected.

    Attributes:
        config: one of the sweep's configurations.
        epoch: from 1; training ends after it.
        val_auc: AUC on the validation people.
        others: the next best configurations, whose heads join the ensemble (``tune.ensemble_size``).
    """

    config: dict[str, Any]
    epoch: int
    val_auc: float
    others: tuple[Choice, ...] = ()

    @property
    def members(self) -> tuple[Choice, ...]:
        """Members of the ensemble, the best first."""
        return (replace(self, others=()), *self.others)


def token_mask(valid: BoolArray | None, pooling: str) -> BoolArray | None:
    """Availability of pooled features, ``[n, token]`` or ``[n, 1]``, from ``valid``, ``[n, channel]``."""
    if valid is None or pooling == "channels_attention":
        return valid
    return np.asarray(valid.any(axis=1, keepdims=True))


def jobs_of(
    study: Study, row: str, config: Mapping[str, Any], fold: int, label: Int64Array, purpose: str = ""
) -> list[Job]:  # fmt: skip
    """Training jobs of a fold's heads, one for each inner split.

    Args:
        study: inputs and reductions.
        row: one of ``SEARCHED``.
        config: of the heads.
        fold: its number.
        label: int64 ``[n]``, targets.
        purpose: separates the random draws from those of other heads with the same configuration.
    """
    keys, name = study.keys_of(row, input_kind(config), fold), study.folds[fold].name
    inputs = {signal: study.inputs[key] for signal, key in keys.items()}
    available = {signal: mask for signal, key in keys.items() if (mask := study.available(key)) is not None}
    jobs = []
    for i, (rows, _) in enumerate(study.folds[fold].inner):
        reductions = {signal: study.reductions[ReductionKey(key, name, i)] for signal, key in keys.items()}
        seed = f"{study.options.run.seed}/{row}/{name}/{i}{purpose}"
        jobs.append(Job(inputs, reductions, label, rows, seed, available))
    return jobs


def reductions_of(
    inputs: Mapping[InputKey, Float32Array], encoders: Mapping[EncoderRole, Sequence[str]],
    folds: Sequence[Fold], components: int, valid: Mapping[str, BoolArray] | None = None,
) -> dict[ReductionKey, Reduction]:  # fmt: skip
    """Standardisation and principal components of the inputs, from the training rows of each inner split.

    Windows without a signal, and tokens of invalid channels, are left out.

    Raises:
        UserError: a signal is missing in all training rows of an inner split.
    """
    reductions = {}
    for key, values in inputs.items():
        mask = token_mask((valid or {}).get(key.signal), key.pooling)
        roles = [EncoderRole(key.signal, pretrained) for pretrained in (True, False)]
        for number, fold in enumerate(folds):
            if key.sha256 not in [encoders[role][number] for role in roles]:
                continue
            for i, (rows, _) in enumerate(fold.inner):
                vectors = values[rows] if mask is None else _available_vectors(values[rows], mask[rows])
                if not len(vectors):
                    raise UserError(
                        f"fold {fold.name}: the {key.signal.upper()} is missing in all windows of the people that some "
                        "head would be trained on; use fewer folds, or a set in which more people have it"
                    )
                vectors = vectors.reshape(-1, vectors.shape[-1])
                reductions[ReductionKey(key, fold.name, i)] = fit_reduction(vectors, components)
    return reductions


def _available_vectors(values: Float32Array, mask: BoolArray) -> Float32Array:
    """The vectors ``[any, f]`` that ``mask`` keeps of ``[n, f]`` or ``[n, token, f]``."""
    return values[mask[:, 0]] if values.ndim == 2 else values[np.broadcast_to(mask, values.shape[:2])]


def train(study: Study, row: str, config: dict[str, Any], only: str = "") -> Iterator[dict[str, float]]:
    """Train one configuration, the heads of all folds and inner splits at once.

    A head sees no label or feature of its fold's test people, nor, in training, of its validation people.

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
    jobs = [job for number in numbers for job in jobs_of(study, row, config, number, label)]
    valid = [rows for fold in folds for _, rows in fold.inner]
    owner = [fold.name for fold in folds for _ in fold.inner]
    heads = Heads(jobs, len(study.table.classes), config)
    for epoch in range(1, study.options.tune.max_epochs + 1):
        heads.epoch()
        areas: dict[str, list[float]] = {fold.name: [] for fold in folds}
        for name, rows, probability in zip(owner, valid, heads.probability(valid), strict=True):
            area = auc(label[rows], probability)
            # Folds are made so that every validation part has all classes.
            areas[name].append(math.nan if area is None else area)
        mean = {name: float(np.mean(values)) for name, values in areas.items()}
        yield {
            "epoch": epoch,
            "val_auc": float(np.mean(list(mean.values()))),
            **{f"fold_{name}": area for name, area in mean.items()},
        }


def eligible_epochs(record: TrialRecord, fold: str) -> list[tuple[int, float]]:
    """Epochs of a trial that the selection for a fold may choose, with the AUC on the validation people after each."""
    epochs = [(int(line["epoch"]), float(line.get(f"fold_{fold}", math.nan))) for line in record.history]
    return [(epoch, area) for epoch, area in epochs if not math.isnan(area) and epoch <= record.last.get(fold, epoch)]


def select(study: Study, row: str, records: Sequence[TrialRecord]) -> list[Choice]:
    """Select configuration and epoch for each fold, by the AUC on that fold's validation people.

    The next best ``tune.ensemble_size`` - 1 configurations join, each at its own best epoch. Ties go to fewer epochs,
    then to the alphabetical order of configurations, never to the order of ``records``.

    Raises:
        UserError: no trial of the row has come to the end of an epoch.
    """
    choices = []
    for fold in study.folds:
        candidates = []
        for record in records:
            if record.row == row:
                text = json.dumps(record.config, sort_keys=True)
                candidates += [(-area, epoch, text) for epoch, area in eligible_epochs(record, fold.name)]
        if not candidates:
            raise UserError(f"no trial of the row {row!r} finished an epoch that counts for fold {fold.name}")
        choices.append(best_choice(candidates, study.options.tune.ensemble_size))
    return choices


def best_choice(candidates: Sequence[tuple[float, int, str]], size: int) -> Choice:
    """The first of (minus AUC, epoch, configuration as JSON), with the next ``size`` - 1 configurations."""
    best: dict[str, Choice] = {}
    for area, epoch, text in sorted(candidates):
        best.setdefault(text, Choice(json.loads(text), epoch, -area))
    first, *others = list(best.values())[:size]
    return replace(first, others=tuple(others))
