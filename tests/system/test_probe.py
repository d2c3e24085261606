"""From real recordings to a probe's table: two conversions, a few steps, an export, both tasks."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.system.launching import ROOT, Run

Cli = Callable[..., subprocess.CompletedProcess[str]]
CONFIG = ROOT / "configs" / "probe" / "quality.yaml"
SPLITS = ("workers=1", "split.val=0.2", "split.test=0.3")
STEPS = ("train.steps=3", "train.save_every=3", "train.val_every=3", "mask.lead_dropout=0.5", "mask.span=2")


@pytest.fixture(scope="module")
def place(cli: Cli, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 records of Challenge 2011, fit ones to train on and all with their labels, and a run of three steps."""
    folder, raw = tmp_path_factory.mktemp("quality"), data_dir / "cinc2011-set-a"
    (folder / "raw").mkdir()
    table = (raw / "labels.csv").read_text().splitlines()
    bad = [line for line in table[1:] if line.endswith(",0")][:50]
    good = [line for line in table[1:] if line.endswith(",1")][:70]
    for line in (*bad, *good):
        for ending in ("hea", "dat"):
            name = f"{line.split(',')[0]}.{ending}"
            shutil.copyfile(raw / name, folder / "raw" / name)
    (folder / "labels.csv").write_text("\n".join([table[0], *bad, *good]) + "\n")
    for out, words in (("fit", ()), ("all", (f"labels={folder / 'labels.csv'}", "unusable=keep"))):
        done = cli("shard", "wfdb", folder / "raw", "--out", folder / out, *SPLITS, *words)
        assert done.returncode == 0, done.stderr
    run = Run(folder, "run", str(folder / "fit"), STEPS)
    assert run(launcher="python") == 0, run.said()
    done = cli("export", run.url, folder / "encoder")
    assert done.returncode == 0, done.stderr
    return folder


def results(place: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "probes" / name / "results.json").read_text())
    return found


def test_quality_probe_reports_every_row(cli: Cli, place: Path) -> None:
    where = (f"run.dir={place / 'probes'}", f"probe.data={place / 'all'}", f"probe.encoder={place / 'encoder'}")
    few = ("probe.seeds=2", "probe.fractions=[0.1,1.0]", "probe.val_folds=2")
    done = cli("probe", "--config", CONFIG, *where, *few)
    assert done.returncode == 0, done.stderr
    found = results(place, "quality")
    areas = {row["name"]: row["auc"] for row in found["rows"] if row["fraction"] == 1.0}
    assert list(areas) == ["majority", "validity", "handmade", "untrained", "encoder"]
    assert areas["majority"] == 0.5 < areas["handmade"]
    assert found["protocol"] == "holdout" and found["encoder"]["people"] > 20
    assert done.stdout.splitlines()[-1] == f"{place}/probes/quality/results.json"
    assert "acceptable from ECG" in done.stdout and done.stdout.count("handmade") == 2
    # Tested by folds, it would meet people whom it was pretrained on.
    done = cli("probe", "--config", CONFIG, *where, *few, "run.name=leaky", "probe.protocol=grouped_kfold")
    assert done.returncode == 2 and "probe.protocol=holdout" in done.stderr and "Traceback" not in done.stderr
    assert not (place / "probes" / "leaky").exists()


def test_reconstruction_probe_compares_with_ridge(cli: Cli, place: Path) -> None:
    where = (f"run.dir={place / 'probes'}", f"probe.data={place / 'fit'}")
    words = (*where, "run.name=recon", "probe.task=reconstruction")
    done = cli("probe", "--config", CONFIG, *words, f"probe.runs={place / 'runs' / 'run'}", "probe.masks=[chest,time]")
    assert done.returncode == 0, done.stderr
    rows = {(row["mask"], row["predictor"]): row for row in results(place, "recon")["rows"]}
    assert set(rows["chest", "ridge"]["r2_leads"]) == {"V1", "V2", "V3", "V4", "V5", "V6"}
    assert rows["chest", "ridge"]["r2_median"] > 0 > rows["time", "interpolation"]["r2"]
    done = cli("probe", "--config", CONFIG, *words, "run.name=export", f"probe.runs={place / 'encoder'}")
    assert done.returncode == 2 and "not an export" in done.stderr
