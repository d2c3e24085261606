"""The page as a whole: alone, true, safe, and honest about what is missing."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest

from physio_dist.errors import UserError
from physio_dist.report.page import render
from tests.report.report_samples import (
    INTERP,
    LEADS,
    ZERO,
    assert_escaped,
    config_yaml,
    data_json,
    example_tensors,
    examples_file,
    jsonl,
    metric_rows,
    page_of,
    reader,
    write_run,
)

pytestmark = pytest.mark.integration


def percent_of(value: float, reference: float) -> str:
    share = 100 * value / reference
    return f"{share:.1f} %" if share < 10 else f"{share:.0f} %"


def test_render_run_needs_no_other_file(tmp_path):
    text, page = page_of(write_run(tmp_path))
    for tag, attrs in page.tags:
        assert tag not in {"script", "link", "iframe", "object", "embed", "base"}
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            value = attrs.get(name) or ""
            assert not value or value.startswith(("data:image/", "#")), (tag, name, value[:80])
    assert not re.search(r"url\(|@import|https?://", text)
    assert "default-src 'none'" in text
    assert str(tmp_path) not in text
    assert len(text) < 3_000_000


def test_render_run_limits_size_with_many_windows_and_steps(tmp_path):
    tensors = example_tensors(n=16)
    rng = np.random.default_rng(0)
    tensors["target"] = (200 * rng.standard_normal(tensors["target"].shape)).astype(np.float32)
    rows = metric_rows(20_000, every=2, validate=50)
    folder = write_run(tmp_path, examples=examples_file(tensors, LEADS), metrics=jsonl(rows), attempts=None)
    text, page = page_of(folder)
    assert len(text) < 3_000_000
    assert "6 of 16 held-out windows" in page.text


def test_summary_has_final_errors_and_speed(tmp_path):
    rows = metric_rows()
    final = rows[-1]
    assert final["val_loss"] is not None
    _, page = page_of(write_run(tmp_path))
    for key in ("intra", "inter"):
        assert f"{final[f'val_{key}']:#.3g}" in page.text
        assert f"error is {percent_of(final[f'val_{key}'], ZERO[key])} of that of predicting zero" in page.text
    assert f"and {percent_of(final['val_intra'], INTERP['intra'])} of that of interpolating in time" in page.text
    assert f"{100 * math.sqrt(final['val_intra']):.0f} µV" in page.text
    assert f"{np.median([row['samples_per_s'] for row in rows]):#.3g}".rstrip(".") + " /s" in page.text
    assert f"{100 * np.median([row['data_wait_frac'] for row in rows]):.1f} %" in page.text
    assert "Steps 60 of 60 planned" in page.text
    assert "Samples 3,840" in page.text
    assert "5,000" in page.text and "731 people" in page.text
    assert "1 restart" in page.text


def test_summary_leaves_out_interpolation_equal_to_zero(tmp_path):
    _, page = page_of(write_run(tmp_path))
    lead_wise = next(text for text in page.texts if text.startswith("Lead-wise (leads hidden whole)"))
    assert "interpolating" not in lead_wise


def test_summary_marks_a_model_worse_than_its_baselines(tmp_path):
    rows = metric_rows()
    rows[-1] |= {"val_intra": 1.0, "val_inter": 1.5}
    _, page = page_of(write_run(tmp_path, metrics=jsonl(rows)))
    assert "111 % of that of predicting zero and 83 % of that of interpolating in time — no better" in page.text
    assert "no better than predicting zero or interpolation." in page.text
    assert any(attrs.get("class") == "warn" for _, attrs in page.tags)


@pytest.mark.parametrize(
    ("told", "badge"), [([True], "SIMULATED"), ([True, False], "PARTLY SIMULATED"), ([False], None), ([], None)]
)
def test_badge_shows_simulated_data(tmp_path, told, badge):
    indexes = [index for flag in told for index in data_json(flag)["indexes"]]
    raw = json.dumps({"indexes": indexes}).encode() if told else None
    _, page = page_of(write_run(tmp_path, data=raw, examples=None))
    badges = [index for index, (_, attrs) in enumerate(page.tags) if attrs.get("class") == "badge"]
    assert bool(badges) == (badge is not None)
    if badge is not None:
        assert badge in page.texts
    if not told:
        assert "does not tell whether its signals are recorded or simulated" in page.text


def test_per_lead_has_unexplained_variance_of_each_lead(tmp_path):
    tensors = example_tensors(n=2)
    _, page = page_of(write_run(tmp_path, examples=examples_file(tensors, LEADS)))
    hidden = np.repeat(tensors["inter"] * tensors["valid"][:, :, None], 200, axis=2).astype(bool)
    target, made = tensors["target"].astype(float), tensors["reconstruction"].astype(float)
    v5 = LEADS.index("V5")
    share = ((made - target)[:, v5][hidden[:, v5]] ** 2).sum() / (target[:, v5][hidden[:, v5]] ** 2).sum()
    every = ((made - target)[hidden] ** 2).sum() / (target[hidden] ** 2).sum()
    assert f"V5 – 0 {percent_of(share, 1)} 20" in page.text
    assert re.search(rf"All leads \S+ % \d+ {re.escape(percent_of(every, 1))} 30", page.text)
    assert "From 2 example windows only" in page.text


def test_render_run_has_alternative_texts_and_captions(tmp_path):
    _, page = page_of(write_run(tmp_path))
    assert len(page.images()) == 2 + 2 + 2 + 2
    assert all(len(attrs["alt"] or "") > 20 for attrs in page.images())
    tags = [tag for tag, _ in page.tags]
    assert tags.count("figure") == tags.count("figcaption") == 1 + 2 + 1 + 1


def test_speed_draws_utilisation_where_logged(tmp_path):
    rows = [row | {"mfu": 0.42} for row in metric_rows()]
    _, page = page_of(write_run(tmp_path, metrics=jsonl(rows)))
    assert len(page.images()) == 9
    assert "MFU 42 %" in page.text


def test_sections_without_data_say_so_in_a_line(tmp_path):
    folder = write_run(tmp_path, config=None, examples=None, data=None, attempts=None)
    _, page = page_of(folder)
    for line in (
        "The run holds no examples of a validation.",
        "The run holds no examples to compare leads on.",
        "The run holds no data.json",
        "The run keeps no record of its attempts.",
        "The run holds no config.yaml.",
        "unnamed run",
    ):
        assert line in page.text


def test_render_run_with_steps_alone_has_no_images(tmp_path):
    folder = write_run(tmp_path, metrics=b'{"step": 1}\n', config=None, examples=None, data=None, attempts=None)
    _, page = page_of(folder)
    assert page.images() == []
    assert "No mask term has a finite value" in page.text
    assert "Neither throughput nor data wait was logged." in page.text


def test_render_run_with_one_step(tmp_path):
    _, page = page_of(write_run(tmp_path, metrics=jsonl(metric_rows()[:1]), attempts=None))
    assert "Steps 1 of 60 planned" in page.text
    assert "No validation result was logged" in page.text


def test_render_run_without_validation(tmp_path):
    _, page = page_of(write_run(tmp_path, metrics=jsonl(metric_rows(validate=0))))
    assert "No validation result was logged" in page.text
    assert "Held-out error" not in page.text
    assert len(page.images()) == 8


def test_render_run_leaves_gaps_at_null_and_nan(tmp_path):
    rows = metric_rows()
    rows[3] |= {"loss": float("nan"), "loss_intra": None, "grad_norm": float("inf")}
    rows[4] |= {"loss_intra": float("nan"), "samples_per_s": None}
    rows[-1] |= {"val_inter": float("nan"), "val_interp_intra": None}
    _, page = page_of(write_run(tmp_path, metrics=jsonl(rows)))
    assert "2 of 60 logged steps have no finite loss_intra" in page.text
    assert "1 of 60 logged steps have no finite grad_norm" in page.text
    assert "nan" not in page.text.lower().replace("unnamed", "")
    assert "Lead-wise (leads" not in page.text, "nothing can be said about a term whose result is not finite"


def test_losses_leaves_out_a_term_that_is_switched_off(tmp_path):
    rows = [row | {"loss_inter": None, "val_inter": None} for row in metric_rows()]
    _, page = page_of(write_run(tmp_path, metrics=jsonl(rows)))
    assert "the lead-wise term is not drawn" in page.text
    assert len(page.images()) == 7


def test_windows_with_two_channels(tmp_path):
    raw = examples_file(example_tensors(n=1, channels=2), ["F3-C3", "F4-C4"], simulated=False)
    _, page = page_of(write_run(tmp_path, examples=raw))
    assert "1 held-out window as" in page.text
    assert "hidden F3-C3" in page.text


def test_render_run_escapes_markup(tmp_path):
    evil = "<script>alert('x')</script>\" onload=\"y"
    data = data_json()
    data["indexes"][0]["url"] = f"s3://b/{evil}"
    folder = write_run(
        tmp_path,
        config=config_yaml(evil).encode(),
        data=json.dumps(data).encode(),
        examples=examples_file(example_tensors(n=1, channels=2), [evil, "B"]),
    )
    text, page = page_of(folder)
    assert_escaped(text, page, evil)


def test_credentials_stay_out(tmp_path):
    text, _ = page_of(write_run(tmp_path))
    assert "secret" not in text
    assert "s3://bucket/ecg/index.json" in text


def test_render_run_notes_an_unfinished_line(tmp_path):
    _, page = page_of(write_run(tmp_path, metrics=jsonl(metric_rows()) + b'{"step": 61, "lo'))
    assert "last line of metrics.jsonl was not finished" in page.text


def test_render_run_is_deterministic(tmp_path):
    read = reader(write_run(tmp_path))
    assert render(read) == render(read)


def test_render_raises_on_an_empty_directory(tmp_path):
    with pytest.raises(UserError, match=r"neither metrics\.jsonl .* nor results\.json .*run\.dir/run\.name"):
        render(reader(tmp_path))
