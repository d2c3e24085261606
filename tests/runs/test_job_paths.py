"""What a Ray job may and may not name."""

from __future__ import annotations

from pathlib import Path

import pytest

from physio_dist import cli
from physio_dist.errors import UserError
from physio_dist.runs import job_paths
from physio_dist.runtime import exit_status
from physio_dist.storage import StorageError


def test_outside_a_job_relative_paths_hold_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert not job_paths.inside_ray_job()
    assert job_paths.resolve_durable("runs", "run.dir") == f"{tmp_path}/runs"
    assert job_paths.resolve_durable("s3://bucket/runs/", "run.dir") == "s3://bucket/runs"


def test_inside_a_job_relative_paths_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert job_paths.inside_ray_job()
    for url in ("runs", "./runs", "file://runs"):
        with pytest.raises(UserError, match=f"run.dir={url} is relative.*absolute path.*s3://"):
            job_paths.resolve_durable(url, "run.dir")
    assert job_paths.resolve_durable(f"{tmp_path}/runs", "run.dir") == f"{tmp_path}/runs"
    assert job_paths.resolve_durable(f"file://{tmp_path}/runs", "run.dir") == f"{tmp_path}/runs"
    assert job_paths.resolve_durable("~/runs", "run.dir") == str(Path.home() / "runs")
    assert job_paths.resolve_durable("s3://bucket/runs", "run.dir") == "s3://bucket/runs"


@pytest.mark.parametrize(
    "words",
    [
        "shard simulate people=2 --out out", "embed --encoder nowhere --data nowhere --out out", "export nowhere out",
        "folds --config configs/tune/eegmat.yaml --out out tune.data=nowhere tune.encoders.ecg=x tune.encoders.eeg=x",
        "probe --config configs/probe/quality.yaml run.dir=out",
    ],
    ids=lambda words: words.partition(" ")[0],
)  # fmt: skip
def test_what_verbs_write_outlasts_a_job(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert exit_status.status_of(lambda: cli._run(words.split())) == 2
    assert "=out is relative, and a Ray job's working directory vanishes with the job" in capsys.readouterr().err


def test_credentials_in_a_url_are_refused_before_they_are_told() -> None:
    with pytest.raises(StorageError, match="s3://bucket/runs: the URL carries") as raised:
        job_paths.resolve_durable("s3://name:word@bucket/runs", "run.dir")
    assert "word@" not in str(raised.value)
