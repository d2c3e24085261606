"""The bench of several ranks beside one, tiny: its forms, not its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


def bench(*words: object) -> subprocess.CompletedProcess[str]:
    """Run the bench to its end."""
    command = [sys.executable, ROOT / "tools" / "bench" / "ranks.py", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)


def test_ranks_bench_last_line_has_all_fields() -> None:
    done = bench("--preset", "tiny", "--ranks", 2, "--windows", 4, "--steps", 2, "--repeats", 1)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["bench"], result["unit"], result["n"], result["ratio_to"]) == ("ranks", "windows/s", 1, "one rank")
    assert result["ratio"] == pytest.approx(result["ours"] / result["peers"]["one rank"], rel=0.02)


def test_ranks_bench_refuses_more_ranks_than_cores() -> None:
    done = bench("--ranks", 10_000)
    assert done.returncode == 1
    assert "10000 ranks of one core each need as many cores" in done.stderr
