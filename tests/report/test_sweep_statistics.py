"""Areas, differences and people against what they are by definition."""

from __future__ import annotations

import math

import numpy as np
import pytest

from physio_dist.report import sweep_data
from physio_dist.report.sweep_data import HeldOut, parse_predictions
from physio_dist.stats import auc
from physio_dist.stats.bootstrap import auc_difference
from tests.report.sweep_samples import auc_of, predictions_file, predictions_of


def held(classes=("a", "b"), **options) -> tuple[HeldOut, dict[str, np.ndarray]]:
    tensors = predictions_of(classes=classes, **options)
    # Ties, as coarse probabilities have them.
    tensors["probability.ecg"] = (
        np.round(tensors["probability.ecg"][:, :1] * 8) / 8 * [[1, -1]] + [[0, 1]]
        if len(classes) == 2
        else tensors["probability.ecg"]
    )
    found, _ = parse_predictions(predictions_file(tensors, classes, 4))
    return HeldOut.of(found), tensors


def test_pooled_auc_is_the_share_of_ordered_pairs():
    found, tensors = held()
    for row in ("ecg", "fused", "majority"):
        expected = auc_of(tensors["label"], tensors[f"probability.{row}"][:, 1])
        assert auc.pooled_auc(found.pairs[row]) == pytest.approx(expected, abs=1e-12)


def test_pooled_auc_of_normal_scores():
    """Normal scores whose means lie d standard deviations apart: Phi(d / sqrt 2)."""
    rng = np.random.default_rng(5)
    n, d = 40_000, 1.2
    label = np.tile([0, 1], n // 2)
    score = 1 / (1 + np.exp(-rng.normal(d * label, 1.0)))
    probability = np.stack([1 - score, score], axis=1)
    person = np.repeat(np.arange(20, dtype=np.uint64), n // 20)
    expected = 0.5 * (1 + math.erf(d / 2))
    assert auc.pooled_auc(auc.compare_all_pairs(label, person, probability)) == pytest.approx(expected, abs=0.01)


def test_pooled_auc_of_three_classes_is_their_mean():
    found, tensors = held(classes=("a", "b", "c"))
    areas = [auc_of((tensors["label"] == c).astype(int), tensors["probability.fused"][:, c]) for c in range(3)]
    assert auc.pooled_auc(found.pairs["fused"]) == pytest.approx(np.mean(areas), abs=1e-12)


def test_mean_auc_weights_people_by_counts():
    found, tensors = held(people=5, windows=8)
    people = np.unique(tensors["person"])
    counts = np.array([2.0, 0.0, 1.0, 3.0, 0.0])
    rows = np.concatenate(
        [np.flatnonzero(tensors["person"] == person).repeat(int(n)) for person, n in zip(people, counts, strict=True)]
    )
    expected = auc_of(tensors["label"][rows], tensors["probability.ecg"][rows, 1])
    assert auc.mean_auc(found.pairs["ecg"], counts[None])[0] == pytest.approx(expected, abs=1e-12)


def test_people_of_scores_each_person():
    found, tensors = held()
    people = np.unique(tensors["person"])
    assert found.people.names == [f"{person:016x}"[:6] for person in people.tolist()]
    for i, person in enumerate(people):
        mine = tensors["person"] == person
        label, probability = tensors["label"][mine], tensors["probability.eeg"][mine]
        assert found.people.auc["eeg"][i] == pytest.approx(auc_of(label, probability[:, 1]), abs=1e-12)
        assert found.people.accuracy["eeg"][i] == pytest.approx((probability.argmax(axis=1) == label).mean())
        assert found.people.windows[i] == mine.sum()
        assert found.people.fold[i] == str(tensors["fold"][mine][0])


def test_people_of_gives_nan_for_a_person_of_one_class():
    tensors = predictions_of(people=3, windows=6)
    tensors["label"][:6] = 1
    found, _ = parse_predictions(predictions_file(tensors, ("a", "b"), 4))
    areas = HeldOut.of(found).people.auc["fused"]
    assert math.isnan(areas[0]) and np.isfinite(areas[1:]).all()


def test_people_names_are_unique_prefixes():
    tensors = predictions_of(people=3, windows=4)
    ids = np.array([0xABCDEF12_00000000, 0xABCDEF13_00000000, 0x00000000_00000001], np.uint64)
    tensors["person"] = np.repeat(ids, 4)
    found, _ = parse_predictions(predictions_file(tensors, ("a", "b"), 4))
    assert HeldOut.of(found).people.names == ["00000000", "abcdef12", "abcdef13"]


def test_difference_uses_the_same_resampled_people():
    found, _ = held(people=20, windows=20)
    other = auc_difference(found.pairs["fused"], found.pairs["untrained"])
    value = auc.pooled_auc(found.pairs["fused"]) - auc.pooled_auc(found.pairs["untrained"])
    assert other.value == pytest.approx(value, abs=1e-12)
    assert other.low < value < other.high
    same = auc_difference(found.pairs["fused"], found.pairs["fused"])
    assert (same.value, same.low, same.high) == (0.0, 0.0, 0.0)
    back = auc_difference(found.pairs["untrained"], found.pairs["fused"])
    assert (back.low, back.high) == (pytest.approx(-other.high), pytest.approx(-other.low))


def test_difference_interval_agrees_with_the_jackknife():
    """Against the textbook: with many people the interval is the value plus and minus 1.96 standard errors."""
    found, _ = held(people=60, windows=20)
    counts = np.ones((60, 60)) - np.eye(60)
    leave_out = auc.mean_auc(found.pairs["fused"], counts) - auc.mean_auc(found.pairs["ecg"], counts)
    error = math.sqrt(59 / 60 * ((leave_out - leave_out.mean()) ** 2).sum())  # jackknife
    made = auc_difference(found.pairs["fused"], found.pairs["ecg"])
    assert made.high - made.low == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_difference_of_one_person_has_no_interval():
    found, _ = held(people=1, windows=12)
    made = auc_difference(found.pairs["fused"], found.pairs["ecg"])
    assert math.isfinite(made.value) and math.isnan(made.low) and math.isnan(made.high)


def test_roc_and_precision_recall_enclose_their_areas():
    found, tensors = held()
    x, y = sweep_data.roc(found.predictions, "fused", 1)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    area = float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))
    assert area == pytest.approx(auc_of(tensors["label"], tensors["probability.fused"][:, 1]), abs=1e-9)
    recall, precision = sweep_data.precision_recall(found.predictions, "fused", 1)
    positives = (tensors["label"] == 1).sum()
    assert recall[0] == pytest.approx(1 / positives) and recall[-1] == 1
    best = np.argsort(-tensors["probability.fused"][:, 1], kind="stable")
    first = int(np.flatnonzero(tensors["label"][best] == 1)[0])
    assert precision[0] == pytest.approx(1 / (first + 1))
    assert precision[-1] == pytest.approx(positives / tensors["label"].size, rel=0.05)


def test_mean_roc_encloses_the_mean_area():
    found, _ = held(classes=("a", "b", "c", "d", "e"), people=30)
    x, y = sweep_data.mean_roc(found.predictions, "fused", [0, 1, 2, 3, 4])
    area = float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))
    assert area == pytest.approx(auc.pooled_auc(found.pairs["fused"]), abs=2e-3)
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)


def test_present_leaves_out_classes_without_windows():
    tensors = predictions_of(classes=("a", "b", "c"))
    tensors["label"][tensors["label"] == 2] = 0
    found, _ = parse_predictions(predictions_file(tensors, ("a", "b", "c"), 4))
    assert sweep_data.present(found, 3) == [0, 1]
    tensors["label"][:] = 1
    found, _ = parse_predictions(predictions_file(tensors, ("a", "b", "c"), 4))
    assert sweep_data.present(found, 3) == []
