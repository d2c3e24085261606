"""Pairwise comparisons against the AUC of windows."""

from __future__ import annotations

import numpy as np
import pytest

from physio_dist.stats.auc import compare_all_pairs, mean_auc, pooled_auc
from physio_dist.stats.scores import auc


@pytest.mark.parametrize("classes", [2, 3])
def test_mean_auc_of_counts_equals_auc_of_repeated_windows(classes: int) -> None:
    rng = np.random.default_rng(0)
    label, person = rng.integers(0, classes, 80), rng.integers(0, 6, 80).astype(np.uint64)
    probability = np.ceil(4 * (rng.random((80, classes)) + 0.3 * np.eye(classes)[label]))
    pairs = compare_all_pairs(label, person, probability)
    assert pooled_auc(pairs) == pytest.approx(auc(label, probability))
    counts = rng.integers(0, 3, (5, 6))
    for count, area in zip(counts, mean_auc(pairs, counts.astype(float)), strict=True):
        rows = np.repeat(np.arange(80), count[person.astype(int)])
        assert area == pytest.approx(auc(label[rows], probability[rows]))
