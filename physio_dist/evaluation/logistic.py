"""Logistic regression on handcrafted or frozen features, its regularisation selected on validation people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from physio_dist.errors import UserError
from physio_dist.evaluation.splits import Fold
from physio_dist.runtime.arrays import Float64Array, Int64Array
from physio_dist.stats.scores import auc

REGULARISATION = (0.001, 0.01, 0.1, 1.0)
"""Values of C, the inverse strength, among which a logistic regression selects."""


@dataclass(frozen=True)
class LogisticResult:
    """Test probabilities of a fold.

    Attributes:
        probability: float64 ``[test row, class]``.
        c: the C that the validation people selected.
    """

    probability: Float64Array
    c: float


def fit_logistic(
    features: Mapping[str, Float64Array], label: Int64Array, classes: int, fold: Fold,
    strengths: Sequence[float] = REGULARISATION, weights: str | None = None,
) -> LogisticResult:  # fmt: skip
    """Fit a logistic regression on standardised features, with C selected on the fold's validation people.

    Args:
        features: float64 ``[n, f]`` for each signal, NaN where unknown (the training rows' median stands in for it).
        label: int ``[n]``.
        classes: number of classes.
        fold: its inner splits select C; the final model trains on all people that are not tested.
        strengths: values of C to select from.
        weights: class weights: None weighs windows equally, ``balanced`` classes.

    Raises:
        UserError: a class is missing among the training people.
    """
    x = np.concatenate(list(features.values()), axis=1)
    areas = []
    for c in strengths:
        scores = [
            auc(label[valid], _fit(x[train], label[train], c, weights).predict_proba(x[valid]))
            for train, valid in fold.inner
        ]
        areas.append(np.mean([area for area in scores if area is not None] or [0.0]))
    best = strengths[int(np.argmax(areas))]
    model = _fit(x[fold.train], label[fold.train], best, weights)
    if len(model.classes_) != classes:
        raise UserError(f"fold {fold.name}: a class is missing among those who are left to train on")
    return LogisticResult(model.predict_proba(x[fold.test]), best)


def _fit(x: Float64Array, label: Int64Array, c: float, weights: str | None) -> Pipeline:
    return make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler(),
        LogisticRegression(C=c, max_iter=2000, class_weight=weights),
    ).fit(x, label)  # fmt: skip
