"""How good a set of probabilities is. A figure that is not defined is None, never NaN."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, f1_score

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "pr_auc")


def auc(label: Ints, probability: Floats) -> float | None:
    """Area under the ROC curve, the same as scikit-learn's but fast enough for every epoch of every model.

    The share of pairs of a window of the class and one of another that are in the right order (Hanley and McNeil 1982),
    ties counted half; with more than two classes the mean over one class against the rest. None where one of the
    classes is missing.

    Args:
        label: ``[n]``, class numbers.
        probability: ``[n, class]``.
    """
    classes = probability.shape[1]
    counts = np.bincount(label, minlength=classes)
    if len(label) == 0 or (counts == 0).any():
        return None
    areas = []
    for one in range(1, classes) if classes == 2 else range(classes):
        mine, n = label == one, int(counts[one])
        others = np.sort(probability[~mine, one])
        below = [np.searchsorted(others, probability[mine, one], side).sum() for side in ("left", "right")]
        areas.append(sum(below) / (2 * n * (len(label) - n)))
    return float(np.mean(areas))


def pr_auc(label: Ints, probability: Floats) -> float | None:
    """Average precision of the second of two classes, or the mean over one class against the rest; None where one of
    the classes is missing."""
    classes = probability.shape[1]
    if len(np.unique(label)) < classes:
        return None
    ones = range(1, classes) if classes == 2 else range(classes)
    return float(np.mean([average_precision_score(label == one, probability[:, one]) for one in ones]))


def score(label: Ints, probability: Floats) -> dict[str, float | None]:
    """Accuracy, balanced accuracy, macro F1, ROC-AUC, PR-AUC.

    The prediction is the most probable class, of equals the first. With more than two classes AUCs are means over one
    class against the rest.

    Args:
        label: int ``[n]``.
        probability: ``[n, class]``.

    Returns:
        One number each, None where it is not defined: no windows, or (all but accuracy) a class is missing.
    """
    if len(label) == 0:
        return dict.fromkeys(METRICS)
    predicted = probability.argmax(axis=1)
    classes = probability.shape[1]
    whole = len(np.unique(label)) == classes
    return {
        "accuracy": float(accuracy_score(label, predicted)),
        "balanced_accuracy": float(balanced_accuracy_score(label, predicted)) if whole else None,
        "macro_f1": float(f1_score(label, predicted, average="macro", labels=range(classes), zero_division=0.0))
        if whole
        else None,
        "auc": auc(label, probability),
        "pr_auc": pr_auc(label, probability),
    }


def calibration_error(label: Ints, probability: Floats, bins: int = 15) -> float | None:
    """Expected calibration error (Guo et al. 2017): how far the probability of the predicted class is from how often it
    is right, in bins of equal width, the mean over windows. None without windows.

    Args:
        label: int ``[n]``.
        probability: ``[n, class]``.
        bins: how many.
    """
    if len(label) == 0:
        return None
    sure, right = probability.max(axis=1).astype(np.float64), probability.argmax(axis=1) == label
    place = np.minimum((sure * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(place, weights=right - sure, minlength=bins)
    return float(np.abs(gaps).sum() / len(label))


def temperature_of(label: Ints, logits: Floats) -> float:
    """By what to divide logits so that their softmax is the most likely; 1 where that is not defined.

    Args:
        label: int ``[n]``.
        logits: ``[n, class]``.

    Returns:
        Between 0.05 and 20: few windows that are all right would have them grow without end.
    """
    if len(label) == 0 or not np.isfinite(logits).all():
        return 1.0
    x, rows = logits.astype(np.float64), np.arange(len(label))

    def loss(scale: float) -> float:
        return -float(log_softmax(x / np.exp(scale), axis=1)[rows, label].mean())

    most = np.log(20.0)
    return float(np.exp(minimize_scalar(loss, bounds=(-most, most), method="bounded", options={"xatol": 1e-4}).x))


def confusion(label: Ints, probability: Floats) -> list[list[int]]:
    """Counts, ``[true][predicted]``."""
    classes = probability.shape[1]
    pairs = label * classes + probability.argmax(axis=1)
    counts: list[list[int]] = np.bincount(pairs, minlength=classes**2).reshape(classes, classes).tolist()
    return counts


def auc_interval(
    label: Ints, probability: Floats, person: npt.NDArray[np.uint64], seed: int, repeats: int = 1000
) -> tuple[float, float] | None:
    """A 95% interval of the AUC over all windows: percentiles of a bootstrap that draws whole people.

    Windows of a person are much alike, so drawing windows would give an interval that is far too narrow.

    Returns:
        (2.5%, 97.5%); None where the AUC is not defined in any draw, and for a single person, of whom nobody can say
        how others differ.
    """
    people, number = np.unique(person, return_inverse=True)
    if len(people) < 2:
        return None
    rows_of = [np.flatnonzero(number == i) for i in range(len(people))]
    rng = np.random.Generator(np.random.Philox(key=seed & (2**64 - 1)))
    areas = []
    for _ in range(repeats):
        drawn = (rng.random(len(people)) * len(people)).astype(np.int64)
        rows = np.concatenate([rows_of[i] for i in drawn])
        if (area := auc(label[rows], probability[rows])) is not None:
            areas.append(area)
    if not areas:
        return None
    low, high = np.percentile(areas, [2.5, 97.5])
    return float(low), float(high)
