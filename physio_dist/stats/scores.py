"""Classification metrics of probabilities. A metric that is not defined is None, never NaN."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, average_precision_score, balanced_accuracy_score, f1_score

from physio_dist.runtime.arrays import FloatArray, Int64Array

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "pr_auc")


def auc(label: Int64Array, probability: FloatArray) -> float | None:
    """Compute the area under the ROC curve: scikit-learn's value, fast enough for every epoch of every model.

    The share of pairs of a positive and a negative window that are in the right order, ties counted half (Hanley and
    McNeil, Radiology 143 (1982) 29-36); with more than two classes the mean over one class against the rest. None where
    a class is missing.

    Args:
        label: ``[n]``, class numbers.
        probability: ``[n, class]``.
    """
    classes = probability.shape[1]
    counts = np.bincount(label, minlength=classes)
    if len(label) == 0 or (counts == 0).any():
        return None
    areas = []
    for c in range(1, classes) if classes == 2 else range(classes):
        positive, n = label == c, int(counts[c])
        negatives = np.sort(probability[~positive, c])
        below = [np.searchsorted(negatives, probability[positive, c], side).sum() for side in ("left", "right")]
        areas.append(sum(below) / (2 * n * (len(label) - n)))
    return float(np.mean(areas))


def pr_auc(label: Int64Array, probability: FloatArray) -> float | None:
    """Compute the average precision of the second of two classes, or the mean over one class against the rest.

    None where a class is missing.
    """
    classes = probability.shape[1]
    if len(np.unique(label)) < classes:
        return None
    positives = range(1, classes) if classes == 2 else range(classes)
    return float(np.mean([average_precision_score(label == c, probability[:, c]) for c in positives]))


def score(label: Int64Array, probability: FloatArray) -> dict[str, float | None]:
    """Compute accuracy, balanced accuracy, macro F1, ROC-AUC, PR-AUC.

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
    complete = len(np.unique(label)) == classes
    return {
        "accuracy": float(accuracy_score(label, predicted)),
        "balanced_accuracy": float(balanced_accuracy_score(label, predicted)) if complete else None,
        "macro_f1": float(f1_score(label, predicted, average="macro", labels=range(classes), zero_division=0.0))
        if complete
        else None,
        "auc": auc(label, probability),
        "pr_auc": pr_auc(label, probability),
    }


def calibration_error(label: Int64Array, probability: FloatArray, bins: int = 15) -> float | None:
    """Compute the expected calibration error (Guo et al., ICML 2017) of the predicted class.

    The difference of mean probability and accuracy in bins of equal width, averaged over windows. None without windows.

    Args:
        label: int ``[n]``.
        probability: ``[n, class]``.
        bins: number of bins.
    """
    if len(label) == 0:
        return None
    confidence, correct = probability.max(axis=1).astype(np.float64), probability.argmax(axis=1) == label
    bin_of = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    gaps = np.bincount(bin_of, weights=correct - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(label))


def fit_temperature(label: Int64Array, logits: FloatArray) -> float:
    """Fit the temperature that maximises the likelihood of logits divided by it; 1 where it is not defined.

    Args:
        label: int ``[n]``.
        logits: ``[n, class]``.

    Returns:
        Between 0.05 and 20: without bounds, windows that are all right would have no maximum.
    """
    if len(label) == 0 or not np.isfinite(logits).all():
        return 1.0
    x, rows = logits.astype(np.float64), np.arange(len(label))

    def loss(scale: float) -> float:
        return -float(log_softmax(x / np.exp(scale), axis=1)[rows, label].mean())

    bound = np.log(20.0)
    return float(np.exp(minimize_scalar(loss, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-4}).x))


def confusion(label: Int64Array, probability: FloatArray) -> list[list[int]]:
    """Count windows, ``[true][predicted]``."""
    classes = probability.shape[1]
    pairs = label * classes + probability.argmax(axis=1)
    counts: list[list[int]] = np.bincount(pairs, minlength=classes**2).reshape(classes, classes).tolist()
    return counts
