"""Heads of selected configurations, trained once for testing, occlusion analysis and the classifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from physio_dist.evaluation.head_training import Heads
from physio_dist.evaluation.trials import Choice, Study, jobs_of
from physio_dist.models.fusion.head import Head
from physio_dist.runtime.arrays import Float32Array, FloatArray, Int64Array

# Heads trained at a time with several labellings.
_MAX_HEADS = 64


@dataclass(frozen=True)
class TrainedHeads:
    """Heads of the configurations that each fold selected for a row, and their predictions for its test people.

    Attributes:
        choices: selected by each fold.
        heads: for each fold and each of ``Choice.members`` one head of each inner split. They stand by themselves:
            state and ``to_dict()`` rebuild them; the mean of the softmax of their logits, given pooled features
            (``models/fusion/pooling.py``), is ``probability``.
        probability: for each fold float32 ``[test row, class]``, the mean over its heads.
        uncalibrated: ``probability`` at temperature 1; None without ``tune.calibrate``.
        ablated: for a signal ``probability`` with the other signals hidden from the same heads.
    """

    choices: tuple[Choice, ...]
    heads: tuple[tuple[tuple[Head, ...], ...], ...]
    probability: list[FloatArray]
    uncalibrated: list[FloatArray] | None = None
    ablated: Mapping[str, list[FloatArray]] = field(default_factory=dict)


class _View(NamedTuple):
    """A way to ask heads: with one signal only (None: all), at their temperature or without it."""

    only: str | None = None
    calibrated: bool = True


class Labelling(NamedTuple):
    """Targets int64 ``[n]`` of all windows, and a purpose that separates the random draws of their heads."""

    label: Int64Array
    purpose: str = ""


def train_selected(study: Study, row: str, choices: Sequence[Choice], ablate: Sequence[str] = ()) -> TrainedHeads:
    """Train the selected configurations of a row and predict each fold's test people.

    Args:
        study: the inputs.
        row: one of ``SEARCHED``.
        choices: one for each fold.
        ablate: signals to predict from alone as well.
    """
    views = [_View(), *(_View(signal) for signal in ablate)]
    if study.options.tune.calibrate:
        views.append(_View(calibrated=False))
    probability: dict[_View, list[FloatArray]] = {view: [] for view in views}
    heads = []
    for number, choice in enumerate(choices):
        inner = len(study.folds[number].inner)
        tested = [study.folds[number].test] * inner
        fold_heads, members = [], []
        for member in choice.members:
            (trained,) = train_member(study, row, member, number, [Labelling(study.table.label)])
            fold_heads.append(tuple(trained.head(i) for i in range(inner)))
            members.append({view: mean_probability(trained.probability(tested, *view)) for view in views})
        heads.append(tuple(fold_heads))
        for view in views:
            probability[view].append(mean_probability([member[view] for member in members]))
    return TrainedHeads(
        choices=tuple(choices), heads=tuple(heads), probability=probability[_View()],
        uncalibrated=probability.get(_View(calibrated=False)),
        ablated={signal: probability[_View(signal)] for signal in ablate},
    )  # fmt: skip


def train_member(
    study: Study, row: str, member: Choice, number: int, labellings: Sequence[Labelling]
) -> Iterator[Heads]:  # fmt: skip
    """Train one configuration in one fold, for each labelling and inner split a head.

    Args:
        study: the inputs.
        row: one of ``SEARCHED``.
        member: configuration and epochs.
        number: of the fold.
        labellings: targets; several are trained at once.

    Yields:
        Batches of trained, calibrated heads: those of the first labelling's inner splits, then of the second's, ...
    """
    inner = study.folds[number].inner
    step = max(1, _MAX_HEADS // len(inner))
    for start in range(0, len(labellings), step):
        batch = labellings[start : start + step]
        jobs = [job for labelling in batch for job in jobs_of(study, row, member.config, number, *labelling)]
        heads = Heads(jobs, len(study.table.classes), member.config)
        for _ in range(member.epoch):
            heads.epoch()
        if study.options.tune.calibrate:
            heads.calibrate([rows for _, rows in inner] * len(batch))
        yield heads


def mean_probability(probability: Sequence[FloatArray]) -> Float32Array:
    """Mean of several predictions, float32 ``[row, class]``."""
    mean: Float32Array = np.stack(probability).mean(axis=0, dtype=np.float64).astype(np.float32)
    return mean
