"""What `tools/quickstart.sh` prints, with stand-ins for the programs that it runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
INDEX = json.dumps({"physio_dist": {"fingerprint": "abc", "splits": {"train": 100}}})
METRICS = json.dumps(
    {"val_loss": 1.0, "val_intra": 0.4, "val_inter": 0.6, "val_zero_intra": 1.0, "val_zero_inter": 0.9}
)
RESULTS = json.dumps({"rows": [{"name": "fused", "accuracy": 0.8, "auc": 0.9, "auc_ci": [0.85, 0.95]}]})
# A stand-in is a shell script. ``$3 == --out`` of a conversion is followed by the folder of the shards.
PROGRAMS = {
    "physio-dist": f"""
        echo "physio-dist $*"
        case $1 in
        shard) for word; do [ "$previous" = --out ] && out=$word; previous=$word; done
               mkdir -p "$out"; echo '{INDEX}' > "$out/index.json"
               echo "reading: 3 of 3 records" >&2; echo "800 windows of 100 people from 100 records in 2 shards" ;;
        export) mkdir -p "$3"; echo '{{"encoder_sha256": "abc"}}' > "$3/config.json" ;;
        esac""",
    "deepspeed": f"""
        [ -z "${{FAIL:-}}" ] || {{ echo "no device"; exit 7; }}
        for word; do case $word in run.name=*) run=runs/${{word#run.name=}} ;; esac; done
        mkdir -p "$run"; echo '{METRICS}' > "$run/metrics.jsonl"; echo "noise of DeepSpeed" """,
    "python": f"""
        [ "$1" = -m ] || exec "{sys.executable}" "$@"
        run=runs/quickstart-fusion; mkdir -p "$run"; echo '{RESULTS}' > "$run/results.json"; echo "noise of Ray" """,
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the script and stand-ins for everything that it calls."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "quickstart.sh", tmp_path / "tools")
    (tmp_path / "tools" / "setup.sh").write_text("echo noise of pip\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, script in PROGRAMS.items():
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(f"#!/usr/bin/env bash\nset -eu\nprevious=\n{script}\n")
        program.chmod(0o755)
    return tmp_path


def quickstart(checkout: Path, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(checkout / "tools" / "quickstart.sh"), *words]
    environment = {**os.environ, "PHYSIO_DIST_VENV": "", **environ}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_quickstart_prints_stages_table_and_report_and_logs_the_rest(checkout: Path) -> None:
    result = quickstart(checkout)

    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line[:3] for line in lines if line[:1].isdigit()] == [f"{stage}/5" for stage in range(6)]
    assert any(line.split() == ["fused", "0.800", "0.900", "0.850", "to", "0.950"] for line in lines)
    assert lines[-1] == f"The report: {checkout}/runs/quickstart/report.html"
    assert "noise" not in result.stdout + result.stderr
    log = (checkout / "runs" / "quickstart.log").read_text()
    assert all(f"noise of {program}" in log for program in ("pip", "DeepSpeed", "Ray"))


def test_quickstart_shows_the_log_and_passes_the_status_on_when_a_stage_fails(checkout: Path) -> None:
    result = quickstart(checkout, FAIL="1")

    assert result.returncode == 7
    assert "no device" in result.stderr
    assert f"{checkout}/runs/quickstart.log" in result.stderr


def test_quickstart_refuses_a_folder_without_recordings(checkout: Path, tmp_path: Path) -> None:
    result = quickstart(checkout, "--data", str(tmp_path / "none"))
    assert result.returncode == 2
