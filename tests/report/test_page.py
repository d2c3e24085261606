"""Several runs on one page."""

from __future__ import annotations

import re

import pytest

from physio_dist.errors import UserError
from physio_dist.report.page import render
from tests.report.report_samples import Page, jsonl, metric_rows, reader
from tests.report.sweep_samples import write_sweep

pytestmark = pytest.mark.integration


def test_render_gives_several_runs_unique_anchors(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, name in ((first, "of-ecg"), (second, "of-eeg")):
        folder.mkdir()
        (folder / "metrics.jsonl").write_bytes(jsonl(metric_rows()))
        (folder / "config.yaml").write_text(f"run:\n  name: {name}\n")
    (tmp_path / "sweep").mkdir()
    third = write_sweep(tmp_path / "sweep")
    text = render(reader(first), reader(second), reader(third))
    alone = [render(reader(folder)) for folder in (first, second, third)]
    anchors = re.findall(r'\bid="([^"]+)"', text)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r'href="#([^"]+)"', text)) <= set(anchors)
    assert len(re.findall(r"<h2>", text)) == sum(len(re.findall(r"<h2>", page)) for page in alone)
    heads = re.findall(r"<h1>(.*?)</h1>", text)
    assert heads[:2] == ["of-ecg", "of-eeg"]
    assert len(heads) == 3
    for page in alone:
        assert set(Page(page).text.split()) <= set(Page(text).text.split())
        assert 'class="runs"' not in page


def test_render_raises_on_a_directory_without_a_run(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_bytes(jsonl(metric_rows()))
    with pytest.raises(UserError, match=r"neither metrics\.jsonl"):
        render(reader(tmp_path / "a"), reader(tmp_path / "nothing"))
