"""The bench of the sweep, tiny: its forms, not its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.xdist_group("ray")]

ROOT = Path(__file__).resolve().parents[2]


def test_sweep_bench_last_line_has_all_fields() -> None:
    words = ("--people", 6, "--folds", 2, "--trials", 4, "--repeats", 1, "--gigabytes", 0.02)
    command = [sys.executable, ROOT / "tools" / "bench" / "sweep.py", *map(str, words)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    peer = "features in each trial"
    assert (result["bench"], result["unit"], result["n"], result["ratio_to"]) == ("sweep", "trials/min", 1, peer)
    assert result["ratio"] == pytest.approx(result["ours"] / result["peers"][peer], rel=0.02)
    also = result["also"]
    assert (also["trials"], also["features_gb"]) == (4, 0.02)
    assert also["seconds_of_a_sweep"] == pytest.approx(60 * 4 / result["ours"], rel=0.02)
