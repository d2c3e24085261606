"""Conversions that are killed, stopped, crowded and pointed at a bucket: in the end the set is the same."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import pytest

from tests.conftest import S3

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

# 100 records in four parts and five shards.
WORDS = ["shard", "simulate", "people=100,windows=2,seed=6", "unusable=keep", "samples_per_shard=40", "workers=2"]


def start(
    out: str | Path, *more: str, env: dict[str, str] | None = None, group: bool = False, words: Sequence[str] = WORDS
) -> subprocess.Popen[str]:
    """The conversion in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "physio_dist.cli", *words, "--out", str(out), *more],
        env={**os.environ, **(env or {})}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=group,
    )  # fmt: skip


def content(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wait_for(what: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    for _ in range(3000):
        if what():
            return
        assert process is None or process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.01)
    raise AssertionError("it never came to that")


def all_gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    orphans = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in orphans:
        process.kill()
    return not orphans


def kill(process: subprocess.Popen[str]) -> None:
    """End it without warning; its children end with it."""
    children = family(process)
    process.kill()
    process.wait()
    assert all_gone(children)
    process.communicate()


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Those of its children that convert, not the one that tracks resources."""
    found = []
    for child in family(process):
        try:
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def parts(out: Path) -> int:
    return len(list(out.glob(".work-*/part-*.safetensors")))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of the set that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    process = start(out)
    process.communicate(timeout=120)
    assert process.returncode == 0
    found = content(out)
    assert sorted(found) == [
        *(f"ecg-{n:06d}.tar" for n in range(5)),
        "index.json",
        "rejects.jsonl",
        "samples.safetensors",
    ]
    return found


def finish(out: Path, undisturbed: dict[str, bytes], words: Sequence[str] = WORDS) -> None:
    """Run the same command to its end: the set is the undisturbed one and nothing else lies there."""
    process = start(out, words=words)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert content(out) == undisturbed
    assert list(out.glob(".*")) == []


def test_conversion_killed_at_random_resumes_to_same_bytes(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out, rng, kills = tmp_path / "set", random.Random(5), 0
    for _ in range(3):
        process = start(out)
        # The first seconds are imports; what matters comes after.
        time.sleep(rng.uniform(0.6, 1.6))
        killed = process.poll() is None
        kill(process)
        if not killed:
            break
        kills += 1
    assert kills >= 1
    finish(out, undisturbed)


@pytest.mark.parametrize("moment", ["first part", "first shard", "sample table", "index"])
def test_conversion_killed_at_critical_moment_resumes_to_same_bytes(
    tmp_path: Path, undisturbed: dict[str, bytes], moment: str
) -> None:
    out = tmp_path / "set"
    reached = {
        "first part": lambda: parts(out) >= 1,
        "first shard": lambda: any(out.glob("*.tar")),
        "sample table": (out / "samples.safetensors").exists,
        "index": (out / "index.json").exists,
    }[moment]
    process = start(out)
    wait_for(reached, process if moment.startswith("first") else None)
    kill(process)
    finish(out, undisturbed)


def test_resumed_conversion_keeps_finished_parts(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "set"
    process = start(out)
    wait_for(lambda: parts(out) >= 2, process)
    kill(process)
    kept = {path: path.stat().st_mtime_ns for path in out.glob(".work-*/part-*.safetensors")}
    again = start(out)
    wait_for(lambda: parts(out) == 4, again)
    again.send_signal(signal.SIGSTOP)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    again.send_signal(signal.SIGCONT)
    again.communicate(timeout=120)
    assert again.returncode == 0
    assert content(out) == undisturbed


def test_damaged_part_is_converted_again(tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    out = tmp_path / "set"
    process = start(out)
    wait_for(lambda: parts(out) >= 1, process)
    kill(process)
    part = next(out.glob(".work-*/part-*.safetensors"))
    os.truncate(part, part.stat().st_size // 2)
    finish(out, undisturbed)


def test_killed_worker_ends_conversion_with_advice_and_resume_works(
    tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    out = tmp_path / "set"
    process = start(out)
    wait_for(lambda: parts(out) >= 1 and workers(process), process)
    children = family(process)
    workers(process)[0].kill()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "a conversion process was killed (out of memory, or by hand); run the same command again" in told
    assert "Traceback" not in told
    assert all_gone(children)
    finish(out, undisturbed)


@pytest.mark.parametrize(
    ("signum", "whole_group"), [(signal.SIGINT, True), (signal.SIGTERM, False), (signal.SIGTERM, True)]
)
def test_interrupted_conversion_ends_with_status_75_and_resumes(
    tmp_path: Path, undisturbed: dict[str, bytes], signum: signal.Signals, whole_group: bool
) -> None:
    out = tmp_path / "set"
    process = start(out, group=True)
    wait_for(lambda: parts(out) >= 1, process)
    children = family(process)
    # A terminal signals the whole group, `kill` one process; schedulers do either.
    os.killpg(process.pid, signum) if whole_group else process.send_signal(signum)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    said = [line for line in told.splitlines() if not line.startswith(("reading: ", "writing: "))]
    assert said == [
        "physio-dist: stopped: interrupted; the same command goes on where it can (exit status 75)"
    ]  # fmt: skip
    assert all_gone(children)
    finish(out, undisturbed)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_workers_ignore_signals(tmp_path: Path, undisturbed: dict[str, bytes], signum: signal.Signals) -> None:
    out = tmp_path / "set"
    process = start(out)
    wait_for(lambda: workers(process), process)
    for _ in range(100):
        for worker in workers(process):
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.send_signal(signum)
        time.sleep(0.01)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert content(out) == undisturbed


def test_ctrl_c_during_worker_startup_prints_no_traceback(tmp_path: Path) -> None:
    process = start(tmp_path / "set", group=True)
    wait_for(lambda: workers(process), process)
    children = family(process)
    os.killpg(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75, told
    assert "Traceback" not in told
    assert all_gone(children)


def test_concurrent_conversion_to_same_target_is_refused(
    tmp_path: Path, undisturbed: dict[str, bytes], cli: Cli
) -> None:
    out = tmp_path / "set"
    process = start(out)
    wait_for(lambda: parts(out) >= 1, process)
    process.send_signal(signal.SIGSTOP)
    same = cli(*WORDS, "--out", out)
    other = cli(*WORDS, "--out", out, "leads=I,II")
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=120)
    assert (same.returncode, other.returncode, process.returncode) == (2, 2, 0)
    assert "another conversion is writing" in same.stderr
    assert "holds an unfinished conversion of other data or with other options" in other.stderr
    assert content(out) == undisturbed


def test_bucket_conversion_killed_resumes_to_same_bytes(
    tmp_path: Path, undisturbed: dict[str, bytes], s3: S3, cli: Cli
) -> None:
    env = {**s3.env, "XDG_CACHE_HOME": str(tmp_path)}
    process = start(s3.bucket + "/deep/set", env=env)
    wait_for((s3.folder / "deep" / "set" / "ecg-000001.tar").exists, process)
    kill(process)
    done = cli(*WORDS, "--out", s3.bucket + "/deep/set", env=env)
    assert done.returncode == 0, done.stderr
    assert content(s3.folder / "deep" / "set") == undisturbed
    assert content(tmp_path) == {}
    assert cli(*WORDS, "--out", s3.bucket + "/deep/set/", env=env).stdout.startswith("already there")
    assert cli("verify", s3.bucket + "/deep/set", env=env).returncode == 0


def test_conversion_survives_bucket_outage(tmp_path: Path, undisturbed: dict[str, bytes], s3: S3) -> None:
    # An endpoint that has answered once is waited for longer than one that never has, by the workers too.
    env = {**s3.env, "XDG_CACHE_HOME": str(tmp_path), "PHYSIO_DIST_STORAGE_FIRST_CONTACT_S": "0.5"}
    process = start(s3.bucket, env=env)
    wait_for((s3.folder / "_writing.json").exists, process)
    s3.stop()
    wait_for(lambda: list(tmp_path.glob("physio-dist/convert/*/ecg-*.tar")), process)
    time.sleep(3)
    assert process.poll() is None
    s3.start()
    _, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert content(s3.folder) == undisturbed


def test_ctrl_c_during_bucket_outage_ends_conversion(tmp_path: Path, s3: S3) -> None:
    process = start(s3.bucket, env={**s3.env, "XDG_CACHE_HOME": str(tmp_path)}, group=True)
    wait_for((s3.folder / "_writing.json").exists, process)
    s3.stop()
    wait_for(lambda: list(tmp_path.glob("physio-dist/convert/*/ecg-*.tar")), process)
    children = family(process)
    os.killpg(process.pid, signal.SIGINT)
    # The outage's budget is five minutes.
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert all_gone(children)


def test_real_recordings_convert_and_verify(real: Path, cli: Cli) -> None:
    assert cli("verify", real).returncode == 0
    told = cli("inspect", real).stdout
    assert "acceptable: 1 x 773, 0 x 1" in told
    index = json.loads((real / "index.json").read_text())
    assert index["physio_dist"]["simulated"] is False


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.chaos), 2])
def test_real_conversion_killed_at_random_resumes_to_same_bytes(
    tmp_path: Path, real: Path, real_words: list[str], processes: int
) -> None:
    out, rng, words = tmp_path / "set", random.Random(processes), [*real_words, f"workers={processes}"]
    for so_far in range(3):
        process = start(out, words=words)
        # Past the imports, and past what the tries before it had come to.
        wait_for(lambda least=so_far: parts(out) > least, process)
        time.sleep(rng.uniform(0, 2))
        assert process.poll() is None
        kill(process)
    finish(out, content(real), words)
