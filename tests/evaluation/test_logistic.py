"""Logistic regression with C selected on validation people."""

from __future__ import annotations

import numpy as np

from physio_dist.evaluation.logistic import fit_logistic
from physio_dist.evaluation.splits import folds_of
from physio_dist.stats.scores import score
from tests.evaluation.study_samples import table_of


def test_fit_logistic_selects_c_on_validation_people_and_imputes_unknown_features() -> None:
    table = table_of(12, windows=8)
    (fold, *_) = folds_of(table, "grouped_kfold", 3, 2, 0)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((len(table.label), 60))
    x[:, 0] += 1.5 * table.label
    x[::5, 0] = np.nan
    x[:, 1] = np.nan
    features = {"ecg": 1e3 * x[:, :2], "eeg": x[:, 2:]}
    fitted = fit_logistic(features, table.label, 2, fold)
    found = score(table.label[fold.test], fitted.probability)
    assert found["auc"] is not None and found["auc"] > 0.7
    # Among 58 features of noise the strongest regularisations win.
    assert fitted.c <= 0.1
    spoilt = {name: values.copy() for name, values in features.items()}
    for values in spoilt.values():
        values[fold.test] = 7e7
    label = table.label.copy()
    label[fold.test] = 1 - label[fold.test]
    other = fit_logistic(spoilt, label, 2, fold)
    assert other.c == fitted.c and not np.allclose(other.probability, fitted.probability)
