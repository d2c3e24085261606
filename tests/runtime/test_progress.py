"""Progress without a terminal."""

from __future__ import annotations

import pytest

from physio_dist.runtime.progress import Progress


def test_update_prints_a_line_each_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(20, "records", "reading") as progress:
        for _ in range(20):
            progress.update()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10 and lines[0] == "reading: 2 of 20 records"


def test_report_logs_step_text_and_time_left() -> None:
    lines: list[str] = []
    progress = Progress(10, "step", initial=4, log=lines.append)
    progress.report(10, "loss 0.5")
    assert lines == ["step 10/10: loss 0.5, ETA 00:00:00"]
