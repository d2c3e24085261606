"""Bootstrap intervals of AUCs and of their differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from physio_dist.stats.auc import compare_all_pairs
from physio_dist.stats.bootstrap import auc_difference, auc_interval, compared_rows
from physio_dist.stats.scores import auc


def interval_of(label: np.ndarray, probability: np.ndarray, person: np.ndarray) -> tuple[float, float] | None:
    return auc_interval(compare_all_pairs(label, person, probability))


def test_auc_interval_resamples_whole_people() -> None:
    """Forty windows of each of ten people say no more than ten windows: the interval must not be narrower."""
    rng = np.random.default_rng(0)
    label = np.arange(10) % 2
    chance = np.clip(0.5 + 0.2 * (label - 0.5) + 0.2 * rng.standard_normal(10), 0.01, 0.99)
    probability = np.stack([1 - chance, chance], axis=1)
    person = np.arange(10, dtype=np.uint64)
    few = interval_of(label, probability, person)
    many = interval_of(np.repeat(label, 40), np.repeat(probability, 40, axis=0), np.repeat(person, 40))
    assert few is not None and few == pytest.approx(many)
    area = auc(label, probability)
    assert area is not None and few[0] < area < few[1] and few[1] - few[0] > 0.3
    assert interval_of(label, probability, person) == few


def test_auc_interval_covers_known_area_at_its_nominal_rate() -> None:
    """Scores a standard deviation apart have an area of Phi(1 / sqrt 2) = 0.760."""
    hits, widths, areas = 0, [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        label = np.arange(60) % 2
        z = rng.standard_normal(60) + label
        scores = np.stack([-z, z], axis=1)
        areas.append(auc(label, scores))
        if seed < 60:
            bounds = interval_of(label, scores, np.arange(60, dtype=np.uint64))
            assert bounds is not None
            hits += bounds[0] <= 0.760 <= bounds[1]
            widths.append(bounds[1] - bounds[0])
    assert 51 <= hits <= 60
    # As wide as 95% of a normal distribution with the spread that the area really has.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(areas), rel=0.09)  # type: ignore[arg-type]


def test_auc_interval_is_none_for_one_person_and_for_one_class() -> None:
    label, probability = np.array([0, 1, 0]), np.array([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2]])
    person = np.arange(3, dtype=np.uint64)
    assert interval_of(label, probability, person * 0) is None
    assert interval_of(label * 0, probability, person) is None


def test_auc_difference_of_two_rows_uses_the_resamples_of_their_intervals() -> None:
    """Against a row that always has an AUC of 0.5, the interval is that of the first row, less 0.5."""
    rng = np.random.default_rng(0)
    label, person = np.arange(40) % 2, np.repeat(np.arange(10, dtype=np.uint64), 4)
    probability = rng.random((40, 2)) + 0.3 * np.eye(2)[label]
    first, even = (compare_all_pairs(label, person, row) for row in (probability, np.full((40, 2), 0.5)))
    difference, interval = auc_difference(first, even), auc_interval(first)
    assert interval is not None and (difference.low + 0.5, difference.high + 0.5) == pytest.approx(interval)
    assert math.isnan(auc_difference(*(compare_all_pairs(label, person * 0, row) for row in (probability,) * 2)).low)


def test_compared_rows_are_fused_with_others_and_ablations_with_single_signals():
    names = ["majority", "untrained", "ecg", "eeg", "fused", "fused_ecg_only", "noise_ecg", "bound_fused"]
    fused = ["untrained", "ecg", "eeg", "fused_ecg_only", "noise_ecg"]
    assert compared_rows(names) == [
        *(("fused", name) for name in fused),
        ("fused_ecg_only", "ecg"),
        ("noise_ecg", "eeg"),
    ]
    assert compared_rows(["majority", "ecg"]) == []
