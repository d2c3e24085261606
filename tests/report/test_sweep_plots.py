"""What the drawings of a sweep contain, and where it stands."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from physio_dist.report import components, sweep_data, sweep_search
from physio_dist.report import sweep_plots as plots
from physio_dist.report.components import style
from physio_dist.report.sweep_data import parse_predictions, parse_trials
from physio_dist.report.sweep_search import chosen_of
from physio_dist.runs.sweep_results import FoldResult, ResultRow
from tests.report.report_samples import texts
from tests.report.sweep_samples import configs_of, predictions_file, predictions_of, trial_lines


@pytest.fixture(autouse=True)
def _as_svg(monkeypatch):
    monkeypatch.setattr(components, "SVG_LIMIT_BYTES", 10_000_000)


def trials_of(count=20, row="fused"):
    raw = "".join(json.dumps(line) + "\n" for line in trial_lines(count, (row,))).encode()
    return parse_trials(raw)[0]


def fused_row(configs) -> ResultRow:
    folds = [FoldResult(str(i), 3, 72, config=config, epoch=5) for i, config in enumerate(configs)]
    return ResultRow("fused", ["ecg", "eeg"], per_fold=folds)


def test_forest_names_rows_values_and_intervals():
    lines = [
        plots.Interval("eeg", 0.71, (0.66, 0.75), [0.7, math.nan], 0.8),
        plots.Interval("fused", 0.834, (0.79, 0.871), [], math.nan),
        plots.Interval("majority", math.nan, None, [], math.nan),
    ]
    with style():
        found = texts(plots.forest(lines, 0.5, "alt"))
    for text in ("EEG alone", "0.710", "0.660–0.750", "Fused ECG + EEG", "0.834", "0.790–0.871", "Majority class", "–"):
        assert text in found
    assert "chance" in found


def test_roc_panel_names_curves_by_area():
    line = np.array([0.0, 1.0])
    curves = [plots.Curve("ecg", line, line, 0.61), plots.Curve("bound_ecg", line, line, 0.93),
              plots.Curve("fused", line, line, 0.87), plots.Curve("eeg", line, line, math.nan)]  # fmt: skip
    with style():
        found = texts(plots.roc_panel("ROC", curves, "alt"))
    named = [text for text in found if text in ("0.930 best: ECG", "0.870 fused", "0.610 ECG", "– EEG")]
    assert named == ["0.930 best: ECG", "0.870 fused", "0.610 ECG", "– EEG"]
    with style():
        assert "chance 0.250" in texts(plots.recall_panel("PR", curves, 0.25, "alt"))


@pytest.mark.parametrize("classes", [2, 3, 5, 9])
def test_confusions_show_shares_and_counts(classes):
    table = np.ones((classes, classes), np.int64)
    table[0, :2] = [30, 11 - classes]
    table[-1] = 0
    names = [f"class {number}" for number in range(classes - 1)] + ["a name that is far too long"]
    with style():
        found = texts(plots.confusions([("ecg", table), ("fused", table)], names, "alt"))
    share = 30 / (30 + 11 - classes + (classes - 2))
    assert found.count(f"{100 * share:.0f} %") == 2
    assert found.count("30") == 2
    assert found.count("–") == 2 * classes, "a class without windows has no shares"
    assert "ECG alone" in found and "Fused ECG + EEG" in found
    assert "a name that i…" in found


def rows_of(ecg, eeg, fused):
    return {"ecg": np.array(ecg), "eeg": np.array(eeg), "fused": np.array(fused)}


def test_people_panel_sorts_by_gain():
    rows = rows_of([0.3, 0.9, 0.6, 0.7], [0.4, 0.5, np.nan, 0.7], [0.5, 0.7, 0.9, 0.7])
    assert plots.best_single(rows).tolist() == [0.4, 0.9, 0.6, 0.7]
    with style():
        found = texts(plots.people_panel("Title", ["p0", "p1", "p2", "p3"], rows, 0.5, "alt"))
    assert [text for text in found if text.startswith("p")] == ["p1", "p3", "p0", "p2"]
    assert "fused not better: 2" in found
    assert "fused better: 2 of 4" in found


def test_people_panel_where_all_or_none_gain():
    with style():
        found = texts(plots.people_panel("T", ["a"], rows_of([0.5], [0.6], [0.7]), 0.5, "alt"))
        assert "fused better: 1 of 1" in found and not any("not better" in text for text in found)
        found = texts(plots.people_panel("T", ["a"], rows_of([0.5], [0.6], [0.6]), 0.5, "alt"))
        assert "fused not better: 1" in found and not any("fused better" in text for text in found)


def test_people_panel_leaves_out_many_names():
    n = plots.MOST_NAMES + 1
    rows = rows_of([0.5] * n, [0.6] * n, [0.7] * n)
    with style():
        found = texts(plots.people_panel("T", [f"p{i}" for i in range(n)], rows, 0.5, "alt"))
    assert not any(text.startswith("p") for text in found)
    assert f"{n} people, by what fusion gains" in found


@pytest.mark.parametrize(("n", "observed"), [(1, 0.7), (20, 0.3), (200, 0.9), (5, math.nan)])
def test_permuted_strip_shows_the_observed_value(n, observed):
    values = np.linspace(0.45, 0.55, n)
    with style():
        found = texts(plots.permuted_strip(values, observed, "alt"))
    assert ("observed 0.900" in found) == (observed == 0.9)
    assert any(text.startswith("observed") for text in found) == math.isfinite(observed)


def test_parallel_names_options_and_selections():
    trials = trials_of()
    best = max(trials, key=lambda trial: trial.val_auc)
    chosen = chosen_of(fused_row([best.config] * 3))
    with style():
        found = texts(sweep_search.parallel(trials, chosen, "alt"))
    for text in ("pooling", "width", "dropout", "mean", "channels mean std", "32", "0.5", "all folds"):
        assert text in found


def test_selections_of_labels_configurations_by_folds():
    one, two, three = configs_of(3)
    assert [label for label, _ in chosen_of(fused_row([one]))] == ["chosen"]
    assert [label for label, _ in chosen_of(fused_row([one, one]))] == ["all folds"]
    assert chosen_of(fused_row([one, two, one, three])) == [("folds 0, 2", one), ("fold 1", two), ("fold 3", three)]
    assert [label for label, _ in chosen_of(fused_row([one, one, one, two]))] == ["3 folds", "fold 3"]
    assert chosen_of(fused_row([None])) == [] and chosen_of(None) == []


def test_axis_heights_follow_values():
    configs = [{"lr": 0.001}, {"lr": 0.01}, {"lr": 0.1}]
    np.testing.assert_allclose(sweep_search._axis("lr", configs).place, [0, 0.5, 1])
    configs = [{"width": 128}, {"width": 32}, {"width": 64}, {"width": 32}]
    axis = sweep_search._axis("width", configs)
    assert axis.place[1] < axis.place[3] < axis.place[2] < axis.place[0]
    assert [mark for _, mark in axis.marks] == ["32", "64", "128"]
    axis = sweep_search._axis("pooling", [{"pooling": "mean"}, {}, {"pooling": 3}])
    assert math.isnan(axis.place[1]) and axis.place[2] < axis.place[0]
    assert [mark for _, mark in axis.marks] == ["3", "mean"]


@pytest.mark.parametrize("change", ["one trial", "same value", "untried choice", "bare", "zero rate"])
def test_search_plots_draw_degenerate_trials(change):
    trials = trials_of(1 if change == "one trial" else 6)
    chosen = [("chosen", trials[0].config)]
    if change == "same value":
        trials = [trial.__class__(**{**trial.__dict__, "val_auc": 0.7}) for trial in trials]
    if change == "untried choice":
        chosen = [("chosen", trials[0].config | {"lr": 1.0})]
    if change == "bare":
        trials = [trial.__class__(**{**trial.__dict__, "config": {}}) for trial in trials]
        chosen = []
    if change == "zero rate":
        trials[1].config["lr"] = 0.0
    with style():
        found = texts(sweep_search.parallel(trials, chosen, "alt"))
        assert "AUC" in found
        assert ("chosen" in found) == (change not in ("untried choice", "bare"))
        assert texts(sweep_search.learning_curves("Curves", trials, "alt"))
        assert "ECG alone" in texts(sweep_search.trial_strips("T", trials, ["fused", "ecg"], "alt"))


def test_trial_strips_name_the_best_of_each_row():
    trials = trials_of(6) + trials_of(6, "ecg")
    with style():
        found = texts(sweep_search.trial_strips("T", trials, ["fused", "ecg"], "alt"))
    for row in ("fused", "ecg"):
        assert f"{max(trial.val_auc for trial in trials if trial.row == row):.3f}" in found


def test_roc_panel_of_many_windows_stays_small():
    found, _ = parse_predictions(predictions_file(predictions_of(100, 60), ("a", "b"), 4))
    x, y = sweep_data.roc(found, "fused", 1)
    with style():
        image = plots.roc_panel("ROC", [plots.Curve("fused", x, y, 0.8)] * 9, "alt")
    assert len(image.uri) < 400_000


def test_parallel_is_deterministic():
    with style():
        drawn = [sweep_search.parallel(trials_of(), [("chosen", trials_of()[0].config)], "alt").uri for _ in range(2)]
    assert drawn[0] == drawn[1]
