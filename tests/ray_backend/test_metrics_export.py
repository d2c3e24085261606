"""Metrics of a run, computed from the coordinator's state."""

from __future__ import annotations

import asyncio

import pytest

from physio_dist.config import TrainOptions
from physio_dist.ray_backend.coordinator import CoordinatorActor, RunState
from physio_dist.ray_backend.metrics_export import RUN_METRICS, STEP_METRICS, run_metrics

TRAIN = TrainOptions(steps=1000, global_batch=64, save_every=50)


def test_run_metrics_counts_ages_from_start_before_first_step() -> None:
    state = RunState(step_time=100.0, commit_times=[100.0])
    assert run_metrics(state, TRAIN, 130.0) == {
        "steps": 1000.0, "ranks": 0.0, "restarts": 0.0, "nonfinite": 0.0, "step_age_s": 30.0, "checkpoint_age_s": 30.0,
    }  # fmt: skip


def test_run_metrics_omits_undefined_metrics() -> None:
    metrics = {"step": 7, "loss": None, "lr": 1e-3, "samples_per_s": 128.0, "val_loss": 0.5}
    state = RunState(ranks={0, 1}, losses=["rank 0"], metrics=metrics, step_time=5.0, commit_times=[0.0, 4.0])
    shown = run_metrics(state, TRAIN, 6.0)
    assert set(shown) <= set(STEP_METRICS) | set(RUN_METRICS)
    assert shown.items() >= {
        "step": 7.0, "lr": 1e-3, "val_loss": 0.5, "ranks": 2.0, "restarts": 1.0, "step_age_s": 1.0,
        "checkpoint_age_s": 2.0,
        # One checkpoint makes no interval: 50 steps of 64 samples at 128 a second.
        "checkpoint_every_s": 25.0,
    }.items()  # fmt: skip
    assert "loss" not in shown


def test_checkpoint_interval_ignores_time_of_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("physio_dist.ray_backend.coordinator.time.time", lambda: now)

    async def scenario() -> list[float | None]:
        nonlocal now
        actor, seen = CoordinatorActor(), list[float | None]()
        await actor.report_metrics({"samples_per_s": 320.0})
        for at in (30, 70, 130, 300, 350, 375):
            now, lost = float(at), at == 300
            await (actor.record_loss("rank 1") if lost else actor.record_commit())
            shown = run_metrics(await actor.read(), TRAIN, now + 1)
            assert shown["checkpoint_age_s"] == (171.0 if lost else 1.0)
            seen.append(shown.get("checkpoint_every_s"))
        return seen

    # 50 steps of 64 samples at 320 a second are 10 s; the time of a loss and its return is no interval.
    assert asyncio.run(scenario()) == [10.0, 40.0, 60.0, 10.0, 10.0, 25.0]


def test_run_metrics_ages_are_not_negative_if_clock_is_set_back() -> None:
    shown = run_metrics(RunState(step_time=100.0, commit_times=[90.0]), TRAIN, 50.0)
    assert shown["step_age_s"] == shown["checkpoint_age_s"] == 0.0
