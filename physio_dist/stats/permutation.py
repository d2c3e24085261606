"""Paired permutation test of the AUCs of two rows of results, by whole people."""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata

from physio_dist.runtime.arrays import Float64Array, Int64Array, UInt64Array
from physio_dist.stats.auc import compare_pairs, mean_of_finite, positive_classes, ratio
from physio_dist.stats.bootstrap import random_bits

PERMUTATIONS = 4999


def permutation_p_value(label: Int64Array, person: UInt64Array, first: Float64Array, second: Float64Array) -> float:
    """Two-sided p value of the null hypothesis that two rows have equal AUC.

    Under that hypothesis the rows are exchangeable for each person: they are swapped for a random half of the people,
    and the AUCs of the two mixtures compared. Scores become ranks within their row first, so that rows of different
    sharpness can be mixed (Venkatraman and Begg, Biometrika 83 (1996) 835-848, who swap single cases). The observed
    rows count as one of the permutations.

    Args:
        label, person: ``[n]``.
        first, second: probabilities ``[n, class]`` of the same windows.

    Returns:
        NaN with fewer than two people, and where a class is missing everywhere.
    """
    people = len(np.unique(person))
    if people < 2:
        return math.nan
    stay = np.concatenate([np.zeros((1, people)), _swaps(people)])
    swap = 1.0 - stay
    gaps = []
    for c in positive_classes(first.shape[1]):
        positive = label == c
        a, b = rankdata(first[:, c]), rankdata(second[:, c])
        aa, bb = compare_pairs(positive, person, a), compare_pairs(positive, person, b)
        ab, ba = compare_pairs(positive, person, a, b), compare_pairs(positive, person, b, a)
        total = float(aa.positives.sum() * aa.negatives.sum())
        same, mixed = aa.win_matrix - bb.win_matrix, ab.win_matrix - ba.win_matrix
        gap = _form(swap, same, swap) - _form(stay, same, stay) + _form(swap, mixed, stay) - _form(stay, mixed, swap)
        gaps.append(ratio(gap, np.full(len(gap), total)))
    size = np.abs(mean_of_finite(np.stack(gaps)))
    if not np.isfinite(size[0]):
        return math.nan
    return float((size >= size[0] - 1e-12).mean())


def _form(left: Float64Array, matrix: Float64Array, right: Float64Array) -> Float64Array:
    """Bilinear form of each row, ``[repeat]``."""
    return np.asarray(((left @ matrix) * right).sum(axis=1))


def _swaps(people: int) -> Float64Array:
    """1 where a person's rows are swapped in a permutation, else 0, ``[permutation, person]``."""
    bits = random_bits(b"rows of people exchanged", PERMUTATIONS * people)
    return np.asarray(bits >> np.uint64(63), np.float64).reshape(PERMUTATIONS, people)
