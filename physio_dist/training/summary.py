"""Summary of a training step over all ranks, and the line of metrics made of it."""

from __future__ import annotations

import time
from dataclasses import astuple, dataclass
from typing import Any

import torch

from physio_dist.config import PretrainConfig
from physio_dist.runtime.distributed import BatchShare
from physio_dist.training.backends.base import Backend
from physio_dist.training.collectives import max_over_ranks, sum_over_ranks
from physio_dist.training.passes import TERM_SUMS
from physio_dist.training.throughput import StepClock, device_peak, peak_memory_mb, training_flops


@dataclass(frozen=True)
class RankFlags:
    """State of one rank that all ranks have to know.

    Attributes:
        stop: it was asked to stop.
        save: it was asked for a checkpoint.
        uploaded: its part of the checkpoint in flight is stored.
        committed: it has committed the checkpoint in flight.
    """

    stop: bool
    save: bool
    uploaded: bool
    committed: bool


@dataclass(frozen=True)
class StepSummary:
    """Sums over all ranks: of samples' loss terms and weights, and of the ranks' flags.

    Attributes:
        loss_sum, weight, intra_sum, intra_count, inter_sum, inter_count: see `passes.TERM_SUMS`.
        grad_norm: of the common gradient before clipping.
        stop, save, uploaded, committed: numbers of ranks; see `RankFlags`.
    """

    loss_sum: float
    weight: float
    intra_sum: float
    intra_count: float
    inter_sum: float
    inter_count: float
    grad_norm: float
    stop: float
    save: float
    uploaded: float
    committed: float

    @classmethod
    def reduce(cls, sums: torch.Tensor, grad_norm: torch.Tensor, flags: RankFlags, world: int) -> StepSummary:
        """Add up what the ranks know about a step (a collective, which waits for the device).

        Args:
            sums: this rank's, float64 ``[6]``; see `passes.TERM_SUMS`.
            grad_norm: 0-d, the same on every rank.
            flags: of this rank.
            world: number of ranks.
        """
        terms = len(TERM_SUMS)
        packed = torch.zeros(terms + 5, dtype=torch.float64, device=sums.device)
        packed[:terms] = sums
        packed[terms] = grad_norm / world
        packed[terms + 1 :] = torch.tensor([float(flag) for flag in astuple(flags)])
        return cls(*sum_over_ranks(packed))


class StepMetrics:
    """Lines of ``metrics.jsonl``.

    Args:
        options: of the run.
        share: of this rank.
        backend: which trains.

    Attributes:
        clock: measures the steps since the line before.
        skipped: steps since then whose gradient was dropped.
    """

    def __init__(self, options: PretrainConfig, share: BatchShare, backend: Backend) -> None:
        self._options, self._share, self._backend = options, share, backend
        self._peak = device_peak(backend.device)
        self.clock = StepClock()
        self.skipped = 0

    def line(self, step: int, epoch: int, summary: StepSummary, lr: float, checkpoint_s: float) -> dict[str, Any]:
        """Metrics of a step, with throughput since the line before; starts a new interval (a collective).

        Args:
            step: steps taken.
            epoch: of the step's batch.
            summary: of the step.
            lr: learning rate of the step.
            checkpoint_s: seconds that checkpoints have blocked the loop since the line before.
        """
        batch, world, device = self._options.train.global_batch, self._share.world, self._backend.device
        step_s, wait = self.clock.read()
        rate = batch / step_s
        line = {
            "step": step, "epoch": epoch, "samples": step * batch,
            "loss": summary.loss_sum / batch, "loss_intra": _mean(summary.intra_sum, summary.intra_count),
            "loss_inter": _mean(summary.inter_sum, summary.inter_count), "val_loss": None, "lr": lr,
            "grad_norm": summary.grad_norm, "samples_per_s": rate, "samples_per_s_device": rate / world,
            "data_wait_frac": max_over_ranks(wait, device),
            "mfu": training_flops(self._share.flops) * rate / (self._peak * world) if self._peak else None,
            "step_s": step_s, "time": time.time(), "peak_memory_mb": peak_memory_mb(device),
            "ckpt_s": checkpoint_s, "loss_scale": self._backend.scale, "skipped": self.skipped,
        }  # fmt: skip
        self.skipped = 0
        self.clock.reset()
        return line


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None
