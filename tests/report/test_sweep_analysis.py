"""Analysis sections of a sweep's page: calibration, occlusion, embedding, and the paired tests."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load, save

from physio_dist.errors import DataError, UserError
from physio_dist.report import components, sweep_data
from physio_dist.report import sweep_analysis as plots
from physio_dist.report.components import style
from physio_dist.report.sweep_data import parse_planes, parse_predictions
from physio_dist.runs.sweep_results import EmbeddingSummary, NeighbourShares, Occlusion, OcclusionResults, SweepResults
from physio_dist.runs.typed_json import from_json
from physio_dist.signals.montage import EEG_19, ELECTRODES
from physio_dist.signals.simulators.eeg import POSITIONS
from physio_dist.stats.permutation import permutation_p_value
from tests.report.report_samples import page_of, texts
from tests.report.sweep_samples import (
    occlusion_of,
    plane_file,
    predictions_file,
    predictions_of,
    results_of,
    write_sweep,
)

pytestmark = pytest.mark.integration

CLASSES = ("rest", "task")


@pytest.fixture(autouse=True)
def _as_svg(monkeypatch):
    monkeypatch.setattr(components, "SVG_LIMIT_BYTES", 10_000_000)


def results_with(**changes) -> bytes:
    return json.dumps(results_of(predictions_of(), CLASSES) | changes).encode()


def test_reliability_counts_bins():
    tensors = predictions_of()
    p = np.tile([0.04, 0.049, 0.31, 0.999, 1.0, 0.95], 48)
    tensors["label"] = np.tile([0, 1, 0, 1, 1, 0], 48)
    tensors["probability.fused"] = np.stack([1 - p, p], axis=1).astype(np.float32)
    found, _ = parse_predictions(predictions_file(tensors, CLASSES, 4))
    bins = sweep_data.reliability(found, "fused")
    assert bins.count.tolist() == [96, 0, 0, 48, 0, 0, 0, 0, 0, 144]
    np.testing.assert_allclose(bins.probability[[0, 3, 9]], [0.0445, 0.31, 0.983], atol=1e-6)
    np.testing.assert_allclose(bins.frequency[[0, 3, 9]], [0.5, 0, 2 / 3])
    assert np.isnan(bins.frequency[1])


def test_reliability_of_three_classes_uses_the_predicted_one():
    tensors = predictions_of(classes=("a", "b", "c"))
    found, _ = parse_predictions(predictions_file(tensors, ("a", "b", "c"), 4))
    bins = sweep_data.reliability(found, "fused")
    table = found.probability["fused"]
    right = (table.argmax(axis=1) == found.label).mean()
    assert np.nansum(bins.frequency * bins.count) / bins.count.sum() == pytest.approx(right)
    assert bins.count[:3].sum() == 0, "the most probable of three has a third at least"


def test_calibration_draws_every_row(tmp_path):
    tensors = predictions_of(asked=True)
    document = results_of(tensors, CLASSES)
    for row in document["rows"]:
        row["ece"] = 0.123
    content = {"results": json.dumps(document).encode(), "predictions": predictions_file(tensors, CLASSES, 4)}
    _, page = page_of(write_sweep(tmp_path, **content))
    alt = next(i["alt"] for i in page.images() if i["alt"].startswith("Reliability curves of 9 rows"))
    assert "Fused, ECG shown" in alt and "Majority" not in alt
    assert "calibration" in {attrs.get("id") for tag, attrs in page.tags if tag == "section"}
    found, _ = parse_predictions(content["predictions"])
    bins = sweep_data.reliability(found, "fused")
    with style():
        drawn = texts(plots.reliability_panels([("fused", bins, 0.123), ("eeg", bins, float("nan"))], "x", "y", "alt"))
    assert "calibration error 0.123" in drawn and {"fused", "EEG", "x", "y"} <= set(drawn)
    for i in np.flatnonzero(bins.count):
        assert f"{bins.count[i]} {bins.probability[i]:.3f} {bins.frequency[i]:.3f}" in page.text


def test_gain_table_and_summary_have_paired_p_values(tmp_path):
    tensors = predictions_of(asked=True)
    files = {
        "results": json.dumps(results_of(tensors, CLASSES)).encode(),
        "predictions": predictions_file(tensors, CLASSES, 4),
    }
    _, page = page_of(write_sweep(tmp_path, **files))
    for row, minus, called in (
        ("fused", "ecg", "ECG alone"), ("noise_ecg", "eeg", "EEG + noise for ECG minus EEG alone"),
        ("fused_eeg_only", "eeg", "Fused, EEG shown minus EEG alone"),
    ):  # fmt: skip
        one, other = (tensors[f"probability.{name}"].astype(np.float64) for name in (row, minus))
        p = permutation_p_value(tensors["label"], tensors["person"], one, other)
        shown = f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"
        assert re.search(rf"{re.escape(called)} \S+ \S+ to \S+ {re.escape(shown)} \d+ of 12", page.text), called
    assert re.search(r"Fused minus hand-made features: \S+, 95 % interval \S+ to \S+, p = [\d.e-]+", page.text)


def test_occlusion_lists_and_draws_effects(tmp_path):
    _, page = page_of(write_sweep(tmp_path))
    assert "without the ECG +0.041 (+0.021 to +0.056), without the EEG +0.213" in page.text
    alts = [i["alt"] for i in page.images()]
    assert any(alt.startswith("Electrodes on a head") and "the most: Cz +0.131" in alt for alt in alts)
    assert any(alt.startswith("ROC-AUC lost without each: Cz +0.131") for alt in alts)
    assert any("EEG alone 2 s +0.077" in alt for alt in alts)
    for words in ("Cz +0.131 +0.111 to +0.146 0.066", "eeg 2 s +0.077"):
        assert words in page.text
    entries = from_json(OcclusionResults, occlusion_of(), "results.json").channels
    with style():
        drawn = texts(plots.occlusion_bars("T", [(one.channel, one) for one in entries], "alt"))
        assert [text for text in drawn if text in ("I", "II", "Fp1", "Fp2", "Cz")] == ["I", "II", "Fp1", "Fp2", "Cz"]
        at = {name: plots.on_scalp(name) for name in ("Fp1", "Fp2", "Cz")}
        head = texts(plots.scalp_map("T", [one for one in entries if one.signal == "eeg"], at, "alt"))
        assert {"Fp1", "Fp2", "Cz", "0.131", "0 or less"} <= set(head)


def test_on_scalp_follows_the_10_10_system():
    for name, (x, y, z) in zip(EEG_19, POSITIONS, strict=True):
        radius = np.arccos(z) / (np.pi / 2)
        flat = np.hypot(x, y) or 1.0
        assert plots.on_scalp(name) == pytest.approx((radius * x / flat, radius * y / flat), abs=0.07), name
    places = {name: plots.on_scalp(name) for name in ELECTRODES}
    assert all(places[name] is not None for name in ELECTRODES if name not in ("Nz", "Iz"))
    gaps = [
        np.hypot(a[0] - b[0], a[1] - b[1])
        for one, a in places.items() for other, b in places.items() if one < other and a is not None and b is not None
    ]  # fmt: skip
    assert min(gaps) > 0.08, "no two stand in one place"
    for left, right in (("AF3", "AF4"), ("FC5", "FC6"), ("T7", "T8"), ("P9", "P10")):
        assert plots.on_scalp(left) == pytest.approx((-places[right][0], places[right][1]))
    assert [plots.on_scalp(name) for name in ("ECG", "II", "V1", "", "C11", "Fp3")] == [None] * 6


def test_features_draws_embedding_by_person_and_label(tmp_path):
    _, page = page_of(write_sweep(tmp_path))
    alts = [i["alt"] for i in page.images()]
    for words in ("ECG features on a plane, by person: 41", "EEG features on a plane, by person: 83",
                  "by label: 55"):  # fmt: skip
        assert sum(words in alt for alt in alts) >= 1, words
    text = page.text.replace("\u00a0", " ")
    assert "EEG neighbours 83 % are of the same person (10.4 times as many as by chance)" in text
    assert "of other people 55 % have its label, 5 points above chance" in text
    told = json.loads(results_with())["embedding"]
    told["eeg"]["label"] = 0.504
    _, page = page_of(write_sweep(tmp_path, results=results_with(embedding=told)))
    assert "of other people 50 % have its label, as by chance" in page.text.replace("\u00a0", " ")
    styles = plots.person_colours(36)
    assert len(set(styles)) == 36 and len(set(plots.person_colours(9))) == 9


def test_analysis_sections_name_what_is_missing(tmp_path):
    raw = results_with(occlusion=None, embedding=None)
    _, page = page_of(write_sweep(tmp_path, results=raw, embedding=None))
    assert "holds no occlusion analysis" in page.text
    assert "The run holds no embedding.safetensors" in page.text


def test_occlusion_with_one_person_and_one_channel(tmp_path):
    effects = occlusion_of(people=1)
    effects["channels"] = effects["channels"][:1]
    effects["patches"] = []
    _, page = page_of(write_sweep(tmp_path, results=results_with(occlusion=effects)))
    assert "without the EEG +0.213." in page.text
    effects["signals"] = [one | {"auc_drop": None, "prob_shift": None} for one in effects["signals"]]
    _, page = page_of(write_sweep(tmp_path, results=results_with(occlusion=effects)))
    assert "holds no occlusion analysis" in page.text


@pytest.mark.parametrize(
    "value", [[1], {"signals": 3}, {"channels": [{"ci": 3}]}, {"patches": [{"auc_drop": "much"}]}, {"signals": [2]}]
)
def test_occlusion_results_raise_on_wrong_types(value):
    with pytest.raises(UserError, match="occlusion"):
        from_json(SweepResults, {"rows": [], "occlusion": value}, "results.json")


def test_parse_planes_raises_on_damage():
    raw = plane_file(predictions_of())
    whole = parse_planes(raw, EmbeddingSummary(eeg=NeighbourShares(person=0.5)), 2)
    assert list(whole) == ["ecg", "eeg"] and whole["eeg"].shares.person == 0.5
    with pytest.raises(UserError, match=r"embedding\.safetensors"):
        parse_planes(raw[:50], EmbeddingSummary(), 2)
    tensors = load(raw)
    for name, value in (("ecg.label", tensors["ecg.label"][:-1]), ("eeg.place", tensors["eeg.place"][:, :1])):
        with pytest.raises(DataError, match="do not fit"):
            parse_planes(bytes(save(tensors | {name: np.ascontiguousarray(value)})), EmbeddingSummary(), 2)
    with pytest.raises(DataError, match=r"0\.\.0"):
        parse_planes(raw, EmbeddingSummary(), 1)
    with pytest.raises(UserError, match="person"):
        from_json(EmbeddingSummary, {"eeg": {"person": "most"}}, "results.json")


def test_occlusion_limits_channels(tmp_path):
    effects = occlusion_of()
    names = [name for name in ELECTRODES if name not in ("Nz", "Iz")]
    effects["channels"] = [
        {"signal": "eeg", "channel": name, "auc_drop": 0.001 * i, "ci": None, "prob_shift": 0.0}
        for i, name in enumerate(names)
    ]  # fmt: skip
    _, page = page_of(write_sweep(tmp_path, results=results_with(occlusion=effects)))
    assert f"The {plots.MOST_BARS} channels missed most, of {len(names)}." in page.text
    entry = ("x", Occlusion(signal="eeg", auc_drop=-0.5, prob_shift=0.0))
    with style():
        assert "\u22120.500" in texts(plots.occlusion_bars("T", [entry], "alt"))
