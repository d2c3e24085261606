"""Trainable of a sweep, without a cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from ray.tune.result import RESULT_DUPLICATE

from physio_dist import __version__
from physio_dist.ray_backend import tune_trials
from physio_dist.ray_backend.tune_trials import METRIC, FusionTrial

CONFIG = {"trial": "fused-000", "row": "fused", "fold": "", "lr": 0.01, "depth": 1}


def new_trial(version: str = __version__) -> FusionTrial:
    trial = FusionTrial.__new__(FusionTrial)
    trial.setup(CONFIG, prepared=None, version=version, threads=1)  # type: ignore[arg-type]
    return trial


def test_fusion_trial_reports_each_epoch_and_then_done(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def train(*arguments: Any) -> Iterator[dict[str, float]]:
        calls.append(arguments)
        yield {"epoch": 1, METRIC: 0.5, "fold_0": 0.5}

    monkeypatch.setattr(tune_trials.trials, "train", train)
    trial = new_trial()
    assert trial.step() == {"epoch": 1, METRIC: 0.5, "fold_0": 0.5}
    assert trial.step() == {RESULT_DUPLICATE: True, "done": True}
    assert trial.reset_config({**CONFIG, "row": "ecg", "fold": "2"})
    assert trial.step()["epoch"] == 1
    params = {"lr": 0.01, "depth": 1}
    assert calls == [(None, "fused", params, ""), (None, "ecg", params, "2")]


def test_fusion_trial_reports_error_instead_of_raising(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any) -> Iterator[dict[str, float]]:
        raise ValueError("first line\nsecond line")
        yield {}

    monkeypatch.setattr(tune_trials.trials, "train", train)
    result = new_trial().step()
    assert result["failure"] == "ValueError: first line" and result["done"] and math.isnan(result[METRIC])
    assert "unusable_node" not in result


def test_fusion_trial_reports_other_version_of_physio_dist() -> None:
    result = new_trial("0.0.1").step()
    assert result["unusable_node"] and result["done"] and "0.0.1 where the sweep was started" in result["failure"]
