"""The bench of a submitted job, once: its forms, not its figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("ray")

ROOT = Path(__file__).resolve().parents[2]


def test_submit_bench_reports_stages_in_order() -> None:
    words = [sys.executable, ROOT / "tools" / "bench" / "submit.py", "--repeats", "1"]
    env = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(word) for word in words], env=env, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["bench"], result["unit"], result["n"]) == ("submit", "s", 1)
    stages = result["also"]["stages"]
    assert list(stages.values()) == sorted(stages.values())
    assert list(stages)[-1] == "first step done"
    assert result["ours"] == round(stages["first step done"], 1)
    assert min(result["also"]["cpu_s"].values()) > 0
