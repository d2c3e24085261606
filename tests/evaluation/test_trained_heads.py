"""Selected heads are trained once, whoever needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physio_dist.evaluation import trained_heads
from physio_dist.evaluation.head_training import Heads
from physio_dist.evaluation.trained_heads import train_selected
from physio_dist.evaluation.trials import SEARCHED, Choice, TrialRecord, train
from tests.evaluation.analysis.test_occlusion import made
from tests.evaluation.study_samples import CONFIG, conclude_study


def test_conclude_trains_each_selected_head_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Testing and occlusion analysis share the heads that the outcome hands to the classifier."""
    study = made(tmp_path, [CONFIG])
    records = [TrialRecord(row, row, CONFIG, list(train(study, row, CONFIG))) for row in SEARCHED]
    trainings: list[int] = []

    class Counted(Heads):
        def __init__(self, jobs: Any, *arguments: Any) -> None:
            trainings.append(len(jobs))
            super().__init__(jobs, *arguments)

    monkeypatch.setattr(trained_heads, "Heads", Counted)
    outcome = conclude_study(study, records, lambda _: None)
    assert "occlusion" in outcome.results
    inner = [len(fold.inner) for fold in study.folds]
    assert trainings == inner * len(SEARCHED)
    assert [[len(heads) for heads in of_fold] for of_fold in outcome.fused.heads] == [[n] for n in inner]


def test_train_selected_predicts_alone_and_all_from_the_same_heads(tmp_path: Path) -> None:
    study = made(tmp_path, [CONFIG])
    choices = [Choice({**CONFIG, "modality_dropout": 0.3}, 2, 0.5)] * len(study.folds)
    both, plain = train_selected(study, "fused", choices, ("ecg", "eeg")), train_selected(study, "fused", choices)
    assert all(np.array_equal(a, b) for a, b in zip(both.probability, plain.probability, strict=True))
    assert set(both.ablated) == {"ecg", "eeg"} and not plain.ablated and plain.uncalibrated is None
    assert [p.shape for p in both.ablated["ecg"]] == [(len(fold.test), 2) for fold in study.folds]
