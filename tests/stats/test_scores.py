"""Metrics against scikit-learn, and where they are not defined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, roc_auc_score

from physio_dist.stats.scores import auc, confusion, pr_auc, score


def draw(n: int, classes: int, seed: int, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.concatenate([np.arange(classes), rng.integers(0, classes, n)])
    probability = rng.random((len(label), classes)) + 0.4 * np.eye(classes)[label]
    if ties:
        probability = np.ceil(4 * probability)
    return label, probability / probability.sum(axis=1, keepdims=True)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(2, 5), st.integers(0, 999), st.booleans())
def test_score_equals_scikit_learn(n: int, classes: int, seed: int, ties: bool) -> None:
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


def test_score_of_four_windows_equals_values_computed_by_hand() -> None:
    label = np.array([0, 0, 0, 1])
    probability = np.array([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2], [0.7, 0.3]])
    assert score(label, probability) == {
        "accuracy": 0.5, "balanced_accuracy": pytest.approx(1 / 3), "macro_f1": pytest.approx(1 / 3),
        "auc": pytest.approx(2 / 3), "pr_auc": pytest.approx(1 / 2),
    }  # fmt: skip
    assert confusion(label, probability) == [[2, 1], [1, 0]]


def test_score_is_none_where_a_class_is_missing() -> None:
    label, probability = np.zeros(3, dtype=np.int64), np.array([[0.9, 0.1], [0.4, 0.6], [0.8, 0.2]])
    found = score(label, probability)
    assert found.pop("accuracy") == pytest.approx(2 / 3)
    assert set(found.values()) == {None}
    assert set(score(label[:0], probability[:0]).values()) == {None}
