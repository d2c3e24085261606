"""What a Ray job may and may not name; clusters themselves are in tests/system/test_launch.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from physio_dist import cluster
from physio_dist.errors import UserError


def test_outside_a_job_relative_paths_hold_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert not cluster.inside_job()
    assert cluster.durable("runs", "run.dir") == f"{tmp_path}/runs"
    assert cluster.durable("s3://bucket/runs/", "run.dir") == "s3://bucket/runs"


def test_inside_a_job_relative_paths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert cluster.inside_job()
    for url in ("runs", "./runs", "file://runs"):
        with pytest.raises(UserError, match=f"run.dir={url} is relative.*absolute path.*s3://"):
            cluster.durable(url, "run.dir")
    assert cluster.durable(f"{tmp_path}/runs", "run.dir") == f"{tmp_path}/runs"
    assert cluster.durable(f"file://{tmp_path}/runs", "run.dir") == f"{tmp_path}/runs"
    assert cluster.durable("~/runs", "run.dir") == str(Path.home() / "runs")
    assert cluster.durable("s3://bucket/runs", "run.dir") == "s3://bucket/runs"
