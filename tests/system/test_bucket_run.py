"""Data and run in a bucket: what is promised of a local run holds there too."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import S3
from tests.system.launching import Run, end_session, physio, wait_until

Make = Callable[..., Run]


@pytest.fixture()
def bucket_run(s3: S3, simulated: str, tmp_path: Path) -> Run:
    """A run whose shards and directory are in the bucket; the bucket is a folder, so it can be looked into."""
    run = Run(tmp_path, "run", f"{s3.bucket}/shards", env=s3.env, run_dir=f"{s3.bucket}/runs")
    shutil.copytree(simulated, s3.folder / "shards")
    return run


class Seen(Run):
    """The same run, seen through the folder that the server serves."""

    @property
    def path(self) -> Path:
        return Path(self.index)


def seen(run: Run, s3: S3) -> Run:
    folder = s3.root / run.url.split("://", 1)[1]
    return Seen(run.folder, run.name, str(folder))


def test_killed_bucket_run_resumes_bit_equal(bucket_run: Run, s3: S3, undisturbed: Make) -> None:
    there = seen(bucket_run, s3)
    process = bucket_run.start(launcher="deepspeed")
    moment = random.choice(["step-00000005", "step-00000010"])
    print(moment)
    try:
        wait_until(lambda: (there.path / "checkpoints" / moment / "manifest.json").exists(), moment)
        # Up to the checkpoint's step everything is in the bucket before its manifest.
        at = int(moment[-2:])
        assert list(there.metrics())[:at] == list(range(1, at + 1))
        assert set(range(1, at + 1)) <= set(there.trace())
        random.choice(bucket_run.ranks()).kill()
        assert process.wait(timeout=60) != 0
        wait_until(lambda: not bucket_run.ranks(), "the ranks to end")
    finally:
        end_session(process)
    assert bucket_run() == 0, bucket_run.said()
    reference = undisturbed()
    assert there.trace() == reference.trace()
    ours, theirs = there.metrics(), reference.metrics()
    assert [line["loss"] for line in ours.values()] == [line["loss"] for line in theirs.values()]
    assert list((there.path / "tensorboard").iterdir())
    secret = s3.env["AWS_SECRET_ACCESS_KEY"]
    for file in there.path.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file
    # The node's spool of the run is gone.
    assert not list((bucket_run.folder / "xdg" / "physio-dist" / "runs").rglob("*.jsonl"))


def test_export_and_report_read_bucket_run(bucket_run: Run, s3: S3, tmp_path: Path) -> None:
    bucket_run.options = ("train.steps=6", "train.val_every=3")
    assert bucket_run() == 0, bucket_run.said()
    for words in (("export", bucket_run.url, str(tmp_path / "encoder")), ("report", bucket_run.url)):
        done = physio(*words, env=s3.env)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "encoder" / "config.json").read_text())["step"] == 6
    assert (seen(bucket_run, s3).path / "report.html").stat().st_size > 10_000


def test_wrong_credentials_give_one_message(bucket_run: Run, s3: S3) -> None:
    bucket_run.env = {**s3.env, "AWS_SECRET_ACCESS_KEY": "wrong"}
    assert bucket_run() == 2
    messages = [line for line in bucket_run.said().splitlines() if "(exit status" in line]
    assert len(messages) == 1, bucket_run.said()
    assert "AWS_SECRET_ACCESS_KEY" in messages[0]
    assert "wrong" not in messages[0].replace("wrong input", "")


def test_bucket_run_survives_storage_outage(bucket_run: Run, s3: S3, undisturbed: Make) -> None:
    there = seen(bucket_run, s3)
    process = bucket_run.start()
    try:
        wait_until(lambda: "step 6/16" in bucket_run.said(), "step 6")
        s3.stop()
        # Long enough to meet the checkpoint of step 10.
        time.sleep(10)
        assert process.poll() is None, bucket_run.said()
        s3.start()
        assert process.wait(timeout=200) == 0, bucket_run.said()
    finally:
        end_session(process)
    assert there.trace() == undisturbed().trace()


def test_second_launcher_is_refused_by_live_bucket_run(bucket_run: Run, s3: S3) -> None:
    bucket_run.options = ("train.steps=100000", "train.save_every=20")
    process = bucket_run.start()
    try:
        wait_until(lambda: "step 5/" in bucket_run.said(), "step 5")
        first = bucket_run.folder / "first.log"
        bucket_run.log.rename(first)  # the open file moves along
        config = (seen(bucket_run, s3).path / "config.yaml").read_bytes()
        assert bucket_run(launcher="deepspeed", extra=("train.steps=200000", "train.precision=bf16")) == 2
        assert "is live" in bucket_run.said()
        assert "Traceback" not in bucket_run.said()
        assert process.poll() is None, first.read_text()
        assert len(bucket_run.ranks()) == 2
        assert (seen(bucket_run, s3).path / "config.yaml").read_bytes() == config
    finally:
        end_session(process)


def test_credentials_in_url_are_refused_and_not_logged(bucket_run: Run) -> None:
    bucket_run.index = "http://user:hunter2@127.0.0.1:1/set"
    bucket_run.run_dir = None
    assert bucket_run() == 2
    assert "hunter2" not in next(line for line in bucket_run.said().splitlines() if "(exit status" in line)
    assert not bucket_run.path.exists() or not list(bucket_run.path.rglob("*.yaml"))
