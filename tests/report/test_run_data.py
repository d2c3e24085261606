"""Files of a run directory: what is understood, and which message a broken one gets."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from physio_dist.errors import UserError
from physio_dist.report.run_data import load_run, parse_examples, parse_metrics, without_credentials
from tests.report.report_samples import LEADS, example_tensors, examples_file, jsonl, metric_rows, reader, write_run


def test_parse_metrics_turns_null_and_nan_into_nan():
    raw = b'{"step": 1, "loss": 2.5, "lr": null}\n{"step": 2, "loss": NaN, "lr": 0.1, "mfu": Infinity}\n'
    metrics = parse_metrics(raw)
    assert metrics.rows == 2
    np.testing.assert_array_equal(metrics.column("loss"), [2.5, math.nan])
    np.testing.assert_array_equal(metrics.column("lr"), [math.nan, 0.1])
    assert not metrics.has("mfu")
    assert metrics.column("never logged").shape == (2,)
    assert metrics.median("loss") == 2.5
    assert metrics.last_validation() is None


@pytest.mark.parametrize("raw", [None, b"", b"\n \n"])
def test_parse_metrics_raises_without_lines(raw):
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        parse_metrics(raw)


@pytest.mark.parametrize(
    "line",
    [
        b"not json",
        b'{"step": 2, "loss": 1',
        b"[1, 2]",
        b'{"loss": 1.0}',
        b'{"step": "two"}',
        b'{"step": 2, "loss": "a"}',
    ],
)
def test_parse_metrics_names_a_damaged_line(line):
    raw = b'{"step": 1, "loss": 1.0}\n\n' + line + b'\n{"step": 3, "loss": 1.0}\n'
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 3"):
        parse_metrics(raw)


def test_parse_metrics_raises_on_a_terminated_damaged_last_line():
    with pytest.raises(UserError, match="line 2"):
        parse_metrics(b'{"step": 1}\n{"step": 2, "lo\n')


def test_parse_metrics_leaves_out_an_unfinished_last_line():
    metrics = parse_metrics(b'{"step": 1}\n{"step": 2, "lo')
    assert metrics.unfinished
    assert metrics.rows == 1


def test_parse_metrics_replaces_replayed_steps():
    steps = [(1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25), (3, 0.35)]
    metrics = parse_metrics(jsonl([{"step": step, "loss": loss} for step, loss in steps]))
    np.testing.assert_array_equal(metrics.column("step"), [1, 2, 3])
    np.testing.assert_array_equal(metrics.column("loss"), [0.1, 0.25, 0.35])


def test_parse_examples_returns_all_tensors():
    tensors = example_tensors(n=2)
    examples = parse_examples(examples_file(tensors, LEADS))
    np.testing.assert_array_equal(examples.target, tensors["target"])
    assert examples.patch_samples == 200
    assert examples.channels == LEADS
    assert examples.keys == ["rec000-00", "rec001-00"]
    assert examples.simulated is True
    assert examples.rate == 200
    hidden = examples.hidden_samples("inter")
    assert hidden[0, 10].all() and not hidden[0, 1].any()
    assert not examples.hidden_samples("intra")[0, 5].any(), "an invalid lead is never scored"


def test_parse_examples_counts_a_patch_hidden_both_ways_as_inter():
    tensors = example_tensors(n=1)
    tensors["intra"][0, 10] = 1
    examples = parse_examples(examples_file(tensors, LEADS))
    assert not examples.intra[0, 10].any()
    assert examples.inter[0, 10].all()


@pytest.mark.parametrize("fault", ["bytes", "tensor", "shape", "names", "patches"])
def test_parse_examples_raises_on_damage(fault):
    tensors = example_tensors(n=1)
    if fault == "tensor":
        del tensors["valid"]
    if fault == "shape":
        tensors["reconstruction"] = tensors["reconstruction"][:, :, :-1].copy()
    if fault == "patches":
        tensors |= {key: np.zeros((1, 12, 7), np.uint8) for key in ("intra", "inter")}
    raw = examples_file(tensors, LEADS[:5] if fault == "names" else LEADS)
    with pytest.raises(UserError, match=r"examples\.safetensors"):
        parse_examples(b"\x00" * 40 if fault == "bytes" else raw)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"config": b"a: [1"}, "config.yaml"),
        ({"config": b"- 1"}, "config.yaml"),
        ({"data": b"{"}, "data.json"),
        ({"data": b"[]"}, "data.json"),
        ({"attempts": b'{"attempt": 1}'}, "attempts.json"),
        ({"attempts": b"[1]"}, "attempts.json"),
    ],
)
def test_load_run_names_a_damaged_file(tmp_path, changes, name):
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        load_run(reader(write_run(tmp_path, **changes)))


def test_restarts_come_from_attempts(tmp_path):
    restarts = load_run(reader(write_run(tmp_path))).restarts()
    assert restarts.steps == [30.0]
    assert restarts.from_attempts


def test_restarts_without_attempts_are_long_pauses(tmp_path):
    rows = metric_rows()
    for row in rows[40:]:
        row["time"] += 600
    restarts = load_run(reader(write_run(tmp_path, metrics=jsonl(rows), attempts=None))).restarts()
    assert restarts.steps == [40.0]
    assert not restarts.from_attempts


def test_restarts_ignore_a_slow_validation(tmp_path):
    rows = metric_rows()
    for row in rows[40:]:
        row["time"] += 30
    assert load_run(reader(write_run(tmp_path, metrics=jsonl(rows), attempts=None))).restarts().steps == []


def test_option_of_a_dotted_path(tmp_path):
    run = load_run(reader(write_run(tmp_path)))
    assert run.option("train.lr") == 0.0005
    assert run.option("train.lr.deeper") is None
    assert run.option("no.such") is None
    assert run.simulated() == [True]


def test_simulated_falls_back_to_examples(tmp_path):
    raw = json.dumps({"indexes": [{"url": "u"}]}).encode()
    assert load_run(reader(write_run(tmp_path, data=raw))).simulated() == [True]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("url: s3://key:secret@bucket/a", "url: s3://bucket/a"),
        ("'https://h/a?X-Sig=abc&b=1'", "'https://h/a'"),
        ("plain: a@b.c, x?y", "plain: a@b.c, x?y"),
    ],
)
def test_without_credentials_removes_secrets_of_urls(text, shown):
    assert without_credentials(text) == shown
