"""The row with both encoders trained end to end."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from physio_dist.config import TuneConfig
from physio_dist.evaluation.trials import SEARCHED, Study, TrialRecord, train
from tests.evaluation.study_samples import CONFIG, conclude_study, prepare_study, publish_set, waves
from tests.evaluation.test_study import export, quiet, set_encoders

pytestmark = pytest.mark.integration

PEOPLE, WINDOWS, FOLDS = 8, 3, 2


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Arithmetic is loud in both signals; the EEG is missing in some windows."""
    folder = tmp_path_factory.mktemp("finetune")
    facts = [
        {"person": f"p{person}", "record": f"p{person}_{task}", "source": "built", "labels": {"task": task}}
        for person in range(PEOPLE) for task in ("rest", "arithmetic") for _ in range(WINDOWS)
    ]  # fmt: skip
    loud = np.array([one["labels"]["task"] == "arithmetic" for one in facts])[:, None, None]
    valid = np.ones((len(facts), 2), dtype=bool)
    valid[::9] = False
    signals = {
        signal: ((waves(len(facts), seed=seed) / np.where(loud, 1, 4)).astype(np.int16), channels, 1.0)
        for signal, channels, seed in (("ecg", ("I", "II"), 1), ("eeg", ("C3", "C4"), 2))
    }
    publish_set(str(folder / "set"), facts, signals, valid={"eeg": valid})
    options = TuneConfig()
    options.tune.data, options.tune.task = str(folder / "set"), "eegmat"
    for number, signal in enumerate(signals):
        set_encoders(options, **{signal: export(str(folder / signal), signal, number)})
    options.tune.folds, options.tune.val_folds, options.tune.max_epochs = FOLDS, 2, 1
    options.tune.finetune, options.tune.finetune_lr = True, 1e-3
    options.search.pooling = ["mean"]
    return prepare_study(options, str(folder / "features"), quiet)


def concluded(study: Study) -> tuple[dict[str, object], bytes]:
    records = [TrialRecord(row, row, CONFIG, list(train(study, row, CONFIG))) for row in SEARCHED]
    outcome = conclude_study(study, records, quiet)
    return next(row for row in outcome.results["rows"] if row["name"] == "finetuned"), outcome.predictions


def test_it_learns_is_the_same_again_and_reads_nothing_of_its_test_people(study: Study) -> None:
    row, predictions = concluded(study)
    assert row["modalities"] == ["ecg", "eeg"] and row["auc"] > 0.9
    assert [1 <= fold["epoch"] <= 5 and fold["config"] is None for fold in row["per_fold"]] == [True] * FOLDS
    assert any(note.startswith("Row finetuned: ") for note in study.notes)
    assert concluded(study)[1] == predictions
    label = study.table.label.copy()
    label[study.folds[0].test] = 1 - label[study.folds[0].test]
    turned, _ = concluded(replace(study, table=replace(study.table, label=label)))
    assert turned["per_fold"][0]["auc"] == pytest.approx(1 - row["per_fold"][0]["auc"], abs=1e-5)
    assert turned["per_fold"][0]["epoch"] == row["per_fold"][0]["epoch"]
