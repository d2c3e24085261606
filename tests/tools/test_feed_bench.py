"""The bench of the feed, tiny and without the libraries that it is compared with: its forms, not its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--samples", 64, "--batch", 16, "--repeats", 2, "--peers", "none")


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the bench to its end."""
    command = [sys.executable, ROOT / "tools" / "bench" / "feed.py", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_feed_bench_last_line_has_all_fields(tmp_path: Path) -> None:
    done = bench(*TINY, "--work", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert list(result) == ["bench", "ours", "peers", "unit", "ratio", "ratio_to", "n", "also"]
    assert (result["bench"], result["unit"], result["n"]) == ("feed", "samples/s", 2)
    assert result["ours"] > 0
    assert (result["peers"], result["ratio"], result["ratio_to"]) == ({}, None, None)
    cold, second = result["also"]["cold"], result["also"]["second_epoch"]
    assert cold["ratio_to_client"] == pytest.approx(cold["ours"] / cold["client"], abs=2e-3)
    assert cold["ratio_to_http"] == pytest.approx(cold["ours"] / cold["http"], abs=2e-3)
    assert second["ratio_to_local"] == pytest.approx(second["ours"] / second["local"], abs=2e-3)


def test_feed_bench_refuses_loader_with_other_samples(tmp_path: Path) -> None:
    made = bench(*TINY, "--work", tmp_path, "--only", "warm")
    assert made.returncode == 0, made.stderr
    # One value of one stored sample is another one than in the shards now.
    with (tmp_path / "64" / "samples.npy").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x01\x7f")
    done = bench(*TINY, "--work", tmp_path, "--only", "warm")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "bench: ours delivered 64 samples that are not the 64 that were stored"
    assert done.stdout == ""


def test_feed_bench_refuses_incomplete_epochs(tmp_path: Path) -> None:
    done = bench("--samples", 65, "--batch", 16, "--work", tmp_path)
    assert done.returncode == 2
    assert "--samples must be a multiple of --batch" in done.stderr
