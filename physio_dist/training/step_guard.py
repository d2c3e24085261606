"""Which gradients may move the weights: a pure function of the losses and norms so far, so every rank decides alike."""

from __future__ import annotations

import math
from collections import deque
from enum import Enum
from statistics import median
from typing import Any

from physio_dist.config import TrainOptions

# Steps whose losses and norms a step is compared with, and how many there must be at least.
WINDOW, _LEAST = 128, 20
# fp16: the loss is multiplied by a scale that halves when a gradient overflows and doubles after so many clean steps.
FIRST_SCALE, _MOST_SCALE, _CLEAN = 2.0**10, 2.0**24, 1000


class StepAction(Enum):
    """What becomes of a step."""

    APPLY = "apply"
    # Far above the run's own median; it is taken all the same.
    SPIKE = "spike"
    # The same, and left out.
    SKIP = "skip"
    # A gradient has overflown fp16 at this scale of the loss; left out.
    OVERFLOW = "overflow"
    # No finite number, and no smaller scale would make it one.
    NONFINITE = "nonfinite"


class StepGuard:
    """Judges steps one after the other.

    Args:
        train: ``precision``, ``clip``, ``spike_factor`` and ``skip_spikes`` count.
        state: of a checkpoint; empty for a new run.
    """

    def __init__(self, train: TrainOptions, state: dict[str, Any]) -> None:
        self._fp16, self._factor, self._skip = train.precision == "fp16", train.spike_factor, train.skip_spikes
        self._clip = train.max_grad_norm
        self._scale = float(state.get("scale", FIRST_SCALE))
        self._clean = int(state.get("clean", 0))
        self._losses = deque[float](state.get("losses", ()), WINDOW)
        self._norms = deque[float](state.get("norms", ()), WINDOW)

    @property
    def scale(self) -> float:
        """What the next step's loss is to be multiplied by."""
        return self._scale if self._fp16 else 1.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to hold for the next run to judge as this one would."""
        return {
            "scale": self._scale, "clean": self._clean, "losses": list(self._losses), "norms": list(self._norms)
        }  # fmt: skip

    def __call__(self, loss: float, norm: float) -> StepAction:
        """Judge a step by the global batch's loss and the norm of its gradient before clipping."""
        if not math.isfinite(loss):
            return StepAction.NONFINITE
        if not math.isfinite(norm):
            return self._overflown() if self._fp16 else StepAction.NONFINITE
        self._clean += 1
        if self._fp16 and self._clean == _CLEAN:
            self._scale, self._clean = min(self._scale * 2, _MOST_SCALE), 0
        # A norm that clipping would not touch does no harm, however small the others were.
        loud = norm > self._clip and _above(self._norms, norm, self._factor)
        spike = _above(self._losses, loss, self._factor) or loud
        # Spikes count too, so that a level that has risen for good becomes the new median.
        self._losses.append(loss)
        self._norms.append(norm)
        if not spike:
            return StepAction.APPLY
        return StepAction.SKIP if self._skip else StepAction.SPIKE

    def _overflown(self) -> StepAction:
        if self._scale <= 1:
            return StepAction.NONFINITE
        self._scale, self._clean = self._scale / 2, 0
        return StepAction.OVERFLOW

    def medians(self) -> tuple[float, float]:
        """Of the losses and norms so far."""
        return median(self._losses), median(self._norms)


def _above(known: deque[float], value: float, factor: float) -> bool:
    return factor > 0 and len(known) >= _LEAST and value > factor * median(known)
