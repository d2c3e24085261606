"""One rank of pretraining: open run and data, build model and backend, resume from the newest checkpoint, train."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import cached_property

import numpy
import torch

from physio_dist import storage
from physio_dist.config import PretrainConfig
from physio_dist.data.loading.dataset import Batch, ShardDataset
from physio_dist.data.loading.loader import LoaderPlan, PrefetchLoader
from physio_dist.errors import EXIT_FAULT, PhysioError, UserError
from physio_dist.models.encoders.criss_cross import (
    CHECKPOINTED,
    PATCH,
    MaskedModel,
    count_flops,
    count_parameters,
    preset,
)
from physio_dist.objectives.dual_mask import MaskConfig
from physio_dist.runs.lease import Lease, end_process
from physio_dist.runs.run_dir import RunDir, compare_config, write_config
from physio_dist.runs.run_files import ShardSetFacts
from physio_dist.runs.run_logger import RunLogger, TrainingData
from physio_dist.runs.trackers import check_tracker
from physio_dist.runtime import processes
from physio_dist.runtime.distributed import BatchShare, DistInfo, check_precision, init_dist_env, split_share
from physio_dist.runtime.preemption import PreemptionHandler
from physio_dist.runtime.watchdog import Watchdog
from physio_dist.signals.montage import lead_layouts, mask_groups
from physio_dist.training.async_checkpoint import AsyncCheckpointer
from physio_dist.training.backends.base import Backend
from physio_dist.training.backends.deepspeed_engine import VERSIONS, Engine, init_process_group, quiet
from physio_dist.training.batch import MaskedBatch, pin, prepare_batch, to_device
from physio_dist.training.callbacks import (
    Callback,
    Callbacks,
    MetricsCallback,
    OnCommit,
    OnMetrics,
    SampleTrace,
    WatchdogCallback,
)
from physio_dist.training.checkpoint import Checkpoint
from physio_dist.training.collectives import broadcast
from physio_dist.training.profiling import Profiler
from physio_dist.training.resume import check_compatible, find_checkpoint
from physio_dist.training.snapshot import Snapshots
from physio_dist.training.source import TrainingSource, check_signal
from physio_dist.training.step_guard import StepGuard
from physio_dist.training.trainer import Trainer
from physio_dist.training.validation import Validation

# A launcher ends the other ranks within about a second of one's death.
_LAUNCHER_S = 5.0


class PeerLostError(PhysioError):
    """Another rank is gone; this one cannot go on alone."""


def pretrain(
    options: PretrainConfig,
    preemption: PreemptionHandler,
    on_commit: OnCommit | None = None,
    on_metrics: OnMetrics | None = None,
) -> None:
    """Pretrain as one rank.

    Args:
        options: of the run; the same on every rank.
        preemption: checked once per step.
        on_commit: called on every rank after each committed checkpoint.
        on_metrics: called on the first rank with ``{"step": N}`` for each step and with each line of metrics.

    Raises:
        PhysioError: every error with a documented exit status.
    """
    ranks = init_dist_env()
    if ranks.world > options.train.global_batch:
        raise UserError(f"{ranks.world} ranks cannot share train.global_batch={options.train.global_batch}")
    check_tracker(options.train.tracker)
    check_precision(options.train.precision)
    say = _print_line if ranks.rank == 0 else _print_nothing
    torch.set_num_threads(options.train.threads or max(1, processes.cores() // ranks.local_world))
    mask = MaskConfig(**vars(options.mask))
    model_config = preset(options.model.preset, options.model.dropout)
    run_dir = RunDir(storage.join(options.run.dir, options.run.name), ranks.rank)
    source = TrainingSource.open(options)
    mask = replace(mask, layouts=lead_layouts(source.dataset.info.channels))
    check_signal(source.dataset, mask)
    lease = Lease(run_dir.url, lambda why: end_process(why, EXIT_FAULT), say) if ranks.rank == 0 else None
    try:
        if lease is not None:
            compare_config(run_dir, options)
        quiet()
        init_process_group()
        attempt = broadcast(lease.attempt if lease else 0)
        run_dir.begin(attempt)
        checkpoint = find_checkpoint(run_dir.url, options.resume.url, ranks.rank == 0, say)
        torch.manual_seed(options.run.seed)
        model = MaskedModel(model_config, checkpoint_activations=options.model.preset in CHECKPOINTED)
        if checkpoint is not None:
            check_compatible(checkpoint, source, model_config)
            model.load_state_dict(checkpoint.model)
        if lease is not None:
            # Only now, so that a refused start leaves no run behind, and changes none.
            write_config(run_dir, options)
        logger = RunLogger(options, ranks, run_dir, _training_data(source.dataset), say, attempt)
        run = _Run(options, ranks, source, mask, logger, lease)
        _train(run, model, checkpoint, preemption, on_commit, on_metrics)
    except RuntimeError as error:
        if not any(word in str(error) for word in ("Connection", "gloo", "NCCL", "Socket")):
            raise
        raise _peer_lost(error, preemption) from error
    finally:
        if lease is not None:
            lease.release()


def _peer_lost(error: RuntimeError, preemption: PreemptionHandler) -> BaseException:
    """The error to raise in place of what the collectives raise when a peer is gone."""
    if preemption.wait(_LAUNCHER_S):
        # The lost rank or its launcher has reported the cause.
        return SystemExit(EXIT_FAULT)
    return PeerLostError(
        f"another rank is gone ({str(error).splitlines()[0][:120]}); the same command goes on from the newest "
        "checkpoint"
    )


def _print_line(text: str) -> None:
    print(f"physio-dist: {text}", flush=True)


def _print_nothing(_: str) -> None:
    pass


def _training_data(dataset: ShardDataset) -> TrainingData:
    """Facts about the data for the run's logs and exports."""
    indexes = [
        ShardSetFacts(
            url=s.url, fingerprint=s.fingerprint, splits=s.splits, people=s.people, rate=s.rate,
            channels=list(s.signals[dataset.signal].channels), simulated=s.simulated, sources=list(s.sources),
        )
        for s in dataset.sets
    ]  # fmt: skip
    train_people = [table.person[table.split == 0] for table in dataset.sample_tables]
    return TrainingData(
        indexes=indexes,
        people=sorted({f"{person:016x}" for ids in train_people for person in ids.tolist()}),
        windows=sum(shards.splits["train"] for shards in dataset.sets),
        channels=len(dataset.info.channels),
        simulated=any(shards.simulated for shards in dataset.sets),
    )


@dataclass(frozen=True)
class _Run:
    """Options, data and files of one rank of a run."""

    options: PretrainConfig
    ranks: DistInfo
    source: TrainingSource
    mask: MaskConfig
    logger: RunLogger
    lease: Lease | None

    @cached_property
    def groups(self) -> list[list[int]]:
        """Groups of linearly dependent channels."""
        return mask_groups(self.source.dataset.info.channels)

    def prepare(self, batch: Batch) -> MaskedBatch:
        """Draw the masks of a batch; called by the loader's thread."""
        prepared = prepare_batch(batch, self.mask, self.groups, self.options.run.seed, "train")
        return pin(prepared) if torch.cuda.is_available() else prepared

    def share(self, model: MaskedModel) -> BatchShare:
        """This rank's share of each global batch."""
        ranks, train, info = self.ranks, self.options.train, self.source.dataset.info
        micro, passes = split_share(train.global_batch, ranks.world, train.micro_batch)
        flops = count_flops(model.config, len(info.channels), info.samples // PATCH)
        return BatchShare(ranks.rank, ranks.world, micro, passes, flops)

    def loader(self, share: BatchShare, start: int) -> PrefetchLoader[MaskedBatch]:
        """This rank's batches from a step on."""
        plan = LoaderPlan(
            self.source.order, "train", share.micro * share.micro_steps, start, self.options.train.steps, share.rank,
            share.world, self.ranks.node,
        )  # fmt: skip
        return PrefetchLoader(self.source.dataset, plan, self.prepare)

    def callbacks(self, profiler: Profiler, watchdog: Watchdog, on_metrics: OnMetrics | None) -> Callbacks:
        """Callbacks of the training loop."""
        trace = [SampleTrace(self.logger, self.source.dataset)] if self.options.train.log_sample_keys else []
        callbacks: list[Callback] = [profiler, WatchdogCallback(watchdog), MetricsCallback(self.logger, on_metrics)]
        return Callbacks([*callbacks, *trace])

    def keep_profile(self, trace: bytes) -> None:
        """Store a profile in the run's folder."""
        storage.write_bytes(self.logger.run_dir.file("profile.json"), trace)


def _train(
    run: _Run,
    model: MaskedModel,
    checkpoint: Checkpoint | None,
    preemption: PreemptionHandler,
    on_commit: OnCommit | None,
    on_metrics: OnMetrics | None,
) -> None:
    options, source, logger, train = run.options, run.source, run.logger, run.options.train
    start = checkpoint.progress.step if checkpoint is not None else 0
    if start >= train.steps:
        logger.say(f"{logger.run_dir.url} has all of its {train.steps} steps already; a larger train.steps goes on")
        return
    share = run.share(model)
    validation = Validation(source.dataset, run.mask, options, share)
    if validation.total == 0:
        reason = "train.val_samples is 0" if not train.val_samples else "the shard set's val split is empty"
        logger.say(f"no held-out windows, so there will be no val_loss: {reason}")
    engine = Engine(model, options, share.micro, share.micro_steps)
    guard = StepGuard(train, checkpoint.progress.guard if checkpoint is not None else {})
    logger.open(start, engine.device, VERSIONS)
    logger.log_banner(start, share.micro, share.micro_steps, count_parameters(model.config), engine.device)
    snapshots = Snapshots(
        backend=engine, guard=guard, source=source, encoder=model.config, logger=logger, lease=run.lease,
        on_commit=on_commit,
    )  # fmt: skip
    checkpointer = AsyncCheckpointer(logger.first, snapshots.take)
    with (
        run.loader(share, start) as loader,
        Watchdog(share.rank, train.hang_timeout_s) as watchdog,
        Profiler(train.profile if logger.first else [], run.keep_profile) as profiler,
    ):
        _prepare_backend(engine, run, share, checkpoint)
        trainer = Trainer(
            options=options, share=share, backend=engine, dataset=source.dataset, loader=loader,
            epoch_of=source.order.epoch, validation=validation, guard=guard, checkpointer=checkpointer,
            preemption=preemption, callbacks=run.callbacks(profiler, watchdog, on_metrics),
        )  # fmt: skip
        preemption.training = True
        try:
            trainer.fit(start)
        except BaseException:
            checkpointer.abandon()
            # Uploading the rest may fail too; the error to report is the one that ended training.
            with contextlib.suppress(storage.StorageError):
                logger.close()
            raise
    logger.close()
    logger.say(f"done: {train.steps} steps; `physio-dist report {logger.run_dir.url}` draws the report")


def _prepare_backend(backend: Backend, run: _Run, share: BatchShare, checkpoint: Checkpoint | None) -> None:
    """Run a dry step on an empty batch, then restore the checkpoint's optimizer state (a collective)."""
    empty = numpy.zeros(0, dtype=numpy.int64)
    batch = run.source.dataset.read_batch(0, empty, empty, empty, size=share.micro)
    micro = to_device(run.prepare(batch), slice(None), backend.device)
    backend.prepare((micro.x, micro.hidden, micro.valid))
    if checkpoint is not None:
        backend.load_optimizer_state(checkpoint.optimizer)
        if run.options.train.ema and checkpoint.ema is not None:
            backend.load_ema(checkpoint.ema)
