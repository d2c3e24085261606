"""Training of a configuration, its selection, and what must not be seen in it."""

from __future__ import annotations

import pickle
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from physio_dist.config import TuneConfig
from physio_dist.errors import UserError
from physio_dist.evaluation.controls import permuted_label_aucs
from physio_dist.evaluation.head_training import Heads
from physio_dist.evaluation.label_table import LabelTable
from physio_dist.evaluation.search_space import sample_configs
from physio_dist.evaluation.splits import Fold
from physio_dist.evaluation.trained_heads import train_selected
from physio_dist.evaluation.trials import (
    SEARCHED,
    Choice,
    EncoderRole,
    InputKey,
    Study,
    TrialRecord,
    select,
    train,
)
from physio_dist.stats.scores import auc
from tests.evaluation.study_samples import CONFIG, changed, features_of, job_of, study_of, table_of, with_label

TABLE = table_of(people=12, recordings=2, windows=8)


def known(**more: Any) -> Study:
    """ECG tells the class a little, EEG more; they are independent."""
    return study_of(TABLE, features_of(TABLE.label, 0.8, 3, 1, 1e4), features_of(TABLE.label, 1.2, 3, 2, 1e-4), **more)


def test_every_epoch_tells_each_fold_and_their_mean() -> None:
    study = known()
    seen = list(train(study, "fused", CONFIG))
    assert [one["epoch"] for one in seen] == [1, 2, 3, 4, 5, 6]
    for one in seen:
        assert set(one) == {"epoch", "val_auc", "fold_0", "fold_1", "fold_2"}
        assert one["val_auc"] == pytest.approx(np.mean([one[f"fold_{i}"] for i in range(3)]))
    assert seen == list(train(pickle.loads(pickle.dumps(study)), "fused", CONFIG))


def test_one_fold_alone_is_what_it_is_among_all() -> None:
    study = study_of(TABLE, features_of(TABLE.label, 0.8, 3, 1), features_of(TABLE.label, 1.2, 3, 2), epochs=3)
    for fold in ("0", "2"):
        together = [line[f"fold_{fold}"] for line in train(study, "fused", CONFIG)]
        alone = list(train(study, "fused", CONFIG, fold))
        assert [set(line) for line in alone] == [{"epoch", "val_auc", f"fold_{fold}"}] * 3
        assert [line["val_auc"] for line in alone] == pytest.approx(together, abs=0.005)


def test_a_fold_is_the_mean_auc_of_heads_trained_one_by_one() -> None:
    study = known()
    seen = list(train(study, "fused", CONFIG))[-1]
    areas = []
    for i, (rows, valid) in enumerate(study.folds[1].inner):
        inputs = {
            "ecg": study.inputs[InputKey("ecg", "ecg-a", "mean")],
            "eeg": study.inputs[InputKey("eeg", "eeg-a", "mean")],
        }
        heads = Heads([job_of(inputs, TABLE.label, rows, f"0/fused/1/{i}")], 2, CONFIG)
        for _ in range(6):
            heads.epoch()
        areas.append(auc(TABLE.label[valid], heads.probability([valid])[0]))
    assert seen["fold_1"] == pytest.approx(np.mean(areas), abs=1e-3)  # type: ignore[arg-type]


def best(study: Study, row: str) -> float:
    return max(one["val_auc"] for one in train(study, row, CONFIG))


def test_rows_are_given_what_they_are_called_after() -> None:
    study = study_of(TABLE, features_of(TABLE.label, 1.2, 2, 1), features_of(TABLE.label, 1.6, 2, 2), epochs=25)
    fused, ecg, eeg, untrained = (best(study, row) for row in ("fused", "ecg", "eeg", "untrained"))
    assert fused > eeg > ecg > untrained + 0.1 and abs(untrained - 0.5) < 0.15
    # Whatever is in the other modality has no part in a single one.
    spoilt = {
        name: x if name.encoder == ("ecg", "ecg-a") else np.full_like(x, np.nan) for name, x in study.inputs.items()
    }
    assert list(train(replace(study, inputs=spoilt), "ecg", CONFIG)) == list(train(study, "ecg", CONFIG))


def test_encoders_of_folds_are_kept_apart() -> None:
    study = known()
    noise = features_of(TABLE.label, 0.0, 3, 77)
    mixed = changed(
        study,
        encoders={**study.encoders, EncoderRole("eeg"): ("eeg-a", "eeg-b", "eeg-a")},
        inputs={**study.inputs, InputKey("eeg", "eeg-b", "mean"): noise},
    )
    before, after = (list(train(one, "eeg", CONFIG))[-1] for one in (study, mixed))
    assert before["fold_0"] == pytest.approx(after["fold_0"], abs=1e-3)
    assert before["fold_2"] == pytest.approx(after["fold_2"], abs=1e-3)
    assert after["fold_1"] < before["fold_1"] - 0.1


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_a_selection_reads_nothing_of_its_test_people(fold: int) -> None:
    study = known()
    test = study.folds[fold].test
    spoilt = {name: x.copy() for name, x in study.inputs.items()}
    for x in spoilt.values():
        x[test] = np.nan
    label = TABLE.label.copy()
    label[test] = 1 - label[test]
    poisoned = with_label(changed(study, inputs=spoilt, folds=(study.folds[fold],)), label)
    clean = replace(study, folds=(study.folds[fold],))
    name = f"fold_{study.folds[fold].name}"
    histories = [{row: list(train(one, row, CONFIG)) for row in SEARCHED} for one in (clean, poisoned)]
    assert histories[0] == histories[1]
    assert all(np.isfinite(one[name]) for history in histories[1].values() for one in history)


def test_a_head_reads_nothing_of_its_validation_people() -> None:
    study = known()
    rows, valid = study.folds[0].inner[0]
    only = changed(study, folds=(replace(study.folds[0], inner=((rows, valid),)),))
    spoilt = {name: x.copy() for name, x in study.inputs.items()}
    for x in spoilt.values():
        x[valid] = 1e6
    label = TABLE.label.copy()
    label[valid] = 1 - label[valid]
    other = with_label(changed(only, inputs=spoilt), label)
    choice = [Choice(CONFIG, 4, 0.5)]
    clean, changed_ = (train_selected(each, "fused", choice).probability[0] for each in (only, other))
    assert np.array_equal(clean, changed_)


def record(row: str, areas: dict[str, list[float]], trial: str = "t", **more: Any) -> TrialRecord:
    epochs = len(next(iter(areas.values())))
    last = more.pop("last", {})
    return TrialRecord(
        trial, row, {**CONFIG, **more},
        [{"epoch": e + 1, "val_auc": 0.5, **{f"fold_{f}": a[e] for f, a in areas.items()}} for e in range(epochs)],
        last,
    )  # fmt: skip


def test_each_fold_selects_for_itself() -> None:
    nan = float("nan")
    records = [
        record("fused", {"0": [0.5, 0.7, 0.6], "1": [0.9, 0.5, 0.5], "2": [nan, 0.2, nan]}, width=8),
        record("fused", {"0": [0.6, 0.6, 0.8], "1": [0.5, 0.5, 0.5], "2": [0.1, 0.1, nan]}, width=16),
        record("ecg", {"0": [1.0] * 3, "1": [1.0] * 3, "2": [1.0] * 3}, width=32),
    ]
    for some in (records, records[::-1]):
        chosen = select(known(), "fused", some)
        found = [(one.config["width"], one.epoch, one.val_auc) for one in chosen]
        assert found == [(16, 3, 0.8), (8, 1, 0.9), (8, 2, 0.2)]


def test_epochs_after_a_fold_was_stopped_do_not_count() -> None:
    areas = {"0": [0.5, 0.6, 0.9], "1": [0.5, 0.6, 0.9], "2": [0.5, 0.6, 0.9]}
    chosen = select(known(), "fused", [record("fused", areas, last={"0": 2, "1": 1})])
    assert [one.epoch for one in chosen] == [2, 1, 3]


def test_of_equals_the_shorter_then_the_first_by_name_wins_in_any_order() -> None:
    same = {"0": [0.5, 0.7], "1": [0.7, 0.7], "2": [0.7, 0.5]}
    records = [
        record("fused", same, trial="b", width=64), record("fused", same, trial="a", width=32),
        record("fused", {"0": [0.7, 0.5], "1": [0.5, 0.7], "2": [0.5, 0.5]}, width=8),
    ]  # fmt: skip
    for some in (records, records[::-1], [records[1], records[2], records[0]]):
        chosen = select(known(), "fused", some)
        assert [(one.config["width"], one.epoch) for one in chosen] == [(8, 1), (32, 1), (32, 1)]


def test_an_ensemble_is_the_best_configurations_each_at_its_best_epoch() -> None:
    records = [
        record("fused", {"0": [0.5, 0.7, 0.6], "1": [0.9, 0.5, 0.5], "2": [0.3, 0.2, 0.3]}, width=8),
        record("fused", {"0": [0.6, 0.6, 0.8], "1": [0.5, 0.5, 0.5], "2": [0.3, 0.1, 0.1]}, width=16),
        record("fused", {"0": [0.1, 0.2, 0.9], "1": [0.6, 0.7, 0.5], "2": [0.2, 0.2, 0.2]}, width=32, last={"0": 2}),
    ]
    study = known()
    study.options.tune.ensemble_size = 2
    for some in (records, records[::-1]):
        chosen = select(study, "fused", some)
        found = [[(one.config["width"], one.epoch, one.val_auc) for one in choice.members] for choice in chosen]
        assert found == [[(16, 3, 0.8), (8, 2, 0.7)], [(8, 1, 0.9), (32, 2, 0.7)], [(16, 1, 0.3), (8, 1, 0.3)]]
        assert [choice.config["width"] for choice in chosen] == [16, 8, 16]


def test_the_configurations_of_an_ensemble_have_an_equal_say() -> None:
    study, other = known(), Choice({**CONFIG, "width": 16, "lr": 0.003, "depth": 2}, 5, 0.4)
    alone = [train_selected(study, "fused", [each] * 3).probability for each in (Choice(CONFIG, 2, 0.5), other)]
    both = train_selected(study, "fused", [Choice(CONFIG, 2, 0.5, (other,))] * 3).probability
    for first, second, mean in zip(*alone, both, strict=True):
        assert np.abs(first - second).max() > 0.01
        np.testing.assert_allclose(mean, (first + second) / 2, atol=1e-6)


def test_a_row_without_a_finished_epoch_is_told() -> None:
    with pytest.raises(UserError, match="'eeg' finished an epoch that counts for fold 0"):
        select(known(), "eeg", [record("fused", {"0": [0.5]}), TrialRecord("t", "eeg", CONFIG, [])])
    with pytest.raises(UserError, match="fold 1"):
        select(known(), "eeg", [record("eeg", {"0": [0.5], "1": [float("nan")], "2": [0.5]})])


def test_a_prediction_is_the_mean_of_the_inner_heads_at_the_selected_epoch() -> None:
    study = known()
    other = {**CONFIG, "width": 16, "lr": 0.003}
    choices = [Choice(CONFIG, 2, 0.5), Choice(other, 5, 0.5), Choice(CONFIG, 3, 0.5)]
    found = train_selected(study, "fused", choices).probability
    for number, (fold, choice) in enumerate(zip(study.folds, choices, strict=True)):
        each = []
        for i, (rows, _) in enumerate(fold.inner):
            inputs = {
                "ecg": study.inputs[InputKey("ecg", "ecg-a", "mean")],
                "eeg": study.inputs[InputKey("eeg", "eeg-a", "mean")],
            }
            job = job_of(inputs, TABLE.label, rows, f"0/fused/{number}/{i}")
            heads = Heads([job], 2, choice.config)
            for _ in range(choice.epoch):
                heads.epoch()
            each.append(heads.probability([fold.test])[0])
        assert found[number].shape == (len(fold.test), 2) and found[number].dtype == np.float32
        np.testing.assert_allclose(found[number], np.mean(each, axis=0), atol=2e-5)


def uneven(table: LabelTable) -> LabelTable:
    """The table without some windows, so that people and recordings differ in how many they have."""
    rng = np.random.default_rng(3)
    share = rng.uniform(0.2, 1.0, 24)[table.recording]
    rows = np.flatnonzero(rng.random(len(share)) < share)
    return replace(
        table, keys=[table.keys[i] for i in rows], sample=table.sample[rows], person=table.person[rows],
        recording=table.recording[rows], label=table.label[rows], split=table.split[rows],
    )  # fmt: skip


def test_the_person_alone_says_nothing_about_permuted_labels() -> None:
    """Features that tell the person and nothing else, in folds of whole people: chance."""
    table = uneven(TABLE)
    number = np.searchsorted(np.unique(table.person), table.person)
    one_hot = np.eye(12, dtype=np.float32)[number]
    study = study_of(table, one_hot, one_hot, folds=4)
    areas = permuted_label_aucs(study, [Choice(CONFIG, 6, 0.5)] * 4, 16)
    assert len(areas) == 16 and len(set(areas)) > 8
    assert 0.38 < np.mean(areas) < 0.58


def test_the_control_finds_a_leak() -> None:
    """Features that tell the recording, in folds that do not keep it whole: permuted labels are known by heart."""
    one_hot = np.eye(24, dtype=np.float32)[TABLE.recording]
    study = study_of(TABLE, one_hot, one_hot)
    rows = np.arange(len(TABLE.label))
    parts = [rows[rows % 4 == i] for i in range(4)]
    inner = tuple((np.sort(np.r_[parts[2], parts[i]]), parts[4 - i]) for i in (1, 3))
    leaky = Fold("0", parts[0], inner)
    study = changed(study, folds=(leaky,))
    areas = permuted_label_aucs(study, [Choice({**CONFIG, "dropout": 0.0, "lr": 0.03}, 30, 0.5)], 5)
    assert min(areas) > 0.85
    # In folds of whole people the same features know nothing.
    whole = study_of(TABLE, one_hot, one_hot)
    assert np.mean(permuted_label_aucs(whole, [Choice({**CONFIG, "dropout": 0.0, "lr": 0.03}, 30, 0.5)] * 3, 8)) < 0.6


def test_the_control_does_not_depend_on_how_many_there_are() -> None:
    study, choices = known(), [Choice(CONFIG, 3, 0.5)] * 3
    many = permuted_label_aucs(study, choices, 40)
    np.testing.assert_allclose(permuted_label_aucs(study, choices, 3), many[:3], atol=2e-3)
    assert abs(np.mean(many) - 0.5) < 0.12 and len(many) == 40


def test_candidates_spread_evenly_over_what_there_is_to_choose_from() -> None:
    options = TuneConfig()
    options.tune.trials = 24
    found = sample_configs(options)
    assert len(found) == 24 and found == sample_configs(options)
    for name, times in (("pooling", 6), ("depth", 8), ("width", 8), ("dropout", 8), ("label_smoothing", 12)):
        values = [one[name] for one in found]
        counts = {value: values.count(value) for value in set(values)}
        assert counts == dict.fromkeys(getattr(options.search, name), times)
    for name in ("lr", "weight_decay"):
        low, high = getattr(options.search, name)
        place = np.sort([np.log(one[name] / low) / np.log(high / low) for one in found])
        assert place.min() >= 0 and place.max() <= 1
        # One in each of 24 equal parts of the logarithmic axis.
        assert (np.floor(place * 24 + 1e-2 * (np.arange(24) + 0.5 - place * 24)) == np.arange(24)).all()
    options.run.seed = 1
    assert sample_configs(options) != found
    assert any(a["pooling"] != b["pooling"] for a, b in pairwise(found))


def test_what_was_not_there_to_choose_once_stands_in_no_configuration_unless_it_is_now() -> None:
    """So the trials of a sweep that was begun before go on."""
    options = TuneConfig()
    options.tune.trials = 8
    before = sample_configs(options)
    assert not {"head", "modality_dropout", "class_weight"} & set(before[0])
    options.search.head, options.search.modality_dropout = ["concat", "late"], [0.5]
    after = sample_configs(options)
    assert [one.pop("head") for one in after].count("late") == 4
    assert {one.pop("modality_dropout") for one in after} == {0.5}
    assert after == before


def test_a_single_value_is_that_value() -> None:
    options = TuneConfig()
    options.tune.trials = 3
    options.search.lr = [0.01, 0.01]
    options.search.depth = [2]
    assert {(one["lr"], one["depth"]) for one in sample_configs(options)} == {(0.01, 2)}
