"""Step guard: whether a step's gradient is applied, decided from the losses and norms so far.

A pure function of values that all ranks share, so every rank decides alike.
"""

from __future__ import annotations

import math
from collections import deque
from enum import Enum
from statistics import median
from typing import Any

from physio_dist.config import TrainOptions

# Number of past steps that a step is compared with, and the least number of them.
WINDOW, _MIN_STEPS = 128, 20
# fp16: the loss is multiplied by a scale that halves when a gradient overflows and doubles after so many clean steps.
FIRST_SCALE, _MAX_SCALE, _CLEAN_STEPS = 2.0**10, 2.0**24, 1000


class StepAction(Enum):
    """Treatment of a step."""

    APPLY = "apply"
    # Far above the run's own median, but applied.
    SPIKE = "spike"
    # Far above the run's own median, and dropped.
    SKIP = "skip"
    # A gradient overflowed fp16 at this loss scale; dropped.
    OVERFLOW = "overflow"
    # Not finite at any loss scale.
    NONFINITE = "nonfinite"


class StepGuard:
    """Decides about steps one after the other.

    Args:
        train: ``precision``, ``max_grad_norm``, ``spike_factor`` and ``skip_spikes`` are used.
        state: from a checkpoint; empty for a new run.
    """

    def __init__(self, train: TrainOptions, state: dict[str, Any]) -> None:
        self._fp16, self._factor, self._skip = train.precision == "fp16", train.spike_factor, train.skip_spikes
        self._max_grad_norm = train.max_grad_norm
        self._scale = float(state.get("scale", FIRST_SCALE))
        self._clean = int(state.get("clean", 0))
        self._losses = deque[float](state.get("losses", ()), WINDOW)
        self._norms = deque[float](state.get("norms", ()), WINDOW)

    @property
    def scale(self) -> float:
        """Loss scale of the next step."""
        return self._scale if self._fp16 else 1.0

    def state(self) -> dict[str, Any]:
        """State for a checkpoint, so that a resumed run decides as an uninterrupted one."""
        return {
            "scale": self._scale, "clean": self._clean, "losses": list(self._losses), "norms": list(self._norms)
        }  # fmt: skip

    def __call__(self, loss: float, norm: float) -> StepAction:
        """Decide about a step from the global batch's loss and its gradient's norm before clipping."""
        if not math.isfinite(loss):
            return StepAction.NONFINITE
        if not math.isfinite(norm):
            return self._overflow() if self._fp16 else StepAction.NONFINITE
        self._clean += 1
        if self._fp16 and self._clean == _CLEAN_STEPS:
            self._scale, self._clean = min(self._scale * 2, _MAX_SCALE), 0
        # A norm below the clipping threshold does no harm, however small the others were.
        norm_spike = norm > self._max_grad_norm and _above(self._norms, norm, self._factor)
        spike = _above(self._losses, loss, self._factor) or norm_spike
        # Spikes count too, so that a level that has risen for good becomes the new median.
        self._losses.append(loss)
        self._norms.append(norm)
        if not spike:
            return StepAction.APPLY
        return StepAction.SKIP if self._skip else StepAction.SPIKE

    def _overflow(self) -> StepAction:
        if self._scale <= 1:
            return StepAction.NONFINITE
        self._scale, self._clean = self._scale / 2, 0
        return StepAction.OVERFLOW

    def medians(self) -> tuple[float, float]:
        """Medians of the losses and norms so far."""
        return median(self._losses), median(self._norms)


def _above(history: deque[float], value: float, factor: float) -> bool:
    return factor > 0 and len(history) >= _MIN_STEPS and value > factor * median(history)
