"""One rank's life: open the run and the data, build, go on from the newest checkpoint, train."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import torch
import torch.distributed as dist

from physio_dist import storage
from physio_dist.config import PretrainConfig
from physio_dist.data.handle import open_dataset
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.loading.dataset import Batch, ShardDataset
from physio_dist.data.loading.loader import LoaderPlan, PrefetchLoader
from physio_dist.errors import EXIT_FAULT, PhysioError, UserError
from physio_dist.models.encoders.criss_cross import (
    CHECKPOINTED,
    PATCH,
    UNIT_UV,
    MaskedModel,
    count_flops,
    count_parameters,
    preset,
)
from physio_dist.objectives.dual_mask import MaskConfig, sample_masks
from physio_dist.runs import lease
from physio_dist.runs.run_dir import RunDir, compare_config, write_config
from physio_dist.runs.run_files import ShardSetFacts
from physio_dist.runs.run_logger import RunLogger, TrainingData
from physio_dist.runs.trackers import check_tracker
from physio_dist.runtime import processes
from physio_dist.runtime.distributed import BatchShare, DistInfo, check_precision, init_dist_env, split_share
from physio_dist.runtime.preemption import PreemptionHandler
from physio_dist.runtime.watchdog import Watchdog
from physio_dist.signals.montage import lead_layouts, mask_groups
from physio_dist.training import checkpoint
from physio_dist.training.async_checkpoint import AsyncCheckpointer, CheckpointFiles
from physio_dist.training.backends.deepspeed_engine import VERSIONS, Engine, init_process_group, quiet
from physio_dist.training.batch import MaskedBatch, pin, prepare_batch, to_device
from physio_dist.training.checkpoint import Checkpoint, Progress
from physio_dist.training.loop import Hooks, train
from physio_dist.training.profiling import ProfiledSteps
from physio_dist.training.step_guard import StepGuard
from physio_dist.training.validation import Validation

# Takes the step of a checkpoint and the newest line of metrics, which only the first rank has.
Committed = Callable[[int, dict[str, Any]], None]
# Takes {"step": N} after each step, and lines of metrics.
Told = Callable[[dict[str, Any]], None]
# A launcher ends the other ranks within about a second of one's death.
_LAUNCHER_S = 5.0


class PeerLostError(PhysioError):
    """Another rank is gone; this one cannot go on alone."""


def pretrain(
    options: PretrainConfig, stop: PreemptionHandler, committed: Committed | None = None, told: Told | None = None
) -> None:
    """Pretrain as one rank.

    Args:
        options: of the run; the same on every rank.
        stop: looked at once a step.
        committed: called on every rank after each committed checkpoint.
        told: called on the first rank with what it knows newest.

    Raises:
        PhysioError: everything that has a documented status.
    """
    place = init_dist_env()
    if place.world > options.train.global_batch:
        raise UserError(f"{place.world} ranks cannot share train.global_batch={options.train.global_batch}")
    check_tracker(options.train.tracker)
    check_precision(options.train.precision)
    say = _say if place.rank == 0 else _silent
    torch.set_num_threads(options.train.threads or max(1, processes.cores() // place.local_world))
    mask = MaskConfig(**vars(options.mask))
    encoder = preset(options.model.preset, options.model.dropout)
    run_dir = RunDir(storage.join(options.run.dir, options.run.name), place.rank)
    cache = ShardCache(options.data.cache_dir, options.data.cache_gb * 1e9)
    source = open_dataset(options.data.index, options.data.signal, cache)
    mask = replace(mask, layouts=lead_layouts(source.info.channels))
    _check_signal(source, mask)
    order = source.order("train", options.train.global_batch, options.run.seed)
    held: lease.Lease | None = None
    if place.rank == 0:
        held = lease.Lease(run_dir.url, lambda why: lease.end_process(why, EXIT_FAULT), say)
    try:
        if held is not None:
            compare_config(run_dir, options)
        quiet()
        init_process_group()
        attempt = _broadcast(held.attempt if held else 0)
        run_dir.begin(attempt)
        found = _agree_on_checkpoint(run_dir, options, place, say)
        torch.manual_seed(options.run.seed)
        model = MaskedModel(encoder, checkpoint_activations=options.model.preset in CHECKPOINTED)
        start = 0
        if found is not None:
            _check_fits(found, source, encoder.to_dict(), _order_of(options, source))
            model.load_state_dict(found.model)
            start = found.progress.step
        if held is not None:
            # Only now, so that a start that is refused leaves no run behind, and changes none.
            write_config(run_dir, options)
        records = RunLogger(options, place, run_dir, _training_data(source), say, attempt)
        mine = Trainer(options, place, source, model, mask, stop, records, held, committed, told)
        mine.train(order, found, start)
    except RuntimeError as error:
        # What the collectives say when a peer is gone.
        if any(word in str(error) for word in ("Connection", "gloo", "NCCL", "Socket")):
            if stop.wait(_LAUNCHER_S):
                # The lost rank or its launcher has said what there is to say.
                raise SystemExit(EXIT_FAULT) from error
            raise PeerLostError(
                f"another rank is gone ({str(error).splitlines()[0][:120]}); the same command goes on from the newest "
                "checkpoint"
            ) from error
        raise
    finally:
        if held is not None:
            held.release()


def _training_data(source: ShardDataset) -> TrainingData:
    """What the run's logs and exports tell of its data."""
    indexes = [
        ShardSetFacts(
            url=s.url, fingerprint=s.fingerprint, splits=s.splits, people=s.people, rate=s.rate,
            channels=list(s.signals[source.signal].channels), simulated=s.simulated, sources=list(s.sources),
        )
        for s in source.sets
    ]  # fmt: skip
    seen = [table.person[table.split == 0] for table in source.sample_tables]
    return TrainingData(
        indexes=indexes,
        people=sorted({f"{person:016x}" for ids in seen for person in ids.tolist()}),
        windows=sum(shards.splits["train"] for shards in source.sets),
        channels=len(source.info.channels),
        simulated=any(shards.simulated for shards in source.sets),
    )


def _check_signal(source: ShardDataset, mask: MaskConfig) -> None:
    """Refuse data the encoder is not made for, before anything starts."""
    for shards in source.sets:
        if shards.rate != PATCH:
            raise UserError(
                f"{shards.url} has {shards.rate:g} Hz; the encoder's patches are one second at {PATCH} Hz. Convert the "
                f"recordings again with window.rate={PATCH}"
            )
        if source.info.samples % PATCH:
            raise UserError(
                f"{shards.url} has windows of {source.info.samples} samples, which is no whole number of patches of "
                f"{PATCH}; convert the recordings again with window.seconds a whole number"
            )
    groups = mask_groups(source.info.channels)
    sample_masks(mask, groups, source.info.samples // PATCH, 0, "check", numpy.zeros(1, dtype=numpy.int64))


def _order_of(options: PretrainConfig, source: ShardDataset) -> dict[str, Any]:
    """What decides, beside the data itself, which samples a step takes."""
    return {"seed": options.run.seed, "global_batch": options.train.global_batch, "weights": source.weights}


def _check_fits(found: Checkpoint, source: ShardDataset, encoder: dict[str, Any], order: dict[str, Any]) -> None:
    """Refuse a checkpoint of another model or of other data.

    Raises:
        UserError: names what differs.
    """
    theirs, ours = dict(found.progress.encoder), dict(encoder)
    differing = [f"{k}: {theirs.get(k)} there, {ours[k]} now" for k in ours if theirs.get(k) != ours[k]]
    if differing:
        raise UserError(f"{found.url} holds another encoder ({'; '.join(differing)})")
    theirs_channels, channels = found.progress.signal.get("channels"), list(source.info.channels)
    if theirs_channels != channels:
        raise UserError(f"{found.url} was trained on the channels {theirs_channels}, the data has {channels}")
    fingerprints = [shards.fingerprint for shards in source.sets]
    if found.progress.fingerprints != fingerprints:
        raise UserError(
            f"{found.url} was trained on other data (fingerprint {found.progress.fingerprints[0][:12]}, now "
            f"{fingerprints[0][:12]}): its place in the order would mean nothing here. Choose another run.name"
        )
    if found.progress.order != order:
        raise UserError(
            f"{found.url} took its samples in another order ({found.progress.order} there, {order} now): going on from "
            "it would repeat some and miss others"
        )


def _agree_on_checkpoint(
    run_dir: RunDir, options: PretrainConfig, place: DistInfo, say: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint to start from, the same on every rank; the first rank looks for it."""
    found: Checkpoint | None = None
    if place.rank == 0:
        found = checkpoint.newest(run_dir.url, say)
        if found is None and options.resume.url is not None:
            given = options.resume.url.rstrip("/")
            found = checkpoint.read(given) if checkpoint.is_committed(given) else checkpoint.newest(given, say)
            if found is None:
                raise UserError(f"resume={options.resume.url}: there is no committed checkpoint")
    url = _broadcast(found.url if found else None)
    return found if found is not None or url is None else checkpoint.read(url)


def _broadcast(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _say(text: str) -> None:
    print(f"physio-dist: {text}", flush=True)


def _silent(_: str) -> None:
    pass


class Trainer:
    """Holds what training needs and what its hooks write to."""

    def __init__(
        self, options: PretrainConfig, place: DistInfo, source: ShardDataset, model: MaskedModel, mask: MaskConfig,
        stop: PreemptionHandler, records: RunLogger, held: lease.Lease | None,
        committed: Committed | None, told: Told | None,
    ) -> None:  # fmt: skip
        self.options, self.place, self.source = options, place, source
        self.model, self.mask, self.stop, self.records, self.held = model, mask, stop, records, held
        self.committed = committed
        self.told = told if told is not None and place.rank == 0 else _nothing
        self.groups = mask_groups(source.info.channels)
        self.first = place.rank == 0

    def train(self, order: Any, found: Checkpoint | None, start: int) -> None:
        options, place, source, records = self.options, self.place, self.source, self.records
        opts, run = options.train, self.records.run_dir
        if start >= opts.steps:
            records.say(f"{run.url} has all of its {opts.steps} steps already; a larger train.steps goes on")
            return
        micro, passes = split_share(opts.global_batch, place.world, opts.micro_batch)
        seed = options.run.seed

        def ready(batch: Batch) -> MaskedBatch:
            prepared = prepare_batch(batch, self.mask, self.groups, seed, "train")
            return pin(prepared) if torch.cuda.is_available() else prepared

        validation = Validation(
            source, opts.val_samples, micro, self.mask, self.groups, seed, opts.loss, place.rank, place.world
        )
        if validation.total == 0:
            why = "train.val_samples is 0" if not opts.val_samples else "the shard set's val split is empty"
            records.say(f"no held-out windows, so there will be no val_loss: {why}")
        self.engine = engine = Engine(self.model, options, micro, passes)
        self.judge = StepGuard(opts, found.progress.guard if found is not None else {})
        records.open(start, engine.device, VERSIONS)
        records.log_banner(start, micro, passes, count_parameters(self.model.config), engine.device)
        saver = AsyncCheckpointer(self.first, self._take)
        share = BatchShare(
            place.rank, place.world, micro, passes,
            count_flops(self.model.config, len(source.info.channels), source.info.samples // PATCH),
        )  # fmt: skip
        plan = LoaderPlan(order, "train", micro * passes, start, opts.steps, place.rank, place.world, place.node)
        with (
            PrefetchLoader(source, plan, ready) as feed,
            Watchdog(place.rank, opts.hang_timeout_s) as watchdog,
            ProfiledSteps(opts.profile if self.first else [], self._keep_profile) as profiled,
        ):  # fmt: skip
            hooks = Hooks(
                at=watchdog.at,
                begin=lambda step: self._begin(step, profiled),
                log=self._log if self.first else _nothing,
                trace=records.trace if opts.log_sample_keys else None,
                examples=records.examples,
                warn=records.say,
                show=records.log_progress if self.first else _nothing,
            )
            nothing = numpy.zeros(0, dtype=numpy.int64)
            empty = source.read_batch(0, nothing, nothing, nothing, size=micro)
            dry = to_device(ready(empty), slice(None), engine.device)
            engine.prepare((dry.x, dry.hidden, dry.valid))
            if found is not None:
                engine.load_optimizer_state(found.optimizer)
                if opts.ema and found.ema is not None:
                    engine.load_ema(found.ema)
            self.stop.training = True
            try:
                train(
                    engine, source, feed, validation, options, share, start, self.stop, self.judge, saver, hooks,
                    order.epoch,
                )  # fmt: skip
            except BaseException:
                saver.abandon()
                # Sending the rest may fail too; what is told is why training ended.
                with contextlib.suppress(storage.StorageError):
                    records.close()
                raise
        records.close()
        records.say(f"done: {opts.steps} steps; `physio-dist report {run.url}` draws the report")

    def _begin(self, step: int, profiled: ProfiledSteps) -> None:
        profiled.at(step)
        self.told({"step": step - 1})

    def _log(self, line: dict[str, Any]) -> None:
        self.records.log(line)
        self.told(self.records.newest)

    def _keep_profile(self, trace: bytes) -> None:
        storage.write_bytes(self.records.run_dir.file("profile.json"), trace)

    def _take(self, step: int) -> CheckpointFiles:
        """Copy what the checkpoint of this step holds; only the first rank keeps it (a collective)."""
        tensors = {
            checkpoint.MODEL: self.engine.weights(self.first),
            checkpoint.OPTIMIZER: self.engine.optimizer_state(self.first),
        }
        if self.options.train.ema:
            tensors[checkpoint.EMA] = self.engine.ema_weights(self.first)
        self.records.flush()
        sets = self.source.sets
        progress = Progress(
            step=step, samples=step * self.options.train.global_batch,
            fingerprints=[shards.fingerprint for shards in sets], order=_order_of(self.options, self.source),
            encoder=self.model.config.to_dict(),
            signal={
                "signal": self.source.signal, "channels": list(self.source.info.channels), "rate": sets[0].rate,
                "unit_uv": UNIT_UV, "simulated": any(shards.simulated for shards in sets),
            },
            guard=self.judge.state(),
        )  # fmt: skip
        return _CheckpointFiles(self, progress, tensors, self.records.newest)


class _CheckpointFiles:
    """A checkpoint on its way."""

    def __init__(
        self, rank: Trainer, progress: Progress, tensors: dict[str, checkpoint.Tensors], newest: dict[str, Any]
    ) -> None:
        self._rank, self._progress, self._tensors, self._newest = rank, progress, tensors, newest
        self._run = rank.records.run_dir
        self._draft: checkpoint.Draft | None = None

    def send(self) -> None:
        if self._rank.first:
            self._draft = checkpoint.write(self._run.url, self._progress, self._tensors)
        # What led to this step is in the bucket before the step is.
        self._run.sync()

    def commit(self) -> None:
        assert self._rank.held is not None and self._draft is not None
        self._rank.held.check()
        checkpoint.commit(self._draft)
        checkpoint.prune(self._run.url, self._rank.options.train.keep_checkpoints, self._progress.step)

    def committed(self) -> None:
        if self._rank.committed is not None:
            self._rank.committed(self._progress.step, self._newest)


def _nothing(*_: Any) -> None:
    pass
