"""What the predictions on held-out windows say: curves, results of each person, differences between rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from physio_dist.report.rundata import Floats
from physio_dist.report.sweepdata import Predictions

RESAMPLES = 1000
COVERAGE = 0.95


@dataclass(frozen=True)
class Pairs:
    """All comparisons of a window of a class with one of another class, summed by the people they belong to.

    ``wins[i, j]``: pairs of a positive window of person *i* and a negative one of person *j* in which the positive
    one has the higher score, ties counted half. ``positives``, ``negatives``: windows of each person. The area under
    the ROC curve of any multiset of people follows: with person *i* taken c_i times it is c'Wc / (c'p c'n), which
    is the Mann-Whitney statistic (Hanley and McNeil 1982).
    """

    wins: Floats
    positives: Floats
    negatives: Floats

    def auc(self, counts: Floats) -> Floats:
        """Areas for ``counts`` ``[repeat, person]``, ``[repeat]``; NaN where a class is missing."""
        total = (counts @ self.positives) * (counts @ self.negatives)
        won = ((counts @ self.wins) * counts).sum(axis=1)
        return _ratio(won, total)

    def of_each_person(self) -> Floats:
        """The area within each person, ``[person]``; NaN where a person has one kind of window only."""
        total = self.positives * self.negatives
        return _ratio(np.diag(self.wins), total)


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
    """The predictions and what several sections need of them; ``pairs``: row name -> one entry a class with a curve."""

    predictions: Predictions
    pairs: dict[str, list[Pairs]]
    people: People

    @classmethod
    def of(cls, predictions: Predictions) -> HeldOut:
        """Everything computed once."""
        pairs = {row: all_pairs(predictions, row) for row in predictions.probability}
        return cls(predictions, pairs, people_of(predictions, pairs))


@dataclass(frozen=True)
class Difference:
    """By how much the AUC of one row exceeds another's, with the interval over people (NaN with fewer than two)."""

    value: float
    low: float
    high: float


def positive_classes(classes: int) -> list[int]:
    """Classes that get a curve: of two the second, else each against the rest."""
    return [1] if classes == 2 else list(range(classes))


def pairs_of(predictions: Predictions, row: str, positive: int) -> Pairs:
    """Comparisons of the windows of class ``positive`` with all others by the row's probability of that class."""
    people, owner = np.unique(predictions.person, return_inverse=True)
    score = predictions.probability[row][:, positive]
    is_positive = predictions.label == positive
    above, whose = score[is_positive], owner[is_positive]
    wins = np.zeros((len(people), len(people)))
    for j in range(len(people)):
        below = np.sort(score[~is_positive & (owner == j)])
        if below.size:
            won = (np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")) / 2
            wins[:, j] = np.bincount(whose, weights=won, minlength=len(people))
    positives = np.bincount(whose, minlength=len(people)).astype(np.float64)
    negatives = np.bincount(owner, minlength=len(people)) - positives
    return Pairs(wins, positives, negatives)


def all_pairs(predictions: Predictions, row: str) -> list[Pairs]:
    """One entry a class that gets a curve."""
    classes = predictions.probability[row].shape[1]
    return [pairs_of(predictions, row, positive) for positive in positive_classes(classes)]


def mean_auc(pairs: Sequence[Pairs], counts: Floats) -> Floats:
    """Mean over classes of their areas, ``[repeat]``; classes that a repeat lacks are left out of its mean."""
    return _mean(np.stack([one.auc(counts) for one in pairs]))


def pooled_auc(pairs: Sequence[Pairs]) -> float:
    """The area over all people, each taken once."""
    return float(mean_auc(pairs, np.ones((1, len(pairs[0].positives))))[0])


def difference(one: Sequence[Pairs], other: Sequence[Pairs]) -> Difference:
    """How far ``one``'s area is above ``other``'s, with the percentile interval of a bootstrap over people.

    Both are measured on the same resampled people, so that what makes a person easy or hard cancels out.
    """
    value = pooled_auc(one) - pooled_auc(other)
    people = len(one[0].positives)
    if people < 2:
        return Difference(value, math.nan, math.nan)
    counts = _resampled(people)
    drawn = mean_auc(one, counts) - mean_auc(other, counts)
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return Difference(value, math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Difference(value, float(low), float(high))


def people_of(predictions: Predictions, pairs: dict[str, list[Pairs]]) -> People:
    """Accuracy and area of each person, for the rows of ``pairs``."""
    people, first, owner = np.unique(predictions.person, return_index=True, return_inverse=True)
    windows = np.bincount(owner)
    accuracy = {}
    for row in pairs:
        right = predictions.probability[row].argmax(axis=1) == predictions.label
        accuracy[row] = np.bincount(owner, weights=right) / windows
    auc = {row: _mean(np.stack([one.of_each_person() for one in many])) for row, many in pairs.items()}
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


def present(predictions: Predictions, classes: int) -> list[int]:
    """Classes that get a curve and that some windows have and others have not."""
    count = np.bincount(predictions.label, minlength=classes)
    return [c for c in positive_classes(classes) if 0 < count[c] < predictions.label.size]


def _mean(values: Floats) -> Floats:
    """Mean over the first axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    total = np.where(finite, values, 0.0).sum(axis=0)
    return _ratio(total, count.astype(np.float64))


def _ratio(part: Floats, whole: Floats) -> Floats:
    """Quotients, NaN where there is nothing to divide by."""
    made: Floats = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return made


def _resampled(people: int) -> Floats:
    """How often each person is drawn in each repeat, ``[repeat, person]``: the same for every pair of rows."""
    key = int.from_bytes(hashlib.sha256(b"report, people drawn again").digest()[:8], "little")
    # Raw output is fixed by the generator's specification; numpy's ways of drawing from it may change.
    raw = np.random.Philox(key=key).random_raw(RESAMPLES * people)
    drawn = (np.asarray(raw, np.uint64) % np.uint64(people)).astype(np.int64).reshape(RESAMPLES, people)
    counts = np.zeros((RESAMPLES, people))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], drawn), 1.0)
    return counts


def _short(pseudonyms: list[str]) -> list[str]:
    digits = 6
    while digits < 16 and len({name[:digits] for name in pseudonyms}) < len(pseudonyms):
        digits += 1
    return [name[:digits] for name in pseudonyms]
