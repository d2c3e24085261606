"""Prometheus metrics of a driver, through the endpoint that Ray has on every node.

Only the driver exports them: its metrics survive a loss of ranks, and within 20 s of its end they disappear rather than
keep their last value.
"""

from __future__ import annotations

import math
from typing import Any

from ray.util.metrics import Gauge

from physio_dist.config import TrainOptions
from physio_dist.ray_backend.coordinator import RunState

# Ray adds a prefix of its own: ray_physio_dist_loss.
PREFIX = "physio_dist_"
STEP_METRICS = {
    "step": "newest step",
    "samples": "samples of all ranks since training began",
    "loss": "mean loss of the newest logged step's global batch",
    "val_loss": "mean loss over held-out windows",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient before clipping",
    "samples_per_s": "samples a second, all ranks",
    "data_wait_frac": "share of a step spent waiting for data, of the rank that waits most",
}
RUN_METRICS = {
    "steps": "steps that the run has in all",
    "ranks": "ranks at work",
    "restarts": "starts of the ranks after a loss, in this driver's life",
    "nonfinite": "1 when the run ended because a loss or gradient was no finite number",
    "step_age_s": "seconds since the newest step was heard of",
    "checkpoint_age_s": "seconds since the newest checkpoint was committed, or since the driver started",
    "checkpoint_every_s": "seconds that usually pass between two checkpoints",
}
SWEEP_METRICS = {
    "trials": "trials of the sweep",
    "trials_done": "trials that have ended",
    "trials_running": "trials at work",
}
_DESCRIPTIONS = STEP_METRICS | RUN_METRICS | SWEEP_METRICS


class MetricsExporter:
    """Gauges of one run or sweep.

    Args:
        run: URL of the run, the label of every gauge.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def set(self, metrics: dict[str, float]) -> None:
        """Set the gauges of these metrics."""
        for name, value in metrics.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"{PREFIX}{name}", _DESCRIPTIONS[name], ("run",))
            self._gauges[name].set(value, tags={"run": self._run})


def run_metrics(state: RunState, train: TrainOptions, now: float) -> dict[str, float]:
    """Return the metrics of a run at a time, in seconds since 1970."""
    step_metrics = {name: float(state.metrics[name]) for name in STEP_METRICS if state.metrics.get(name) is not None}
    metrics = {
        "steps": float(train.steps), "ranks": float(len(state.ranks)), "restarts": float(len(state.losses)),
        "nonfinite": float(state.nonfinite), "step_age_s": max(0.0, now - state.step_time),
        "checkpoint_age_s": max(0.0, now - state.commit_times[-1]),
    }  # fmt: skip
    interval = _checkpoint_interval(state, train)
    return step_metrics | metrics | ({"checkpoint_every_s": interval} if math.isfinite(interval) else {})


def _checkpoint_interval(state: RunState, train: TrainOptions) -> float:
    """Return seconds between checkpoints: between the newest two of one group of workers, else by the throughput."""
    if len(state.commit_times) > 2:
        return state.commit_times[-1] - state.commit_times[-2]
    rate = state.metrics.get("samples_per_s")
    return train.save_every * train.global_batch / rate if rate else math.inf
