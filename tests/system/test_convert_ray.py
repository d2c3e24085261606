"""Conversions on two real Ray nodes: disturbed or not, the set is the one that this machine alone makes."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import S3
from tests.system.clusters import Cluster, ask
from tests.system.launching import BIN, ROOT, end_session, free_port
from tests.system.test_convert import WORDS, content, finish, kill, parts, start, wait_for
from tests.system.test_convert import undisturbed as undisturbed

pytestmark = pytest.mark.xdist_group("ray")


@pytest.fixture()
def on_nodes(ray_nodes: Cluster) -> Callable[..., subprocess.Popen[str]]:
    """Starts the conversion of ``WORDS`` on the two nodes."""

    def begin(out: str | Path, *more: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        return start(out, "ray=auto", *more, env={**ray_nodes.env, **(env or {})})

    return begin


Begin = Callable[..., "subprocess.Popen[str]"]


def at_work(ray_nodes: Cluster, task: str = "make_") -> list[psutil.Process]:
    """Processes of the nodes that do a task of a conversion."""
    found = []
    for process in ray_nodes.processes():
        with contextlib.suppress(psutil.Error):
            if f"ray::{task}" in " ".join(process.cmdline()):
                found.append(process)
    return found


def ended(process: subprocess.Popen[str], status: int = 0) -> tuple[str, list[str]]:
    """Standard output, and the lines of standard error without progress and the cluster's addresses."""
    try:
        out, told = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == status, told
    quiet = ("reading: ", "writing: ", "physio-dist: Ray cluster at ", "physio-dist: dashboard: ")
    return out, [line for line in told.splitlines() if not line.startswith(quiet)]


def test_conversion_on_two_nodes_gives_same_bytes(
    tmp_path: Path, undisturbed: dict[str, bytes], ray_nodes: Cluster, on_nodes: Begin
) -> None:
    out = tmp_path / "set"
    printed, told = ended(on_nodes(out))
    assert told == []
    assert printed.splitlines()[0].startswith("200 windows of 100 people from 100 records in 5 shards")
    assert printed.splitlines()[1].endswith(" records/s")
    assert content(out) == undisturbed
    tasks: dict[str, Any] = {}

    def known() -> bool:
        asked = ask(f"{ray_nodes.dashboard}/api/v0/tasks?detail=1&limit=1000", ray_nodes.env["RAY_AUTH_TOKEN"])
        found = asked["data"]["result"]["result"] if asked else []
        tasks.update({task["task_id"]: task for task in found if task["name"] == "make_part" and task["node_id"]})
        return len(tasks) >= 4

    wait_for(known)
    assert len(tasks) == 4
    assert len({task["node_id"] for task in tasks.values()}) == 2
    printed, _ = ended(on_nodes(out))
    assert printed.startswith("already there")
    assert "records/s" not in printed


def test_lost_ray_worker_repeats_only_its_part(
    tmp_path: Path, undisturbed: dict[str, bytes], ray_nodes: Cluster, on_nodes: Begin
) -> None:
    out = tmp_path / "set"
    process = on_nodes(out)
    wait_for(lambda: parts(out) >= 1 and at_work(ray_nodes, "make_part"), process)
    at_work(ray_nodes, "make_part")[0].kill()
    ended(process)
    assert content(out) == undisturbed


def test_killed_driver_leaves_parts_for_local_resume(
    tmp_path: Path, undisturbed: dict[str, bytes], ray_nodes: Cluster, on_nodes: Begin
) -> None:
    out = tmp_path / "set"
    process = on_nodes(out)
    wait_for(lambda: parts(out) >= 2, process)
    kill(process)
    wait_for(lambda: not at_work(ray_nodes))
    kept = {path: path.stat().st_mtime_ns for path in out.glob(".work-*/part-*.safetensors")}
    assert kept
    again = start(out)
    wait_for(lambda: parts(out) == 4, again)
    again.send_signal(signal.SIGSTOP)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again.send_signal(signal.SIGCONT)
    ended(again)
    assert content(out) == undisturbed


def test_killed_bucket_conversion_resumes_with_and_without_cluster(
    tmp_path: Path, undisturbed: dict[str, bytes], ray_nodes: Cluster, on_nodes: Begin, s3: S3
) -> None:
    env = {**s3.env, "XDG_CACHE_HOME": str(tmp_path)}
    out, there = s3.bucket + "/deep/set", s3.folder / "deep" / "set"
    process = on_nodes(out, env=env)
    wait_for(lambda: parts(there) >= 1, process)
    kill(process)
    wait_for(lambda: not at_work(ray_nodes))
    kept = {path: path.stat().st_mtime_ns for path in there.glob(".work-*/part-*.safetensors")}
    assert kept
    # The parts are in the bucket, where a machine by itself finds them too.
    process = start(out, env=env)
    wait_for((there / "ecg-000001.tar").exists, process)
    process.send_signal(signal.SIGSTOP)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    kill(process)
    printed, _ = ended(on_nodes(out, env=env))
    assert "records/s" not in printed
    assert content(there) == undisturbed
    assert content(tmp_path) == {}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_ray_conversion_ends_with_status_75_and_cancels_tasks(
    tmp_path: Path, undisturbed: dict[str, bytes], ray_nodes: Cluster, on_nodes: Begin, signum: signal.Signals
) -> None:
    out = tmp_path / "set"
    process = on_nodes(out)
    wait_for(lambda: parts(out) >= 1, process)
    process.send_signal(signum)
    _, told = ended(process, 75)
    assert told == ["physio-dist: stopped: interrupted; the same command goes on where it can (exit status 75)"]
    wait_for(lambda: not at_work(ray_nodes))
    finish(out, undisturbed)


def test_task_error_ends_conversion_with_its_status(tmp_path: Path, ray_nodes: Cluster, on_nodes: Begin) -> None:
    out = tmp_path / "set"
    process = on_nodes(out)
    wait_for(lambda: parts(out) >= 1, process)
    (work,) = out.glob(".work-*")
    work.rename(tmp_path / "moved")
    work.write_bytes(b"in the way")
    _, told = ended(process, 2)
    assert len(told) == 1, told
    line = told[0]
    assert f"cannot write {work}/part-" in line or f"{work}/seen-" in line
    assert f"(on node {os.uname().nodename}) (exit status 2)" in line


def test_missing_cluster_and_wrong_token_give_one_line(tmp_path: Path, ray_nodes: Cluster, on_nodes: Begin) -> None:
    nowhere, began = f"127.0.0.1:{free_port()}", time.monotonic()
    _, told = ended(start(tmp_path / "set", f"ray={nowhere}"), 2)
    (line,) = told
    assert f"no Ray cluster answers at {nowhere}" in line
    assert "correct ray, or set it to local" in line
    _, told = ended(on_nodes(tmp_path / "set", env={"RAY_AUTH_TOKEN": "0" * 64}), 2)
    assert "wants a token, and there is none or a wrong one" in told[-1]
    assert time.monotonic() - began < 60
    assert not (tmp_path / "set").exists()


def submitted(ray_nodes: Cluster, out: str) -> subprocess.CompletedProcess[str]:
    """The conversion as a job of the cluster."""
    job = [sys.executable, "-m", "physio_dist.cli", *WORDS, "--out", out, "ray=auto"]
    submit = [str(BIN / "ray"), "job", "submit", "--address", ray_nodes.dashboard, "--working-dir", str(ROOT), "--"]
    process = subprocess.Popen(
        [*submit, *job], env={**os.environ, **ray_nodes.env}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        told, _ = process.communicate(timeout=180)
    finally:
        end_session(process)
    return subprocess.CompletedProcess(submit, process.returncode, told)


def test_submitted_job_converts_into_bucket(undisturbed: dict[str, bytes], ray_nodes: Cluster, s3: S3) -> None:
    done = submitted(ray_nodes, s3.bucket)
    assert done.returncode == 0, done.stdout
    assert "200 windows of 100 people from 100 records in 5 shards" in done.stdout
    assert content(s3.folder) == undisturbed


def test_submitted_job_refuses_relative_path(ray_nodes: Cluster) -> None:
    done = submitted(ray_nodes, "set")
    assert done.returncode != 0
    assert "--out=set is relative, and a Ray job's working directory vanishes with the job" in done.stdout


def test_real_conversion_survives_lost_node(
    real: Path, real_words: list[str], tmp_path: Path, ray_nodes: Cluster
) -> None:
    spread = tmp_path / "spread"
    process = subprocess.Popen(
        [sys.executable, "-m", "physio_dist.cli", *real_words, "--out", str(spread), "ray=auto"],
        env={**os.environ, **ray_nodes.env}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    wait_for(lambda: parts(spread) >= 4, process)
    ray_nodes.lose_node()
    try:
        wait_for(lambda: parts(spread) >= 8, process)
    finally:
        ray_nodes.add_node()
    ended(process)
    assert content(spread) == content(real)


@pytest.mark.parametrize("unseen", ["input", "out"])
def test_node_without_shared_folder_is_named(data_dir: Path, tmp_path: Path, ray_nodes: Cluster, unseen: str) -> None:
    hidden, source, out = tmp_path / "hidden", tmp_path / "in", tmp_path / "set"
    hidden.mkdir()
    if unseen == "input":
        source = hidden
    else:
        source.mkdir()
        out = hidden / "set"
    for file in sorted((data_dir / "cinc2011-set-a").glob("*.hea"))[:160]:
        shutil.copyfile(file, source / file.name)
        shutil.copyfile(file.with_suffix(".dat"), source / file.with_suffix(".dat").name)
    ray_nodes.add_node(hidden=hidden)
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "physio_dist.cli", "shard", "wfdb", str(source), "--out", str(out), "ray=auto"],
            env={**os.environ, **ray_nodes.env}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        _, told = ended(process, 2)
    finally:
        ray_nodes.lose_node()
    assert len(told) == 1, told
    line = told[0]
    if unseen == "input":
        assert f"{source} is not the folder that it is where the command was started" in line
    else:
        assert "--out is not on a file system that all nodes share" in line
    assert f"(on node {os.uname().nodename})" in line
    assert not (out / "index.json").exists()
