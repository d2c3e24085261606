"""What a run measures about itself."""

from __future__ import annotations

import resource
import sys
import time

import torch

# Dense bf16 peak in FLOP/s by a part of the device's name (vendors' data sheets).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "V100": 125e12}


def device_peak(device: torch.device) -> float | None:
    """Peak FLOP/s of a device, None where it is not known (as for CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that this rank has held: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2**20 if sys.platform == "darwin" else kilobytes / 2**10


class StepClock:
    """Splits the time since the last report into waiting for data and the rest."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self.steps = 0

    def waited(self, seconds: float) -> None:
        """Count one step and what it waited for its data."""
        self._waited += seconds
        self.steps += 1

    def exclude(self, seconds: float) -> None:
        """Take time for validation or saving out of the interval."""
        self._start += seconds

    def read(self) -> tuple[float, float]:
        """Seconds a step, and the share of them spent waiting for data."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        return elapsed / max(self.steps, 1), self._waited / elapsed


def training_flops(forward: int) -> int:
    """FLOPs of forward and backward: the backward pass does the products twice, for inputs and for weights."""
    return 3 * forward
