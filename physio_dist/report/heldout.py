"""What the predictions on held-out windows say: curves, results of each person, differences between rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from physio_dist.report.rundata import Floats
from physio_dist.report.sweepdata import Predictions
from physio_dist.stats.auc import (
    Difference,
    PairwiseComparisons,
    compare_all_pairs,
    compared,
    difference,
    mean_of_finite,
    p_of_no_difference,
    positive_classes,
    ratio,
)


@dataclass(frozen=True)
class Reliability:
    """Windows in bins of equal width by a probability: their number, its mean and how often it was right (NaN in an
    empty bin), ``[bin]`` each."""

    count: NDArray[np.int64]
    sure: Floats
    right: Floats


@dataclass(frozen=True)
class People:
    """Held-out people, ascending by pseudonym.

    ``names``: the first digits of their pseudonyms, as many as tell them apart, at least six. ``fold``, ``windows``
    ``[person]``; ``accuracy``, ``auc``: row name -> ``[person]``, NaN where undefined.
    """

    names: list[str]
    fold: list[str]
    windows: NDArray[np.int64]
    accuracy: dict[str, Floats]
    auc: dict[str, Floats]


@dataclass(frozen=True)
class HeldOut:
    """The predictions and what several sections need of them; ``pairs``: row name -> one entry a class with a curve;
    ``differences``: what a row adds to those that it is held against, by (row, minus)."""

    predictions: Predictions
    pairs: dict[str, list[PairwiseComparisons]]
    people: People
    differences: dict[tuple[str, str], Difference]

    @classmethod
    def of(cls, predictions: Predictions) -> HeldOut:
        """Everything computed once."""
        pairs = {
            row: compare_all_pairs(predictions.label, predictions.person, probability)
            for row, probability in predictions.probability.items()
        }
        return cls(predictions, pairs, people_of(predictions, pairs), _differences(predictions, pairs))


def _differences(
    predictions: Predictions, pairs: dict[str, list[PairwiseComparisons]]
) -> dict[tuple[str, str], Difference]:
    found = {}
    for row, minus in compared(pairs):
        mine, other = predictions.probability[row], predictions.probability[minus]
        p = p_of_no_difference(predictions.label, predictions.person, mine, other)
        found[row, minus] = replace(difference(pairs[row], pairs[minus]), p=p)
    return found


def people_of(predictions: Predictions, pairs: dict[str, list[PairwiseComparisons]]) -> People:
    """Accuracy and area of each person, for the rows of ``pairs``."""
    people, first, owner = np.unique(predictions.person, return_index=True, return_inverse=True)
    windows = np.bincount(owner)
    accuracy = {}
    for row in pairs:
        right = predictions.probability[row].argmax(axis=1) == predictions.label
        accuracy[row] = np.bincount(owner, weights=right) / windows
    auc = {row: mean_of_finite(np.stack([one.of_each_person() for one in many])) for row, many in pairs.items()}
    folds = [predictions.folds[number] for number in predictions.fold[first]]
    return People(_short([f"{person:016x}" for person in people.tolist()]), folds, windows, accuracy, auc)


def roc(predictions: Predictions, row: str, positive: int) -> tuple[Floats, Floats]:
    """Rates of false and of true positives, from (0, 0) to (1, 1)."""
    x, y, _ = roc_curve(predictions.label == positive, predictions.probability[row][:, positive])
    return np.asarray(x, np.float64), np.asarray(y, np.float64)


def mean_roc(predictions: Predictions, row: str, classes: Sequence[int]) -> tuple[Floats, Floats]:
    """The mean over classes of the rate of true positives at the same rate of false ones."""
    x = np.linspace(0.0, 1.0, 501)
    heights = [np.interp(x, *roc(predictions, row, positive)) for positive in classes]
    y = np.mean(heights, axis=0)
    return np.concatenate([[0.0], x]), np.concatenate([[0.0], y])


def precision_recall(predictions: Predictions, row: str, positive: int) -> tuple[Floats, Floats]:
    """Recall and precision, from the first positive window on: before it there is no precision to speak of."""
    precision, recall, _ = precision_recall_curve(
        predictions.label == positive, predictions.probability[row][:, positive]
    )
    found = recall[::-1] > 0
    return np.asarray(recall[::-1][found], np.float64), np.asarray(precision[::-1][found], np.float64)


def reliability(predictions: Predictions, row: str, bins: int = 10) -> Reliability:
    """How often right against how sure: of two classes by the probability of the second, else of the predicted one."""
    probability = predictions.probability[row]
    sure, hit = probability[:, 1], predictions.label == 1
    if probability.shape[1] > 2:
        sure, hit = probability.max(axis=1), probability.argmax(axis=1) == predictions.label
    place = np.minimum((sure * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = [np.asarray(np.bincount(place, weights=x, minlength=bins), np.float64) for x in (sure, hit)]
    means = [ratio(total, count.astype(np.float64)) for total in sums]
    return Reliability(count.astype(np.int64), *means)


def present(predictions: Predictions, classes: int) -> list[int]:
    """Classes that get a curve and that some windows have and others have not."""
    count = np.bincount(predictions.label, minlength=classes)
    return [c for c in positive_classes(classes) if 0 < count[c] < predictions.label.size]


def _short(pseudonyms: list[str]) -> list[str]:
    digits = 6
    while digits < 16 and len({name[:digits] for name in pseudonyms}) < len(pseudonyms):
        digits += 1
    return [name[:digits] for name in pseudonyms]
