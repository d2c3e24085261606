"""Subject-level ROC-AUC: pairwise win matrices, from which the AUC of any multiset of people follows.

``stats/bootstrap.py`` and ``stats/permutation.py`` build intervals and tests on them. Both a study's ``results.json``
and its report use these functions, so their figures agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from physio_dist.runtime.arrays import BoolArray, Float64Array, Int64Array, UInt64Array


@dataclass(frozen=True)
class PairwiseComparisons:
    """Comparisons of each positive window with each negative one, summed by person.

    With person *i* taken c_i times the area under the ROC curve is c'Wc / (c'p c'n), the Mann-Whitney statistic
    (Hanley and McNeil, Radiology 143 (1982) 29-36).

    Attributes:
        win_matrix: float64 ``[person, person]``; entry *i, j* counts the pairs of a positive window of person *i* and a
            negative one of person *j* in which the positive one has the higher score, ties counted half.
        positives, negatives: float64 ``[person]``, number of windows.
    """

    win_matrix: Float64Array
    positives: Float64Array
    negatives: Float64Array

    def auc(self, counts: Float64Array) -> Float64Array:
        """AUC of multisets of people.

        Args:
            counts: ``[repeat, person]``, how often each person is taken.

        Returns:
            float64 ``[repeat]``; NaN where a class is missing.
        """
        total = (counts @ self.positives) * (counts @ self.negatives)
        wins = ((counts @ self.win_matrix) * counts).sum(axis=1)
        return ratio(wins, total)

    def of_each_person(self) -> Float64Array:
        """AUC within each person, ``[person]``; NaN where a person lacks a class."""
        total = self.positives * self.negatives
        return ratio(np.diag(self.win_matrix), total)


def positive_classes(classes: int) -> list[int]:
    """Classes that get a curve: the second of two, else each against the rest."""
    return [1] if classes == 2 else list(range(classes))


def compare_pairs(
    positive: BoolArray, person: UInt64Array, score: Float64Array, other: Float64Array | None = None
) -> PairwiseComparisons:
    """Compare the positive windows, by ``score``, with all others, by ``other`` (None: by ``score`` too).

    Args:
        positive: bool ``[n]``, windows of the class.
        person: ``[n]``.
        score, other: ``[n]``.
    """
    people, owner = np.unique(person, return_inverse=True)
    negative_score = score if other is None else other
    above, above_owner = score[positive], owner[positive]
    win_matrix = np.zeros((len(people), len(people)))
    for j in range(len(people)):
        below = np.sort(negative_score[~positive & (owner == j)])
        if below.size:
            wins = (np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")) / 2
            win_matrix[:, j] = np.bincount(above_owner, weights=wins, minlength=len(people))
    positives = np.bincount(above_owner, minlength=len(people)).astype(np.float64)
    negatives = np.bincount(owner, minlength=len(people)) - positives
    return PairwiseComparisons(win_matrix, positives, negatives)


def compare_all_pairs(label: Int64Array, person: UInt64Array, probability: Float64Array) -> list[PairwiseComparisons]:
    """Compare pairs for each class that gets a curve; ``probability`` is ``[n, class]``."""
    return [compare_pairs(label == c, person, probability[:, c]) for c in positive_classes(probability.shape[1])]


def mean_auc(pairs: Sequence[PairwiseComparisons], counts: Float64Array) -> Float64Array:
    """Mean AUC over classes, ``[repeat]``; a class that a repeat lacks is left out of its mean."""
    return mean_of_finite(np.stack([comparisons.auc(counts) for comparisons in pairs]))


def pooled_auc(pairs: Sequence[PairwiseComparisons]) -> float:
    """AUC over all people, each taken once."""
    return float(mean_auc(pairs, np.ones((1, len(pairs[0].positives))))[0])


def mean_of_finite(values: Float64Array) -> Float64Array:
    """Mean of the finite values over the first axis; NaN where there is none."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    total = np.where(finite, values, 0.0).sum(axis=0)
    return ratio(total, count.astype(np.float64))


def ratio(part: Float64Array, whole: Float64Array) -> Float64Array:
    """Quotients; NaN where ``whole`` is zero."""
    quotient: Float64Array = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return quotient
