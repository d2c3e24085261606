"""Throughput of a run: time of a step, waiting for data, memory, model FLOPs utilization (MFU)."""

from __future__ import annotations

import resource
import sys
import time

import torch

# Dense bf16 peak in FLOP/s by a part of the device's name (vendors' data sheets).
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12, "V100": 125e12}


def device_peak(device: torch.device) -> float | None:
    """Peak FLOP/s of a device; None if it is not known, as for CPUs."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory of this rank in MiB: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes / 2**20 if sys.platform == "darwin" else kilobytes / 2**10


class StepClock:
    """Measures steps since the last `reset`: their duration, and the share spent waiting for data."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start a new interval."""
        self._start = time.perf_counter()
        self._waited = 0.0
        self.steps = 0

    def waited(self, seconds: float) -> None:
        """Count one step that waited this long for its batch."""
        self._waited += seconds
        self.steps += 1

    def exclude(self, seconds: float) -> None:
        """Leave time for validation or saving out of the interval."""
        self._start += seconds

    def read(self) -> tuple[float, float]:
        """Seconds per step, and the fraction of them spent waiting for data."""
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        return elapsed / max(self.steps, 1), self._waited / elapsed


def training_flops(forward: int) -> int:
    """FLOPs of a forward and backward pass: the backward pass has two products for each of the forward pass."""
    return 3 * forward
