"""What the driver of a run shows to Prometheus, through the metrics endpoint that Ray has on every node.

Only the driver does: its figures outlive a loss of ranks, and when it ends they vanish within 20 s instead of standing
still.
"""

from __future__ import annotations

import math
from typing import Any

from ray.util.metrics import Gauge

from physio_dist.config import TrainOptions
from physio_dist.ray_backend.coordinator import RunState

# Ray puts its own prefix before ours: ray_physio_dist_loss.
PREFIX = "physio_dist_"
LINE = {
    "step": "newest step",
    "samples": "samples of all ranks since training began",
    "loss": "mean loss of the newest logged step's global batch",
    "val_loss": "mean loss over held-out windows",
    "lr": "learning rate",
    "grad_norm": "norm of the gradient before clipping",
    "samples_per_s": "samples a second, all ranks",
    "data_wait_frac": "share of a step spent waiting for data, of the rank that waits most",
}
RUN = {
    "steps": "steps that the run has in all",
    "ranks": "ranks at work",
    "restarts": "starts of the ranks after a loss, in this driver's life",
    "nonfinite": "1 when the run ended because a loss or gradient was no finite number",
    "step_age_s": "seconds since the newest step was heard of",
    "checkpoint_age_s": "seconds since the newest checkpoint was committed, or since the driver started",
    "checkpoint_every_s": "seconds that usually pass between two checkpoints",
}
SWEEP = {
    "trials": "trials of the sweep",
    "trials_done": "trials that have ended",
    "trials_running": "trials at work",
}
_KNOWN = LINE | RUN | SWEEP


class MetricsExporter:
    """The figures of one run or sweep.

    Args:
        run: its URL, the label of every figure.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}

    def set(self, figures: dict[str, float]) -> None:
        """Show these from now on."""
        for name, value in figures.items():
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"{PREFIX}{name}", _KNOWN[name], ("run",))
            self._gauges[name].set(value, tags={"run": self._run})


def run_metrics(coordinator: RunState, train: TrainOptions, now: float) -> dict[str, float]:
    """What the coordinator tells of a run at a time (seconds since 1970)."""
    line = {name: float(coordinator.line[name]) for name in LINE if coordinator.line.get(name) is not None}
    known = {
        "steps": float(train.steps), "ranks": float(len(coordinator.ranks)), "restarts": float(len(coordinator.losses)),
        "nonfinite": float(coordinator.nonfinite), "step_age_s": max(0.0, now - coordinator.stepped),
        "checkpoint_age_s": max(0.0, now - coordinator.commits[-1]),
    }  # fmt: skip
    every = _usual_interval(coordinator, train)
    return line | known | ({"checkpoint_every_s": every} if math.isfinite(every) else {})


def _usual_interval(coordinator: RunState, train: TrainOptions) -> float:
    """Of checkpoints, seconds: as of the last two in one life of the ranks, else as the speed lets expect."""
    if len(coordinator.commits) > 2:
        return coordinator.commits[-1] - coordinator.commits[-2]
    rate = coordinator.line.get("samples_per_s")
    return train.save_every * train.global_batch / rate if rate else math.inf
