"""Snapshots: copies of what a checkpoint holds, taken by the loop and stored by threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from physio_dist.models.encoders.criss_cross import UNIT_UV, EncoderConfig
from physio_dist.runs.lease import Lease
from physio_dist.runs.run_logger import RunLogger
from physio_dist.training import checkpoint
from physio_dist.training.backends.base import Backend, Tensors
from physio_dist.training.callbacks import OnCommit
from physio_dist.training.checkpoint import Progress
from physio_dist.training.source import TrainingSource
from physio_dist.training.step_guard import StepGuard


@dataclass(kw_only=True)
class Snapshots:
    """Takes the snapshots of a run.

    Attributes:
        backend: holds model and optimizer.
        guard: its state is saved too.
        source: of the run's samples.
        encoder: configuration of the encoder.
        logger: of the run.
        lease: on the run; only the first rank has one.
        on_commit: called on every rank after each commit.
    """

    backend: Backend
    guard: StepGuard
    source: TrainingSource
    encoder: EncoderConfig
    logger: RunLogger
    lease: Lease | None
    on_commit: OnCommit | None

    def take(self, step: int) -> RunSnapshot:
        """Copy what the checkpoint of a step holds; only the first rank keeps it (a collective)."""
        first = self.logger.first
        tensors = {
            checkpoint.MODEL: self.backend.weights(first),
            checkpoint.OPTIMIZER: self.backend.optimizer_state(first),
        }
        if self.logger.options.train.ema:
            tensors[checkpoint.EMA] = self.backend.ema_weights(first)
        self.logger.flush()
        dataset = self.source.dataset
        progress = Progress(
            step=step, samples=step * self.logger.options.train.global_batch,
            fingerprints=self.source.fingerprints, order=self.source.order_facts, encoder=self.encoder.to_dict(),
            signal={
                "signal": dataset.signal, "channels": list(dataset.info.channels), "rate": dataset.sets[0].rate,
                "unit_uv": UNIT_UV, "simulated": any(shards.simulated for shards in dataset.sets),
            },
            guard=self.guard.state(),
        )  # fmt: skip
        return RunSnapshot(self, progress, tensors, self.logger.newest)


class RunSnapshot:
    """A snapshot on its way into the run's folder; see `async_checkpoint.Snapshot`."""

    def __init__(
        self, owner: Snapshots, progress: Progress, tensors: dict[str, Tensors], metrics: dict[str, Any]
    ) -> None:
        self._owner, self._progress, self._tensors, self._metrics = owner, progress, tensors, metrics
        self._run_dir = owner.logger.run_dir
        self._draft: checkpoint.Draft | None = None

    def upload(self) -> None:
        """Store all files but the manifest."""
        if self._owner.logger.first:
            self._draft = checkpoint.write(self._run_dir.url, self._progress, self._tensors)
        # Metrics and traces up to this step are in the bucket before the step's manifest is.
        self._run_dir.sync()

    def commit(self) -> None:
        """Write the manifest, and delete old checkpoints."""
        assert self._owner.lease is not None and self._draft is not None
        self._owner.lease.check()
        checkpoint.commit(self._draft)
        checkpoint.prune(
            self._run_dir.url, self._owner.logger.options.train.keep_checkpoints, self._progress.step
        )  # fmt: skip

    def on_commit(self) -> None:
        """Report the commit to the launcher."""
        if self._owner.on_commit is not None:
            self._owner.on_commit(self._progress.step, self._metrics)
