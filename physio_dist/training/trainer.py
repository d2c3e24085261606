"""The training loop of one rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from physio_dist.config import PretrainConfig
from physio_dist.data.loading.dataset import ShardDataset
from physio_dist.errors import Stopped
from physio_dist.runtime import watchdog
from physio_dist.runtime.distributed import BatchShare
from physio_dist.runtime.preemption import PreemptionHandler
from physio_dist.training.async_checkpoint import AsyncCheckpointer
from physio_dist.training.backends.base import Backend
from physio_dist.training.batch import MaskedBatch, learning_rate
from physio_dist.training.callbacks import Callback
from physio_dist.training.nonfinite import diagnose_nonfinite, sample_losses, top_loss_samples
from physio_dist.training.passes import Passes
from physio_dist.training.step_guard import StepAction, StepGuard
from physio_dist.training.summary import RankFlags, StepMetrics, StepSummary
from physio_dist.training.validation import Validation


@dataclass(kw_only=True)
class Trainer:
    """Trains one rank's share of each global batch.

    Attributes:
        options: of the run.
        share: of this rank.
        backend: holds model and optimizer.
        dataset: the batches come from it.
        loader: batches from the first step on.
        epoch_of: the epoch of a global batch, counted from 0.
        validation: on held-out windows.
        guard: decides whether a step is applied.
        checkpointer: saves in the background.
        preemption: asks for a stop or a checkpoint.
        callbacks: called by the loop.
    """

    options: PretrainConfig
    share: BatchShare
    backend: Backend
    dataset: ShardDataset
    loader: Iterable[MaskedBatch]
    epoch_of: Callable[[int], int]
    validation: Validation
    guard: StepGuard
    checkpointer: AsyncCheckpointer
    preemption: PreemptionHandler
    callbacks: Callback = field(default_factory=Callback)

    def fit(self, start: int = 0) -> None:
        """Train from step ``start`` (done) to ``train.steps``.

        Raises:
            Stopped: a rank was asked to stop; the step it was in was finished and saved.
            NonFiniteError: a loss or a gradient became NaN or infinite on some rank; no rank's weights were changed.
            DataError: a shard disagrees with its index.
        """
        self.passes = Passes(self.backend, self.options, self.share)
        self.metrics = StepMetrics(self.options, self.share, self.backend)
        batches = iter(self.loader)
        for step in range(start + 1, self.options.train.steps + 1):
            batch = self._next_batch(step, batches)
            summary = self.train_step(step, batch)
            validate = self.should_validate(step)
            if validate or self.should_log(step):
                line = self._metrics_line(step, summary)
                if validate:
                    line |= self.validate(step)
                self.callbacks.on_metrics(step, line)
            if self.should_save(step) or summary.save or summary.stop:
                self.save(step, summary)
            if summary.stop and step < self.options.train.steps:
                reason = self.preemption.reason or "another rank was asked to stop"
                raise Stopped(f"stopped ({reason}) after saving step {step}")

    def should_log(self, step: int) -> bool:
        """True if metrics of this step are logged, validated or not."""
        return step % self.options.train.log_every == 0 or step in (1, self.options.train.steps)

    def should_validate(self, step: int) -> bool:
        """True if validation follows this step."""
        train = self.options.train
        return self.validation.total > 0 and (step % train.val_every == 0 or step == train.steps)

    def should_save(self, step: int) -> bool:
        """True if this step's checkpoint is due."""
        return step % self.options.train.save_every == 0 or step == self.options.train.steps

    def _next_batch(self, step: int, batches: Iterator[MaskedBatch]) -> MaskedBatch:
        self.callbacks.on_step_begin(step)
        self.callbacks.on_phase(step, watchdog.DATA)
        began = time.perf_counter()
        batch = next(batches)
        self.metrics.clock.waited(time.perf_counter() - began)
        return batch

    def train_step(self, step: int, batch: MaskedBatch) -> StepSummary:
        """Forward and backward passes, agreement of the ranks, step guard and optimizer."""
        self.backend.set_lr(learning_rate(step, self.options.train))
        self.backend.scale = self.guard.scale
        self.callbacks.on_phase(step, watchdog.PASS)
        sums, losses = self.passes.run(batch, step)
        self.callbacks.on_batch(step, batch)
        self.callbacks.on_phase(step, watchdog.AGREE)
        grad_norm = self.backend.gradient_norm()
        flags = RankFlags(
            self.preemption.reason is not None, self.preemption.save, *self.checkpointer.local_status()
        )  # fmt: skip
        # The step's only collective and only device sync.
        summary = StepSummary.reduce(sums, grad_norm, flags, self.share.world)
        self.callbacks.on_phase(step, watchdog.MOVE)
        self._apply(step, batch, summary, losses)
        self.checkpointer.update(summary.uploaded == self.share.world, summary.committed > 0)
        # Nothing reads the signals any more: the step's collective has waited for the device.
        batch.batch.release()
        return summary

    def _apply(self, step: int, batch: MaskedBatch, summary: StepSummary, losses: Sequence[torch.Tensor]) -> None:
        """Move the weights, or not, as the step guard decides."""
        loss, norm = summary.loss_sum / self.options.train.global_batch, summary.grad_norm
        action = self.guard(loss, norm)
        if action is StepAction.NONFINITE:
            # The checkpoint in flight is of an earlier step, which was finite.
            self.checkpointer.finish()
            samples = sample_losses(self.dataset, batch, self.share.rank, losses)
            raise diagnose_nonfinite(self.passes, batch, step, samples)
        if action in (StepAction.SPIKE, StepAction.SKIP):
            median_loss, median_norm = self.guard.medians()
            outcome = "left out" if action is StepAction.SKIP else "taken; train.skip_spikes=true would leave it out"
            highest = top_loss_samples(sample_losses(self.dataset, batch, self.share.rank, losses))
            self.callbacks.on_warning(
                f"spike in step {step}, {outcome}: loss {loss:.4g} (median {median_loss:.4g}), gradient norm "
                f"{norm:.4g} (median {median_norm:.4g}); highest losses: {highest}"
            )
        if action in (StepAction.APPLY, StepAction.SPIKE):
            self.backend.step(norm)
        else:
            self.backend.skip()
            self.metrics.skipped += 1

    def _metrics_line(self, step: int, summary: StepSummary) -> dict[str, Any]:
        lr, blocked_s = learning_rate(step, self.options.train), self.checkpointer.blocked_s
        line = self.metrics.line(step, self.epoch_of(step - 1), summary, lr, blocked_s)
        self.checkpointer.blocked_s = 0.0
        return line

    def validate(self, step: int) -> dict[str, float]:
        """Validate after ``step``; the metrics of it (a collective)."""
        self.callbacks.on_phase(step, watchdog.VALIDATE)
        began = time.perf_counter()
        means, examples = self.validation.run(self.backend, step)
        if examples is not None:
            self.callbacks.on_examples(examples)
        self.metrics.clock.exclude(time.perf_counter() - began)
        return means

    def save(self, step: int, summary: StepSummary) -> None:
        """Save after ``step``; wait for it if it was asked for or training ends (a collective)."""
        self.callbacks.on_phase(step, watchdog.SAVE)
        began = time.perf_counter()
        self.checkpointer.save(step)
        if summary.save:
            self.preemption.save = False
        if summary.save or summary.stop or step == self.options.train.steps:
            self.checkpointer.finish()
        self.metrics.clock.exclude(time.perf_counter() - began)
