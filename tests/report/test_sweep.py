"""A sweep's page: alone, true to results.json, safe, and honest about what is missing."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from physio_dist import cli
from physio_dist.report.page import render
from physio_dist.runtime import exit_status
from tests.report.report_samples import assert_escaped, jsonl, metric_rows, page_of, reader
from tests.report.sweep_samples import (
    auc_of,
    paired_data,
    predictions_file,
    predictions_of,
    results_of,
    sweep_config,
    trial_lines,
    write_sweep,
)

pytestmark = pytest.mark.integration

CLASSES = ("rest", "task")
TITLES = {
    "majority": "Majority class",
    "untrained": "Untrained encoders",
    "handmade": "Hand-made features",
    "ecg": "ECG alone",
    "eeg": "EEG alone",
    "fused": "Fused ECG + EEG",
}


def told(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


def three(value) -> str:
    return "–" if value is None else f"{value:.3f}"


def changed(**rows) -> bytes:
    """results.json with these rows changed."""
    document = results_of(predictions_of(), CLASSES)
    for row in document["rows"]:
        row |= rows.get(row["name"], {})
    return json.dumps(document).encode()


def files_of(tensors) -> dict[str, bytes]:
    """Predictions of four folds, and the results that they lead to."""
    results = results_of(tensors, CLASSES)
    return {"predictions": predictions_file(tensors, CLASSES, 4), "results": json.dumps(results).encode()}


@pytest.mark.parametrize(
    "options",
    [
        {"simulated": True, "permuted": 20},
        {"people": 5, "classes": ("a", "b", "c"), "folds": 1, "protocol": "holdout"},
        {"people": 100, "windows": 20, "classes": ("a", "b", "c", "d", "e"), "folds": 10, "tries": 60},
        {"people": 20, "windows": 8, "folds": 20, "protocol": "loso", "permuted": 100},
    ],
    ids=["binary", "three", "big", "loso"],
)
def test_render_sweep_of_every_kind_needs_no_other_file(tmp_path, options):
    folder = write_sweep(tmp_path, **options)
    text, page = page_of(folder)
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            value = attrs.get(name) or ""
            assert not value or value.startswith(("data:image/", "#")), (tag, name, value[:80])
    assert not re.search(r"url\(|@import|https?://", text)
    assert str(tmp_path) not in text
    assert len(text) < 3_000_000
    assert "nan" not in page.text.lower()
    tags = [tag for tag, _ in page.tags]
    assert tags.count("figure") == tags.count("figcaption") >= 5
    assert all(len(attrs["alt"] or "") > 20 for attrs in page.images())
    document = told(folder)
    for row in document["rows"]:
        if row["name"] in TITLES:
            head = " ".join(
                part
                for metric in ("accuracy", "balanced_accuracy", "macro_f1", "auc", "ci", "pr_auc")
                for part in (
                    [f"{row['auc_ci'][0]:.3f}–{row['auc_ci'][1]:.3f}"]
                    if metric == "ci"
                    else [three(row[metric])]
                    + ([f"± {row['spread'][metric]:.3f}"] if row["spread"][metric] is not None else [])
                )
            )
            assert f"{TITLES[row['name']]} {head}" in page.text
    people = {f"{person:016x}"[:6] for person in predictions_of(**sample(options))["person"].tolist()}
    assert all(name in page.text for name in people)


def sample(options) -> dict:
    known = {name: value for name, value in options.items() if name in ("people", "windows", "classes", "folds")}
    return {"bounds": options.get("simulated", False)} | known


def test_summary_has_headline_scores(tmp_path):
    folder = write_sweep(tmp_path, permuted=20)
    document = told(folder)
    rows = {row["name"]: row for row in document["rows"]}
    _, page = page_of(folder)

    def shown(name):
        low, high = rows[name]["auc_ci"]
        return f"{rows[name]['auc']:.3f} ({low:.3f}–{high:.3f})"

    low, high = rows["fused"]["auc_ci"]
    assert (
        f"Fused ECG + EEG tells arousal (rest against task) with ROC-AUC {rows['fused']['auc']:.3f} "
        f"(95 % interval over people {low:.3f}–{high:.3f}) on 288 windows of 12 held-out people."
    ) in page.text
    assert f"ECG alone {shown('ecg')}, EEG alone {shown('eeg')}, hand-made features of both {shown('handmade')}" in (
        page.text
    )
    gain = f"{rows['fused']['auc'] - rows['eeg']['auc']:+.3f}"
    assert f"Fused minus the better single signal (EEG alone): {gain}, 95 % interval" in page.text
    for name, called in (("handmade", "hand-made features"), ("untrained", "untrained encoders of the same shape")):
        gain = f"{rows['fused']['auc'] - rows[name]['auc']:+.3f}"
        assert f"Fused minus {called}: {gain}, 95 % interval" in page.text
    assert "4 folds of whole people; each person is held out once" in page.text
    assert "rest 144, task 144" in page.text
    auc = document["permuted"]["auc"]
    assert f"(20 times): mean AUC {np.mean(auc):.3f}, highest {max(auc):.3f}, p = 0.048." in page.text
    assert "One person has windows of one class only." in page.text
    assert "sweep of a fusion head" in page.text
    assert not any(attrs.get("class") == "badge" for _, attrs in page.tags)


@pytest.mark.parametrize(
    ("protocol", "words"),
    [
        ("loso", "leave one person out, 4 folds"),
        ("holdout", "one fixed group of people"),
        ("other", "other"),
        ("clip_disjoint", "the same people train and are tested"),
        ("person_and_clip", "neither of which trains"),
    ],
)
def test_summary_explains_the_protocol(tmp_path, protocol, words):
    assert words in page_of(write_sweep(tmp_path, protocol=protocol))[1].text


def test_mark_leaky_labels_every_table_and_figure(tmp_path):
    text, page = page_of(write_sweep(tmp_path, protocol="leaky_window", permuted=20))
    assert '<strong class="badge">LEAKY</strong>' in text and "held-out people" not in page.text.split("Results")[0]
    captions = re.findall(r'<figcaption>.*?</figcaption>|<p class="caption">.*?</p>', text, re.DOTALL)
    assert len(captions) > 6 and all("LEAKY SPLIT" in caption for caption in captions)
    tables = re.findall(r"</table>\s*(?:</div>)?\s*<p class=.caption.>LEAKY SPLIT", text)
    assert len(tables) == text.count("</table>")


def test_published_compares_with_the_paper(tmp_path):
    document = results_of(predictions_of(), CLASSES)
    document["published"] = {"source": "arXiv 1", "metric": "f1", "value": 0.8114, "unknown": "the split"}
    _, page = page_of(write_sweep(tmp_path, results=json.dumps(document).encode()))
    ours = next(row["macro_f1"] for row in document["rows"] if row["name"] == "fused")
    ours = f"{ours:.3f} (mean over classes)"
    for words in ("arXiv 1", "0.811 (81", ours, "not reproduced", "Unknown of it: the split"):
        assert words in page.text


def test_control_reports_permuted_labels_above_chance(tmp_path):
    document = results_of(predictions_of(), CLASSES, permuted=20)
    document["permuted"]["p_leak"] = 3e-11
    _, page = page_of(write_sweep(tmp_path, results=json.dumps(document).encode()))
    assert "above chance with p = 3e-11" in page.text and "above chance has p = 3e-11" in page.text


def test_render_sweep_compares_simulated_signals_with_their_bound(tmp_path):
    folder = write_sweep(tmp_path, simulated=True)
    rows = {row["name"]: row for row in told(folder)["rows"]}
    _, page = page_of(folder)
    assert any(attrs.get("class") == "badge" for _, attrs in page.tags)
    assert "SIMULATED" in page.texts
    for name, bound in (("ecg", "bound_ecg"), ("fused", "bound_fused"), ("handmade", "bound_fused")):
        best = rows[bound]["auc"]
        share = f"{100 * (rows[name]['auc'] - 0.5) / (best - 0.5):.0f}"
        assert re.search(rf"{re.escape(TITLES[name])} [^A-Z]* {best:.3f} {share}\s%", page.text), name
    assert "Best possible: " not in page.text.replace("Best possible: reached", ""), "bounds are no rows of their own"


@pytest.mark.parametrize(("simulated", "data"), [(True, None), (True, paired_data(False)), (False, paired_data(True))])
def test_badge_follows_results_before_data(tmp_path, simulated, data):
    raw = None if data is None else json.dumps(data).encode()
    _, page = page_of(write_sweep(tmp_path, simulated=simulated, data=raw))
    assert any(attrs.get("class") == "badge" for _, attrs in page.tags) == simulated


def test_baselines_show_missing_signals_noise_and_calibration(tmp_path):
    tensors = predictions_of(asked=True, bounds=True)
    document = results_of(tensors, CLASSES, simulated=True)
    for row in document["rows"]:
        row["ece"] = 0.123 if row["name"] == "fused" else 0.05
    next(row for row in document["rows"] if row["name"] == "fused")["ece_before"] = 0.234
    content = {"results": json.dumps(document).encode(), "predictions": predictions_file(tensors, CLASSES, 4)}
    _, page = page_of(write_sweep(tmp_path, **content))
    areas = {row["name"]: three(row["auc"]) for row in document["rows"]}
    for name, called in (("fused_ecg_only", "Fused, ECG shown"), ("noise_eeg", "ECG + noise for EEG")):
        assert called in page.text and areas[name] in page.text
        assert f"{called} {areas[name]} (" in page.text and f") against ECG alone {areas['ecg']}" in page.text
    assert "Calibration error" in page.text and "0.123" in page.text and "before 0.234" in page.text
    assert "With one signal withheld at the test" in page.text and "with noise in place of one signal" in page.text
    plain, _ = page_of(write_sweep(tmp_path / "plain"))
    assert "Calibration error" not in plain and "withheld at the test" not in plain and "noise" not in plain


def test_baselines_have_no_bound_on_recorded_signals(tmp_path):
    _, page = page_of(write_sweep(tmp_path))
    assert "est possible" not in page.text
    assert "named best" not in page.text


def test_summary_names_a_loss_and_an_interval_with_zero(tmp_path):
    tensors = predictions_of()
    tensors["probability.fused"], tensors["probability.eeg"] = (
        tensors["probability.untrained"].copy(),
        tensors["probability.fused"].copy(),
    )
    files = files_of(tensors)
    _, page = page_of(write_sweep(tmp_path, **files))
    assert re.search(r"single signal \(EEG alone\): \S+, 95 % interval [^:]*: worse on", page.text)
    tensors["probability.fused"] = tensors["probability.eeg"].copy()
    tensors["probability.fused"][::2] = tensors["probability.fused"][::2] * 0.98 + 0.01
    files = files_of(tensors)
    _, page = page_of(write_sweep(tmp_path, **files))
    assert re.search(r"single signal \(EEG alone\): \S+, 95 % interval [^:]*: it includes zero", page.text)


def test_people_counts_gains(tmp_path):
    folder = write_sweep(tmp_path)
    tensors = predictions_of()
    up = same = 0
    for person in np.unique(tensors["person"]):
        mine = tensors["person"] == person
        right = {
            row: (tensors[f"probability.{row}"][mine].argmax(axis=1) == tensors["label"][mine]).mean()
            for row in ("ecg", "eeg", "fused")
        }
        up += right["fused"] > max(right["ecg"], right["eeg"])
        same += right["fused"] == max(right["ecg"], right["eeg"])
    _, page = page_of(folder)
    equal = f", equal for {same}" if same else ""
    counted = f"for {up} of 12 people{equal};"
    assert f"Accuracy: fused is above the better of a person's single signals {counted}" in page.text


def test_gain_table_counts_people_better(tmp_path):
    """Of single people many have an AUC of exactly 1 with both rows: equal is not better."""
    tensors = predictions_of(windows=6)
    results = json.dumps(results_of(tensors, CLASSES)).encode()
    folder = write_sweep(tmp_path, results=results, predictions=predictions_file(tensors, CLASSES, 4))
    areas = {
        row: [
            auc_of(tensors["label"][mine], tensors[f"probability.{row}"][mine, 1])
            for mine in (tensors["person"] == person for person in np.unique(tensors["person"]))
        ]
        for row in ("eeg", "fused")
    }
    better = sum(fused > eeg for fused, eeg in zip(areas["fused"], areas["eeg"], strict=True))
    assert any(fused == eeg for fused, eeg in zip(areas["fused"], areas["eeg"], strict=True))
    _, page = page_of(folder)
    gain = auc_of(tensors["label"], tensors["probability.fused"][:, 1])
    gain -= auc_of(tensors["label"], tensors["probability.eeg"][:, 1])
    shown = re.escape(f"{gain:+.3f}".replace("-", "\u2212"))
    assert re.search(rf"EEG alone {shown} \S+ to \S+ \S+ {better} of 12", page.text)


def test_curves_have_one_area_per_class(tmp_path):
    classes = ("a", "b", "c")
    tensors = predictions_of(classes=classes)
    _, page = page_of(write_sweep(tmp_path, classes=classes))
    for c, name in enumerate(classes):
        area = auc_of((tensors["label"] == c).astype(int), tensors["probability.fused"][:, c])
        alt = next(i["alt"] for i in page.images() if (i["alt"] or "").startswith(f"ROC curves of {name}"))
        assert f"Fused ECG + EEG {area:.3f}" in alt


def test_people_leaves_out_and_counts_people_of_one_class(tmp_path):
    tensors = predictions_of()
    tensors["label"][tensors["person"] == tensors["person"].min()] = 0
    files = files_of(tensors)
    _, page = page_of(write_sweep(tmp_path, **files))
    assert "of 11 people" in page.text
    assert "1 have windows of one class only and are left out" in page.text


def test_search_counts_trials(tmp_path):
    lines = trial_lines()
    _, page = page_of(write_sweep(tmp_path))
    fused = [line for line in lines if line["row"] == "fused"]
    stopped = sum(line["stopped"] for line in lines)
    assert f"80 trials, {stopped} stopped early" in page.text
    row = f"20 {sum(line['stopped'] for line in fused)} {sum(line['epochs'] for line in fused)}"
    assert f"Fused ECG + EEG {row} {max(line['val_auc'] for line in fused):.3f}" in page.text


def test_search_lists_selected_configurations(tmp_path):
    folder = write_sweep(tmp_path)
    first = next(row for row in told(folder)["rows"] if row["name"] == "fused")["per_fold"][0]
    _, page = page_of(folder)
    config = first["config"]
    pooling = config["pooling"].replace("_", " ")
    assert f"0 3 72 {first['auc']:.3f} {pooling} {config['depth']} {config['width']}" in page.text
    many = write_sweep(tmp_path / "many", people=15, folds=15, windows=8)
    first = next(row for row in told(many)["rows"] if row["name"] == "fused")["per_fold"][0]
    _, page = page_of(many)
    assert f"fold 0: held-out AUC {first['auc']:.3f}, epoch 5, pooling" in page.text


def test_baselines_show_undefined_scores_as_dashes(tmp_path):
    nothing = dict.fromkeys(("auc", "pr_auc", "auc_ci", "macro_f1"))
    raw = changed(ecg=nothing, fused=nothing)
    _, page = page_of(write_sweep(tmp_path, results=raw))
    assert re.search(r"ECG alone 0\.\d+ ± 0\.\d+ 0\.\d+ ± 0\.\d+ – ± 0\.\d+ – ± 0\.\d+ – –", page.text)
    assert "The sweep has no AUC of the fused row" in page.text
    assert "nan" not in page.text.lower()


def test_render_sweep_with_null_scores_has_no_images(tmp_path):
    empty = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "auc", "pr_auc", "auc_ci", "confusion"))
    raw = changed(**{name: empty | {"per_fold": [], "spread": {}} for name in TITLES})
    raw = json.dumps(json.loads(raw) | {"occlusion": None}).encode()
    _, page = page_of(write_sweep(tmp_path, results=raw, predictions=None, trials=None, embedding=None))
    assert "Majority class – – – – – –" in page.text
    assert "results.json holds no confusion matrix." in page.text
    assert len(page.images()) == 0


def test_sections_without_data_say_so_in_a_line(tmp_path):
    folder = write_sweep(tmp_path, predictions=None, trials=None, data=None, config=None, embedding=None)
    _, page = page_of(folder)
    for line in (
        "The run holds no predictions.safetensors, so no curve can be drawn.",
        "The run holds no predictions.safetensors, so nothing can be said about each person.",
        "The run holds no trials.jsonl, so its configurations are not drawn.",
        "so this control for leakage is missing.",
        "The run holds no data.json",
        "The run holds no config.yaml.",
        "unnamed run",
    ):
        assert line in page.text
    assert len(page.images()) == 5


def test_render_sweep_with_bare_results(tmp_path):
    (tmp_path / "results.json").write_text('{"rows": [{"name": "fused"}]}')
    _, page = page_of(tmp_path)
    assert "results.json has no row for: Majority class, Untrained encoders" in page.text
    assert "does not tell whether its signals are recorded or simulated" in page.text


def test_render_sweep_names_absent_rows(tmp_path):
    tensors = predictions_of()
    del tensors["probability.ecg"], tensors["probability.handmade"]
    files = files_of(tensors)
    _, page = page_of(write_sweep(tmp_path, **files))
    assert "results.json has no row for: Hand-made features, ECG alone." in page.text
    del tensors["probability.eeg"]
    files["predictions"] = predictions_file(tensors, CLASSES, 4)
    _, page = page_of(write_sweep(tmp_path, **files))
    assert "lacks the fused or both single rows" in page.text


def test_render_sweep_with_one_class(tmp_path):
    tensors = predictions_of()
    tensors["label"][:] = 0
    files = files_of(tensors)
    _, page = page_of(write_sweep(tmp_path, **files))
    assert "Nothing to draw: the held-out windows are all of one class." in page.text
    assert "ROC-AUC is not defined for any person" in page.text
    assert "Accuracy: fused is above" in page.text


def test_baselines_explain_a_majority_off_chance(tmp_path):
    words = "folds differ a little in their training people's class shares"
    assert words in page_of(write_sweep(tmp_path, results=changed(majority={"auc": 0.493})))[1].text
    assert words not in page_of(write_sweep(tmp_path))[1].text


def test_curves_note_an_area_that_differs_from_results(tmp_path):
    _, page = page_of(write_sweep(tmp_path, results=changed(ecg={"auc": 0.123})))
    assert re.search(r"ECG alone: the predictions give 0\.\d{3}, results\.json says 0\.123\.", page.text)
    assert "the predictions give" not in page_of(write_sweep(tmp_path))[1].text


def test_curves_note_a_row_without_numbers(tmp_path):
    tensors = predictions_of()
    tensors["probability.handmade"][:] = np.nan
    raw = predictions_file(tensors, CLASSES, 4)
    _, page = page_of(write_sweep(tmp_path, predictions=raw))
    assert "No curve for Hand-made features: its probabilities are not all numbers." in page.text


def test_search_notes_trials_without_result_and_an_unfinished_line(tmp_path):
    lines = trial_lines(5)
    lines[0] |= {"val_auc": None, "history": [[1, None]]}
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode() + b'{"row": "fu'
    _, page = page_of(write_sweep(tmp_path, trials=raw))
    assert "1 of 20 trials came to no validation AUC and are not drawn." in page.text
    assert "The last line of trials.jsonl was not finished and is left out." in page.text
    lines = [line | {"val_auc": None, "history": []} for line in trial_lines(2)]
    raw = "".join(json.dumps(line) + "\n" for line in lines).encode()
    assert "8 of 8 trials came to no validation AUC" in page_of(write_sweep(tmp_path, trials=raw))[1].text


def test_dataset_lists_encoders_by_fold(tmp_path):
    document = results_of(predictions_of(), CLASSES)
    each = {str(fold): {"url": f"s3://b/fold-{fold}", "sha256": "ef" * 32} for fold in range(2)}
    document["encoders"]["ecg"] = {"by_fold": each}
    document["selection"] = {"rule": "the best on validation people", "trials": {"fused": 20}}
    _, page = page_of(write_sweep(tmp_path, results=json.dumps(document).encode()))
    assert "fold 1 url: s3://b/fold-1; sha256: efef" in page.text
    assert "How it was selected: the best on validation people" in page.text
    assert "ecg: I, II; eeg: Fp1, Fp2, Cz" in page.text


def test_render_sweep_escapes_markup(tmp_path):
    evil = "<script>alert('x')</script>\" onload=\"y"
    classes = (evil, "B")
    tensors = predictions_of(classes=classes)
    document = results_of(tensors, classes) | {
        "label": evil,
        "protocol": evil,
        "notes": [evil],
        "selection": {"rule": evil},
    }
    document["encoders"] = {evil: {evil: evil}}
    document["rows"].append({"name": evil})
    lines = [line | {"row": evil, "config": {"pooling": evil, evil: evil}} for line in trial_lines(2)]
    for row in document["rows"]:
        for fold in row.get("per_fold", []):
            fold |= {"fold": evil, "config": {"pooling": evil, evil: evil}}
    folder = write_sweep(
        tmp_path,
        config=sweep_config(evil).encode(),
        results=json.dumps(document).encode(),
        predictions=predictions_file(tensors, classes, 4),
        trials="".join(json.dumps(line) + "\n" for line in lines).encode(),
    )
    text, page = page_of(folder)
    assert_escaped(text, page, evil)


def test_credentials_stay_out(tmp_path):
    text, _ = page_of(write_sweep(tmp_path))
    assert "secret" not in text
    assert "s3://bucket/ecg-encoder" in text


def test_render_sweep_is_deterministic(tmp_path):
    read = reader(write_sweep(tmp_path, simulated=True, permuted=20))
    assert render(read) == render(read)


def test_render_takes_a_directory_with_metrics_as_pretraining_run(tmp_path):
    folder = write_sweep(tmp_path)
    (folder / "metrics.jsonl").write_bytes(jsonl(metric_rows()))
    assert "pretraining run" in page_of(folder)[1].text


def test_report_command_writes_the_page_and_exits_with_documented_status(tmp_path, capsys):
    def status(folder) -> int:
        return exit_status.status_of(lambda: cli._run(["report", str(folder)]))

    folder = write_sweep(tmp_path / "run")
    assert status(folder) == 0
    assert "sweep of a fusion head" in (folder / "report.html").read_text()
    document = told(folder) | {"windows": 1}
    (folder / "results.json").write_text(json.dumps(document))
    capsys.readouterr()
    assert status(folder) == 3
    message = capsys.readouterr().err
    assert str(folder) in message and "predictions.safetensors" in message and "Traceback" not in message
    assert status(tmp_path) == 2
    message = capsys.readouterr().err
    assert "metrics.jsonl" in message and "results.json" in message
