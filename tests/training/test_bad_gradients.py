"""A gradient that is no number on one rank moves no rank's weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

SCRIPT = Path(__file__).with_name("ranks_of_bad_gradients.py")


def test_nonfinite_gradient_of_one_rank_changes_no_weights_at_any_stage_and_precision(tmp_path: Path) -> None:
    torchrun = Path(sys.executable).with_name("torchrun")
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[2])}
    done = subprocess.run(
        [str(torchrun), "--standalone", "--nproc-per-node=2", str(SCRIPT), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    files = sorted(tmp_path.glob("rank-*.json"))
    assert len(files) == 2
    for file in files:
        results = json.loads(file.read_text())
        assert len(results) == 12
        for case, facts in results.items():
            assert facts["finite"] == [True, True, False, False, True], (file.name, case)
            assert facts["kept"] and facts["moved"] and facts["as_undisturbed"], (file.name, case, facts)
