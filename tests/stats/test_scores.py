"""Metrics against scikit-learn, and where they are not defined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, roc_auc_score

from physio_dist.stats.scores import auc, auc_interval, confusion, pr_auc, score


def draw(n: int, classes: int, seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.concatenate([np.arange(classes), rng.integers(0, classes, n)])
    probability = rng.random((len(label), classes)) + 0.4 * np.eye(classes)[label]
    if ties:
        probability = np.ceil(4 * probability)
    return label, probability / probability.sum(axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 999), st.booleans())
def test_as_scikit_learn_says(n: int, classes: int, seed: int, ties: bool) -> None:
    label, probability = draw(n, classes, seed, ties)
    if classes == 2:
        area, precision = roc_auc_score(label, probability[:, 1]), average_precision_score(label, probability[:, 1])
    else:
        area = roc_auc_score(label, probability, multi_class="ovr", average="macro")
        precision = np.mean([average_precision_score(label == c, probability[:, c]) for c in range(classes)])
    assert auc(label, probability) == pytest.approx(area, abs=1e-12)
    assert pr_auc(label, probability) == pytest.approx(precision, abs=1e-12)
    found, predicted = score(label, probability), probability.argmax(1)
    assert found["auc"] == auc(label, probability) and found["pr_auc"] == pr_auc(label, probability)
    assert found["accuracy"] == pytest.approx((predicted == label).mean())
    assert found["balanced_accuracy"] == pytest.approx(
        np.mean([(predicted[label == c] == c).mean() for c in range(classes)])
    )
    assert found["macro_f1"] == pytest.approx(f1_score(label, predicted, average="macro"))
    assert confusion(label, probability) == confusion_matrix(label, predicted, labels=range(classes)).tolist()


def test_the_figures_of_a_case_done_by_hand() -> None:
    label = np.array([0, 0, 0, 1])
    probability = np.array([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.7, 0.3]])
    assert score(label, probability) == {
        "accuracy": 0.5, "balanced_accuracy": pytest.approx(1 / 3), "macro_f1": pytest.approx(1 / 3),
        "auc": pytest.approx(2 / 3), "pr_auc": pytest.approx(1 / 2),
    }  # fmt: skip
    assert confusion(label, probability) == [[2, 1], [1, 0]]


def test_what_one_class_leaves_undefined_is_none() -> None:
    label, probability = np.zeros(3, dtype=np.int64), np.array([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2]])
    found = score(label, probability)
    assert found.pop("accuracy") == pytest.approx(2 / 3)
    assert set(found.values()) == {None}
    assert set(score(label[:0], probability[:0]).values()) == {None}
    assert auc_interval(label, probability, np.arange(3, dtype=np.uint64), 0) is None


def test_the_interval_draws_whole_people() -> None:
    """Forty windows of each of ten people say no more than ten windows: the interval must not be narrower."""
    rng = np.random.default_rng(0)
    label = np.arange(10) % 2
    chance = np.clip(0.5 + 0.2 * (label - 0.5) + 0.2 * rng.standard_normal(10), 0.01, 0.99)
    probability = np.stack([1 - chance, chance], axis=1)
    person = np.arange(10, dtype=np.uint64)
    few = auc_interval(label, probability, person, 3)
    many = auc_interval(np.repeat(label, 40), np.repeat(probability, 40, axis=0), np.repeat(person, 40), 3)
    assert few is not None and few == pytest.approx(many)
    area = auc(label, probability)
    assert area is not None and few[0] < area < few[1] and few[1] - few[0] > 0.3
    assert auc_interval(label, probability, person * 0, 3) is None
    assert auc_interval(label, probability, person, 3) == few != auc_interval(label, probability, person, 4)


def test_the_interval_covers_a_known_area_about_as_often_as_it_says() -> None:
    """Scores a standard deviation apart have an area of Phi(1 / sqrt 2) = 0.760."""
    hits, widths, areas = 0, [], []
    for seed in range(400):
        rng = np.random.default_rng(seed)
        label = np.arange(60) % 2
        z = rng.standard_normal(60) + label
        scores = np.stack([-z, z], axis=1)
        areas.append(auc(label, scores))
        if seed < 60:
            bounds = auc_interval(label, scores, np.arange(60, dtype=np.uint64), seed, repeats=300)
            assert bounds is not None
            hits += bounds[0] <= 0.760 <= bounds[1]
            widths.append(bounds[1] - bounds[0])
    assert 51 <= hits <= 60
    # As wide as 95% of a normal distribution with the spread that the area really has.
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(areas), rel=0.09)  # type: ignore[arg-type]
