"""Numbers behind the drawings, and what the drawings contain."""

from __future__ import annotations

import base64
import io

import numpy as np
import PIL.Image
import pytest

from physio_dist.report import components
from physio_dist.report.components import number, percent, style
from physio_dist.report.pretraining_plots import (
    Series,
    cut_off_uv,
    loss_panel,
    scale_bar_uv,
    sheet,
    smooth,
    smoothing_window,
    spread,
    squared_errors,
)
from physio_dist.report.run_data import parse_examples
from tests.report.report_samples import LEADS, example_tensors, examples_file, texts


def test_smooth_averages_finite_neighbours():
    values = np.array([1.0, 2.0, np.nan, 4.0, 9.0])
    np.testing.assert_allclose(smooth(values, 3), [1.5, 1.5, np.nan, 6.5, 6.5])


@pytest.mark.parametrize("rows", [1, 39, 40, 400, 10_000])
def test_smoothing_window_is_odd_and_grows_with_rows(rows):
    window = smoothing_window(rows)
    assert window % 2 == 1
    assert (window == 1) == (rows < 40)
    assert window <= max(5, rows // 40 + 1)


@pytest.mark.parametrize("places", [[0.5], [0.5, 0.5, 0.5], [0.99, 1.0, 0.98], [0.1, 0.9], [0.0, 0.01, 0.5]])
def test_spread_keeps_order_gap_and_ceiling(places):
    result = spread(places, 0.15)
    assert max(result) <= 1.0
    assert np.diff(sorted(result)).min(initial=1.0) >= 0.15 - 1e-9
    assert np.argsort(result, kind="stable").tolist() == np.argsort(places, kind="stable").tolist()


def test_squared_errors_are_those_of_hidden_valid_samples():
    tensors = example_tensors(n=2)
    examples = parse_examples(examples_file(tensors, LEADS))
    wrong, power = squared_errors(examples, "intra")
    expected, scale = np.zeros((2, 12)), np.zeros((2, 12))
    for n in range(2):
        for lead in range(12):
            for patch in range(10):
                if tensors["intra"][n, lead, patch] and tensors["valid"][n, lead]:
                    part = slice(patch * 200, (patch + 1) * 200)
                    target = tensors["target"][n, lead, part].astype(float)
                    expected[n, lead] += ((tensors["reconstruction"][n, lead, part] - target) ** 2).sum()
                    scale[n, lead] += (target**2).sum()
    np.testing.assert_allclose(wrong, expected, rtol=1e-4)
    np.testing.assert_allclose(power, scale, rtol=1e-6)


def test_sheet_names_leads_scale_and_invalid_leads(monkeypatch):
    monkeypatch.setattr(components, "SVG_LIMIT_BYTES", 10_000_000)
    examples = parse_examples(examples_file(example_tensors(n=1), LEADS))
    with style():
        found = texts(sheet(examples, 0, "alt"))
    assert set(LEADS) <= set(found)
    assert sum("not valid" in text for text in found) == 1
    assert any("mV" in text and "1 s" in text for text in found)


def test_sheet_draws_markup_and_formula_signs_literally():
    names = ["$a_b$ <b>&", "II\x00\x07"]
    examples = parse_examples(examples_file(example_tensors(n=1, channels=2), names))
    with style():
        found = texts(sheet(examples, 0, "alt"))
    assert "$a_b$ <b>&" in found
    assert "II" in found


def test_embed_turns_a_large_svg_into_png():
    tensors = example_tensors(n=1)
    noise = 300 * np.random.default_rng(0).standard_normal(tensors["target"].shape)
    tensors["target"] = noise.astype(np.float32)
    with style():
        image = sheet(parse_examples(examples_file(tensors, LEADS)), 0, "alt")
    kind, data = image.uri.removeprefix("data:").split(";base64,")
    assert kind == "image/png"
    assert len(data) < 450_000
    assert PIL.Image.open(io.BytesIO(base64.b64decode(data))).width > image.width


def test_sheet_draws_without_valid_or_finite_samples():
    tensors = example_tensors(n=1, channels=2)
    tensors["valid"][:] = 0
    tensors["reconstruction"][:] = np.nan
    with style():
        found = texts(sheet(parse_examples(examples_file(tensors, ["A", "B"])), 0, "alt"))
    assert sum("not valid" in text for text in found) == 2


def test_cut_off_uv_limits_an_artefact():
    tensors = example_tensors(n=1)
    assert cut_off_uv(parse_examples(examples_file(tensors, LEADS)), 0) is None
    tensors["target"][0, 0, 100] = 50_000
    limit = cut_off_uv(parse_examples(examples_file(tensors, LEADS)), 0)
    assert limit is not None and limit < 50_000


@pytest.mark.parametrize(("usual", "bar"), [(0.0, 10), (45, 50), (900, 1000), (1e9, 5000)])
def test_scale_bar_uv_is_round(usual, bar):
    assert scale_bar_uv(usual) == bar


def test_loss_panel_names_last_values():
    steps = np.arange(1.0, 6.0)
    with_gap = np.array([1.0, 0.5, np.nan, 0.25, np.nan])
    series = [
        Series("training", steps, with_gap, "#000000"),
        Series("zero", steps, np.full(5, 0.9), "#000000", kind="reference"),
    ]
    with style():
        found = " ".join(texts(loss_panel("A term", series, [2.0], "alt")))
    assert "A term" in found
    assert "0.250" in found
    assert "0.900" in found


def test_sheet_is_deterministic():
    examples = parse_examples(examples_file(example_tensors(n=1, channels=2), ["A", "B"]))
    with style():
        assert sheet(examples, 0, "alt").uri == sheet(examples, 0, "alt").uri


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.31, "0.310"), (123.4, "123"), (12345.6, "12,346"), (0, "0"), (float("nan"), "–"), (float("inf"), "–")],
)
def test_number_formats_values(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.413, "41 %"), (0.021, "2.1 %"), (2.5, "250 %"), (float("nan"), "–")])
def test_percent_formats_values(value, text):
    assert percent(value).replace("\u00a0", " ") == text
