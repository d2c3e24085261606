"""Files of a sweep's directory: what is understood, and which message a broken one gets."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from physio_dist.errors import DataError, UserError
from physio_dist.report.page import render
from physio_dist.report.sweep_data import load_sweep, parse_predictions, parse_trials
from tests.report.report_samples import reader
from tests.report.sweep_samples import predictions_file, predictions_of, results_of, trial_lines, write_sweep

CLASSES = ("rest", "task")


def results(**changes):
    return results_of(predictions_of(), CLASSES) | changes


def with_row(name, **changes):
    document = results()
    for row in document["rows"]:
        if row["name"] == name:
            row |= changes
    return json.dumps(document).encode()


def test_load_sweep_returns_all_files(tmp_path):
    document = results()
    sweep = load_sweep(reader(write_sweep(tmp_path)))
    assert [row.name for row in sweep.results.rows] == ["majority", "untrained", "handmade", "ecg", "eeg", "fused"]
    fused, told = sweep.row("fused"), document["rows"][-1]
    assert fused is not None
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auc", "pr_auc"):
        assert getattr(fused, name) == told[name]
        assert getattr(fused.spread, name) == told["spread"][name]
        assert getattr(fused.per_fold[2], name) == told["per_fold"][2][name]
    assert list(fused.auc_ci) == told["auc_ci"]
    assert fused.modalities == ["ecg", "eeg"]
    assert fused.confusion == told["confusion"]
    assert [fold.config for fold in fused.per_fold] == [fold["config"] for fold in told["per_fold"]]
    assert [fold.people for fold in fused.per_fold] == [3, 3, 3, 3]
    assert [fold.epoch for fold in fused.per_fold] == [5, 6, 7, 8]
    assert sweep.classes == list(CLASSES)
    assert sweep.simulated() == [False]
    assert sweep.results.permuted is None
    tensors = predictions_of()
    np.testing.assert_array_equal(sweep.predictions.person, tensors["person"])
    np.testing.assert_array_equal(sweep.predictions.fold, tensors["fold"])
    np.testing.assert_array_equal(sweep.predictions.probability["ecg"], tensors["probability.ecg"].astype(float))
    assert len(sweep.trials) == 80
    line, trial = trial_lines()[0], sweep.trials[0]
    assert (trial.row, trial.config, trial.val_auc) == (line["row"], line["config"], line["val_auc"])
    assert (trial.epochs, trial.stopped, trial.seconds) == (line["epochs"], line["stopped"], line["seconds"])
    assert trial.history[3] == (4.0, line["history"][3][1])


def test_load_sweep_reads_null_as_nan(tmp_path):
    raw = with_row("ecg", auc=None, macro_f1=float("nan"), auc_ci=None, spread={"auc": None})
    row = load_sweep(reader(write_sweep(tmp_path, results=raw))).row("ecg")
    assert math.isnan(row.auc) and math.isnan(row.macro_f1)
    assert row.auc_ci is None
    assert math.isnan(row.spread.auc) and math.isnan(row.spread.accuracy)


def test_bound_follows_modalities(tmp_path):
    sweep = load_sweep(reader(write_sweep(tmp_path, simulated=True)))
    found = {row.name: getattr(sweep.bound(row), "name", None) for row in sweep.results.rows}
    assert found == {
        "majority": None, "untrained": "bound_fused", "handmade": "bound_fused", "ecg": "bound_ecg",
        "eeg": "bound_eeg", "fused": "bound_fused", "bound_ecg": None, "bound_eeg": None, "bound_fused": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"results": b"{"}, r"results\.json is not JSON"),
        ({"results": b"[]"}, r"results\.json: the document is \[\]"),
        ({"results": b'{"rows": []}'}, r"results\.json: rows is empty"),
        ({"results": b'{"rows": [{}]}'}, r"results\.json: rows\[0\] has no 'name'"),
        ({"results": b'{"rows": [{"name": "a"}, {"name": "a"}]}'}, r"results\.json: two rows .*a, a"),
        ({"results": with_row("ecg", auc="good")}, r"results\.json: rows\[3\]\.auc is 'good'"),
        ({"results": with_row("ecg", auc=True)}, r"rows\[3\]\.auc is True"),
        ({"results": with_row("ecg", auc_ci=0.5)}, r"rows\[3\]\.auc_ci is 0\.5"),
        ({"results": with_row("ecg", auc_ci=[0.5])}, r"rows\[3\]\.auc_ci"),
        ({"results": with_row("ecg", confusion=[[1, 2], [3]])}, r"row 'ecg': confusion"),
        ({"results": with_row("ecg", confusion=[[1, 2, 3]] * 3)}, r"row 'ecg': confusion.* 2 classes"),
        ({"results": with_row("ecg", confusion=[[1, -2], [3, 4]])}, r"row 'ecg': confusion"),
        ({"results": with_row("ecg", confusion=[[1, 2.5], [3, 4]])}, r"rows\[3\]\.confusion"),
        ({"results": with_row("ecg", per_fold={"0": 1})}, r"rows\[3\]\.per_fold .* JSON list"),
        ({"results": with_row("ecg", per_fold=[1])}, r"rows\[3\]\.per_fold\[0\]"),
        ({"results": with_row("ecg", per_fold=[{"fold": "7", "auc": "x"}])}, r"rows\[3\]\.per_fold\[0\]\.auc"),
        ({"results": with_row("ecg", spread=[1])}, r"rows\[3\]\.spread .* JSON object"),
        ({"results": json.dumps(results(folds=4)).encode()}, r"results\.json: folds is 4, not a JSON list"),
        ({"results": json.dumps(results(permuted={"n": 2})).encode()}, r"results\.json: permuted has no 'auc'"),
        ({"results": json.dumps(results(permuted={"n": 1, "auc": ["x"]})).encode()}, r"permuted\.auc\[0\] is 'x'"),
        ({"predictions": b"\0" * 40}, r"predictions\.safetensors cannot be read"),
        ({"predictions": b""}, r"predictions\.safetensors cannot be read"),
        ({"trials": b"not json\n"}, r"trials\.jsonl, line 1"),
        ({"config": b"a: [1"}, r"config\.yaml"),
        ({"data": b"{"}, r"data\.json"),
    ],
)
def test_render_names_a_damaged_file_of_a_sweep(tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        render(reader(write_sweep(tmp_path, **changes)))


def broken_tensors(fault):
    tensors = predictions_of()
    if fault == "missing":
        del tensors["label"]
    if fault == "no rows":
        tensors = {name: value for name, value in tensors.items() if not name.startswith("probability.")}
    if fault == "length":
        tensors["person"] = tensors["person"][:-1].copy()
    if fault == "short row":
        tensors["probability.eeg"] = tensors["probability.eeg"][:-1].copy()
    if fault == "classes":
        tensors["probability.eeg"] = np.full((288, 3), 1 / 3, np.float32)
    if fault == "label":
        tensors["label"][5] = 2
    if fault == "negative label":
        tensors["label"][5] = -1
    if fault == "float label":
        tensors["label"] = tensors["label"].astype(np.float32)
    if fault == "fold":
        tensors["fold"][5] = 4
    if fault == "sum":
        tensors["probability.eeg"][7] *= 1.1
    if fault == "negative":
        tensors["probability.eeg"][7] = [-0.5, 1.5]
    return predictions_file(tensors, CLASSES, 4)


def test_parse_predictions_names_a_missing_tensor():
    with pytest.raises(UserError, match=r"predictions\.safetensors.*label"):
        parse_predictions(broken_tensors("missing"))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no rows", "shapes disagree or windows are missing"),
        ("length", "shapes disagree"),
        ("short row", r"288 windows and 2 classes, but probabilities .*\[287, 2\]"),
        ("classes", r"\[288, 3\]"),
        ("label", r"'label' has values that are not in 0\.\.1"),
        ("negative label", "'label'"),
        ("float label", "'label'"),
        ("fold", r"'fold' has values that are not in 0\.\.3"),
        ("sum", "'eeg' are negative or do not add up to 1"),
        ("negative", "'eeg' are negative"),
    ],
)
def test_parse_predictions_raises_data_error_on_contradictions(fault, words):
    with pytest.raises(DataError, match=rf"predictions\.safetensors.*{words}"):
        parse_predictions(broken_tensors(fault))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"windows": 300}, "288 windows .* 300"),
        ({"people": 13}, "12 people .* 13"),
        ({"classes": ["a", "b"]}, "has the classes"),
    ],
)
def test_load_sweep_raises_data_error_on_predictions_of_another_sweep(tmp_path, changes, words):
    raw = json.dumps(results(**changes)).encode()
    with pytest.raises(DataError, match=rf"predictions\.safetensors .*{words}"):
        render(reader(write_sweep(tmp_path, results=raw)))


def test_parse_predictions_leaves_out_rows_that_are_not_finite():
    tensors = predictions_of()
    tensors["probability.handmade"][3, 0] = np.nan
    found, _ = parse_predictions(predictions_file(tensors, CLASSES, 4))
    assert found.broken == ["handmade"]
    assert "handmade" not in found.probability and "fused" in found.probability


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"row": "ecg"}',
        '{"row": "ecg", "config": {}, "val_auc": "a"}',
        '{"row": "ecg", "config": {}, "history": [[1]]}',
        '{"row": "ecg", "config": {}, "history": [[1, "a"]]}',
        '{"row": "ecg", "config": {}, "history": 3}',
    ],
)
def test_parse_trials_names_a_damaged_line(line):
    good = '{"row": "ecg", "config": {}, "val_auc": 0.5}'
    with pytest.raises(UserError, match=r"trials\.jsonl, line 2"):
        parse_trials(f"{good}\n{line}\n{good}\n".encode())


def test_parse_trials_leaves_out_an_unfinished_last_line():
    trials, unfinished = parse_trials(b'{"row": "ecg", "config": {}, "val_auc": null}\n{"row": "e')
    assert unfinished
    assert len(trials) == 1 and math.isnan(trials[0].val_auc)
    assert parse_trials(None) == ([], False)
