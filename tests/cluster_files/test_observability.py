"""Alerts and the dashboard, by Prometheus's own tool."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from physio_dist.ray_backend import metrics_export
from tests.cluster_files.shell import FOLDER
from tests.system.launching import BIN
from tests.tiers import require

OBSERVED = FOLDER / "observability"
ALERTS = OBSERVED / "alerts.yml"
DASHBOARD = json.loads((OBSERVED / "grafana.json").read_text())
NAMES = (*metrics_export.STEP_METRICS, *metrics_export.RUN_METRICS, *metrics_export.SWEEP_METRICS)
OURS = {f"ray_{metrics_export.PREFIX}{name}" for name in NAMES}


def promtool(*words: object, ok: bool = True) -> str:
    where = shutil.which("promtool", path=f"{BIN}:{os.environ['PATH']}")
    require(where is not None, "the program promtool")
    assert where is not None
    done = subprocess.run([where, *map(str, words)], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done.stdout + done.stderr


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return group["rules"]  # type: ignore[no-any-return]


def expressions() -> list[str]:
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]


def named(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


@pytest.mark.integration
def test_prometheus_validates_configuration_and_rules() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "config", OBSERVED / "prometheus.yml")


@pytest.mark.integration
def test_alerts_fire_on_their_condition_only(tmp_path: Path) -> None:
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(Path(__file__).with_name("alerts_test.yml"), tmp_path)
    promtool("test", "rules", tmp_path / "alerts_test.yml")
    # An alert that is blunted is noticed.
    (tmp_path / "alerts.yml").write_text(ALERTS.read_text().replace("> 600", "> 6000"))
    assert "PhysioDistNoStep" in promtool("test", "rules", tmp_path / "alerts_test.yml", ok=False)


def test_alert_has_test_runbook_and_existing_metrics() -> None:
    cases = Path(__file__).with_name("alerts_test.yml").read_text()
    for rule in rules():
        assert rule["alert"] in cases
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert "{{ $labels.run }}" in rule["annotations"]["summary"]
        assert len(rule["annotations"]["runbook"]) > 100
        assert named(rule["expr"]) and named(rule["expr"]) <= OURS


@pytest.mark.integration
def test_dashboard_expressions_are_valid_promql(tmp_path: Path) -> None:
    made = [
        {"record": f"panel:{n}", "expr": expression.replace("$run", ".*")} for n, expression in enumerate(expressions())
    ]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": made}]}))
    assert f"{len(made)} rules found" in promtool("check", "rules", tmp_path / "rules.yml")


def test_dashboard_metrics_exist() -> None:
    shown = set().union(*map(named, expressions()))
    # These two are for counting and for the alert.
    assert OURS - shown == {"ray_physio_dist_samples", "ray_physio_dist_nonfinite"}
    assert all('run=~"$run"' in expression for expression in expressions() if named(expression) & OURS)
    panels = (Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards").glob("*_panels.py")
    theirs = set().union(*(named(file.read_text()) for file in panels))
    source = (Path(ray.__file__).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py").read_text()
    assert {name for name in shown - OURS - theirs if f'"{name.removeprefix("ray_")}"' not in source} == set()
    for kind in ("gpus", "gram", "cpu", "object_store", "disk", "network"):
        assert any(kind in name for name in shown - OURS)


def test_dashboard_matches_grafana_import_format() -> None:
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(DASHBOARD)
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert named(variables["run"]["query"]["query"]) <= OURS
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"])))
    assert used == set(variables)
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] == "row":
            continue
        assert panel["title"] and panel["fieldConfig"]["defaults"]["unit"]
        letters = [target["refId"] for target in panel["targets"]]
        assert letters and len(set(letters)) == len(letters)
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    for one, other in combinations((panel["gridPos"] for panel in panels), 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above
