"""Permutation p values against their definition."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import rankdata

from physio_dist.stats.auc import compare_all_pairs
from physio_dist.stats.bootstrap import auc_difference
from physio_dist.stats.permutation import permutation_p_value
from physio_dist.stats.scores import auc


def rows_of(people: int, strength: tuple[float, float], seed: int = 0, windows: int = 20, classes: int = 2):
    """Labels, people and two rows that tell the classes apart so well, on the same hard and easy windows."""
    rng = np.random.default_rng(seed)
    n = people * windows
    label, person = np.arange(n) % classes, np.repeat(np.arange(people, dtype=np.uint64), windows)
    shared = rng.normal(size=(n, classes))
    rows = []
    for one in strength:
        logit = one * np.eye(classes)[label] + shared + 0.5 * rng.normal(size=(n, classes))
        rows.append(np.exp(logit) / np.exp(logit).sum(axis=1, keepdims=True))
    return label, person, *rows


def test_permutation_p_value_equals_share_of_swaps_that_differ_as_much():
    label, person, one, other = rows_of(5, (1.2, 0.9), windows=12)
    ranks = [np.stack([-rankdata(row[:, 1]), rankdata(row[:, 1])], axis=1) for row in (one, other)]
    gaps = []
    for swap in product([False, True], repeat=5):
        mine = np.array(swap)[person.astype(int)][:, None]
        gaps.append(auc(label, np.where(mine, *ranks)) - auc(label, np.where(mine, *ranks[::-1])))
    observed = auc(label, one) - auc(label, other)
    assert abs(gaps[0]) == pytest.approx(abs(observed))
    exact = np.mean(np.abs(gaps) >= abs(observed) - 1e-12)
    assert permutation_p_value(label, person, one, other) == pytest.approx(exact, abs=0.03)
    assert 0.05 < exact < 0.95, "a case in which it matters"


@pytest.mark.parametrize("classes", [2, 3])
def test_permutation_p_value_is_small_for_better_row_and_one_for_itself(classes: int):
    label, person, one, other = rows_of(20, (2.0, 0.5), classes=classes)
    assert permutation_p_value(label, person, one, other) < 0.001
    assert permutation_p_value(label, person, one, one) == 1.0
    found = auc_difference(compare_all_pairs(label, person, one), compare_all_pairs(label, person, other))
    assert found.low > 0


def test_permutation_p_values_are_uniform_without_a_difference():
    """A row with sharper probabilities is not taken for a better one."""
    found = []
    for seed in range(40):
        label, person, one, other = rows_of(10, (1.0, 1.0), seed)
        bold = other**3 / (other**3).sum(axis=1, keepdims=True)
        found.append(permutation_p_value(label, person, one, bold))
    assert 0.35 < np.mean(found) < 0.65 and np.mean(np.array(found) < 0.1) <= 0.25
    assert min(found) < 0.25 and max(found) > 0.75


def test_permutation_p_value_is_nan_for_one_person_or_one_class():
    label, person, one, other = rows_of(1, (1.0, 0.5))
    assert math.isnan(permutation_p_value(label, person, one, other))
    label, person, one, other = rows_of(4, (1.0, 0.5))
    assert math.isnan(permutation_p_value(np.zeros_like(label), person, one, other))
