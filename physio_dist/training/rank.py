"""One rank's life: open the run and the data, build, go on from the newest checkpoint, train."""

from __future__ import annotations

import contextlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import deepspeed
import numpy
import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from physio_dist import __version__, lifeline, storage
from physio_dist.config import PretrainConfig, mixture
from physio_dist.errors import EXIT_FAULT, PhysioError, UserError
from physio_dist.models.criss_cross import CHECKPOINTED, PATCH, UNIT_UV, MaskedModel, count_flops, preset
from physio_dist.models.masking import MaskConfig, draw_masks
from physio_dist.models.weights import PEOPLE_FILE
from physio_dist.shards.cache import ShardCache
from physio_dist.shards.stream import Batch, Feed, Source
from physio_dist.signals.montage import lead_layouts, mask_groups
from physio_dist.training import checkpoint, lease
from physio_dist.training.checkpoint import Checkpoint, Progress
from physio_dist.training.engine import Engine, quiet
from physio_dist.training.guards import StopFlag
from physio_dist.training.loop import Hooks, Share, train
from physio_dist.training.place import Place, join_ranks, split_share
from physio_dist.training.rundir import METRICS, RunDir, compare_config, write_config
from physio_dist.training.step import Prepared, pin, prepare, to_device
from physio_dist.training.validation import Validation

# Takes the step of a checkpoint and the newest line of metrics, which only the first rank has.
Committed = Callable[[int, dict[str, Any]], None]
# A launcher ends the other ranks within about a second of one's death.
_LAUNCHER_S = 5.0


class PeerLostError(PhysioError):
    """Another rank is gone; this one cannot go on alone."""


def run(options: PretrainConfig, stop: StopFlag, committed: Committed | None = None) -> None:
    """Pretrain as one rank.

    Args:
        options: of the run; the same on every rank.
        stop: looked at once a step.
        committed: called on every rank after each committed checkpoint.

    Raises:
        PhysioError: everything that has a documented status.
    """
    place = join_ranks()
    if place.world > options.train.global_batch:
        raise UserError(f"{place.world} ranks cannot share train.global_batch={options.train.global_batch}")
    say = _say if place.rank == 0 else _silent
    torch.set_num_threads(options.train.threads or max(1, lifeline.cores() // place.local_world))
    mask = MaskConfig(**vars(options.mask))
    encoder = preset(options.model.preset, options.model.dropout)
    run_dir = RunDir(storage.join(options.run.dir, options.run.name), place.rank)
    cache = ShardCache(options.data.cache_dir, options.data.cache_gb * 1e9)
    source = Source(mixture(options.data.index), options.data.signal, cache)
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
        deepspeed.init_distributed(dist_backend=None if torch.cuda.is_available() else "gloo", verbose=False)
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
        mine = _Rank(options, place, run_dir, source, model, mask, stop, say, attempt, held, committed)
        mine.train(order, found, start)
    except RuntimeError as error:
        # What the collectives say when a peer is gone.
        if any(word in str(error) for word in ("Connection", "gloo", "NCCL", "Socket")):
            if stop.came_within(_LAUNCHER_S):
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


def _check_signal(source: Source, mask: MaskConfig) -> None:
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
    draw_masks(mask, groups, source.info.samples // PATCH, 0, "check", numpy.zeros(1, dtype=numpy.int64))


def _order_of(options: PretrainConfig, source: Source) -> dict[str, Any]:
    """What decides, beside the data itself, which samples a step takes."""
    return {"seed": options.run.seed, "global_batch": options.train.global_batch, "weights": source.weights}


def _check_fits(found: Checkpoint, source: Source, encoder: dict[str, Any], order: dict[str, Any]) -> None:
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
    run_dir: RunDir, options: PretrainConfig, place: Place, say: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint to start from, the same on every rank; the first rank looks for it."""
    found: Checkpoint | None = None
    if place.rank == 0:
        found = checkpoint.newest(run_dir.url, say)
        if found is None and options.resume not in ("auto", "none"):
            given = options.resume.rstrip("/")
            found = checkpoint.read(given) if checkpoint.is_committed(given) else checkpoint.newest(given, say)
            if found is None:
                raise UserError(f"resume={options.resume}: there is no committed checkpoint")
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


class _Rank:
    """Holds what training needs and what its hooks write to."""

    def __init__(
        self, options: PretrainConfig, place: Place, run_dir: RunDir, source: Source, model: MaskedModel,
        mask: MaskConfig, stop: StopFlag, say: Callable[[str], None], attempt: int, held: lease.Lease | None,
        committed: Committed | None,
    ) -> None:  # fmt: skip
        self.options, self.place, self.run_dir, self.source = options, place, run_dir, source
        self.model, self.mask, self.stop, self.say, self.attempt, self.held = model, mask, stop, say, attempt, held
        self.committed, self.newest = committed, dict[str, Any]()
        self.groups = mask_groups(source.info.channels)
        self.trace_name = f"trace/rank-{place.rank}.jsonl"
        self.first = place.rank == 0
        self.board: SummaryWriter | None = None
        self.bar: Any = None

    def train(self, order: Any, found: Checkpoint | None, start: int) -> None:
        options, place, source = self.options, self.place, self.source
        opts = options.train
        if start >= opts.steps:
            self.say(f"{self.run_dir.url} has all of its {opts.steps} steps already; a larger train.steps goes on")
            return
        micro, passes = split_share(opts.global_batch, place.world, opts.micro_batch)
        seed = options.run.seed

        def ready(batch: Batch) -> Prepared:
            prepared = prepare(batch, self.mask, self.groups, seed, "train")
            return pin(prepared) if torch.cuda.is_available() else prepared

        validation = Validation(
            source, opts.val_samples, micro, self.mask, self.groups, seed, place.rank, place.world
        )
        if validation.total == 0:
            why = "train.val_samples is 0" if not opts.val_samples else "the shard set's val split is empty"
            self.say(f"no held-out windows, so there will be no val_loss: {why}")
        self.engine = Engine(self.model, options, micro, passes)
        self._open_files(start)
        self._introduce(start, micro, passes)
        flops = count_flops(self.model.config, len(source.info.channels), source.info.samples // PATCH)
        hooks = Hooks(
            log=self._log if self.first else _nothing,
            trace=self._trace if opts.trace else None,
            examples=self._examples,
            save=self._save,
            show=self._show if self.first else _nothing,
        )
        share = Share(place.rank, place.world, micro, passes, flops)
        with Feed(
            source, order, "train", place.rank, place.world, micro * passes, ready, start, opts.steps, place.node
        ) as feed:
            nothing = numpy.zeros(0, dtype=numpy.int64)
            empty = source.gather(0, nothing, nothing, nothing, size=micro)
            dry = to_device(ready(empty), slice(None), self.engine.device)
            self.engine.prepare((dry.x, dry.hidden, dry.valid))
            if found is not None:
                self.engine.load_optimizer_state(found.optimizer)
            self.stop.training = True
            try:
                train(
                    self.engine, source, feed, validation, options, share, start, self.stop, hooks, order.epoch
                )
            except BaseException:
                # Sending the rest may fail too; what is told is why training ended.
                with contextlib.suppress(storage.StorageError):
                    self._close()
                raise
            self._close()
        self.say(f"done: {opts.steps} steps; `physio-dist report {self.run_dir.url}` draws the report")

    def _open_files(self, start: int) -> None:
        if self.options.train.trace:
            self.run_dir.open_lines(self.trace_name)
        if not self.first:
            return
        self.run_dir.open_lines(METRICS, keep_up_to=start)
        board = self.run_dir.spool / "tensorboard"
        self.board = SummaryWriter(str(board), purge_step=start + 1 if start else None, flush_secs=10)
        sets = self.source.sets
        facts = [
            {
                "url": s.url, "fingerprint": s.fingerprint, "splits": s.splits, "people": s.people, "rate": s.rate,
                "channels": list(s.signals[self.source.signal].channels), "simulated": s.simulated,
                "sources": list(s.sources),
            }
            for s in sets
        ]  # fmt: skip
        storage.write_json(self.run_dir.file("data.json"), {"indexes": facts})
        # Fusion must be able to tell later whether a person of its test set was seen here.
        seen = [sidecar.person[sidecar.split == 0] for sidecar in self.source.sidecars]
        people = sorted({f"{person:016x}" for ids in seen for person in ids.tolist()})
        storage.write_bytes(self.run_dir.file(PEOPLE_FILE), (json.dumps(people) + "\n").encode())
        self._note_attempt(start)

    def _note_attempt(self, start: int) -> None:
        name = self.run_dir.file("attempts.json")
        try:
            earlier = storage.read_json(name)
        except storage.NotFoundError:
            earlier = []
        versions = {"physio-dist": __version__, "torch": torch.__version__, "deepspeed": deepspeed.__version__}
        note = {
            "attempt": self.attempt, "from_step": start, "world": self.place.world,
            "zero_stage": self.options.zero.stage, "precision": self.options.train.precision,
            "device": _device_name(self.engine.device), "threads": torch.get_num_threads(),
            "versions": {**versions, "python": platform.python_version(), "numpy": numpy.__version__},
        }  # fmt: skip
        storage.write_json(name, [*earlier, note])

    def _introduce(self, start: int, micro: int, passes: int) -> None:
        options, source = self.options, self.source
        count = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in self.model.parameters())
        train_n = sum(shards.splits["train"] for shards in source.sets)
        simulated = " SIMULATED" if any(shards.simulated for shards in source.sets) else ""
        epochs = options.train.steps * options.train.global_batch / max(train_n, 1)
        self.say(
            f"{options.model.preset} encoder, {count / 1e6:.2f} M parameters, {options.train.precision}, ZeRO stage "
            f"{options.zero.stage}, {self.place.world} rank(s) on {_device_name(self.engine.device)}"
        )
        self.say(
            f"{train_n}{simulated} windows of {len(source.info.channels)} leads to train on; global batch "
            f"{options.train.global_batch} = {self.place.world} rank(s) x {passes} pass(es) x {micro}; "
            f"{options.train.steps} steps are {epochs:.1f} epochs"
        )
        where = f"going on after step {start}" if start else "starting"
        self.say(f"{where}: {self.run_dir.url} (attempt {self.attempt})")
        if self.first and sys.stderr.isatty():
            self.bar = tqdm(total=options.train.steps, initial=start, unit="step", dynamic_ncols=True)
        self._began, self._start = time.monotonic(), start

    def _log(self, line: dict[str, Any]) -> None:
        # JSON has no NaN.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.newest = clean
        self.run_dir.add_line(METRICS, clean)
        if self.board is not None:
            for name, value in clean.items():
                if isinstance(value, int | float) and name not in ("step", "time"):
                    self.board.add_scalar(name, value, line["step"])

    def _trace(self, step: int, keys: list[str]) -> None:
        self.run_dir.add_line(self.trace_name, {"step": step, "attempt": self.attempt, "keys": keys})

    def _examples(self, data: bytes) -> None:
        storage.write_bytes(self.run_dir.file("examples.safetensors"), data)

    def _show(self, step: int, loss: float, rate: float, wait: float) -> None:
        text = f"loss {loss:.4f}, {rate:.0f} samples/s, data wait {wait:.1%}"
        if self.bar is not None:
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix_str(text)
            return
        per_step = (time.monotonic() - self._began) / max(step - self._start, 1)
        left = time.strftime("%H:%M:%S", time.gmtime(per_step * (self.options.train.steps - step)))
        self.say(f"step {step}/{self.options.train.steps}: {text}, ETA {left}")

    def _save(self, step: int) -> None:
        """Commit a checkpoint (a collective)."""
        model, optimizer = self.engine.weights(), self.engine.optimizer_state()
        if self.board is not None:
            self.board.flush()
        # What led to this step is in the bucket before the step is.
        self.run_dir.sync()
        dist.barrier()
        if self.first:
            sets = self.source.sets
            progress = Progress(
                step=step, samples=step * self.options.train.global_batch,
                fingerprints=[shards.fingerprint for shards in sets], order=_order_of(self.options, self.source),
                encoder=self.model.config.to_dict(),
                signal={
                    "signal": self.source.signal, "channels": list(self.source.info.channels), "rate": sets[0].rate,
                    "unit_uv": UNIT_UV, "simulated": any(shards.simulated for shards in sets),
                },
            )  # fmt: skip
            checkpoint.write(self.run_dir.url, progress, model, optimizer, self._before_commit)
            checkpoint.prune(self.run_dir.url, self.options.train.keep, step)
        # A rank that ended now would have its launcher end the one that is writing.
        dist.barrier()
        if self.committed is not None:
            self.committed(step, self.newest)

    def _before_commit(self) -> None:
        self.run_dir.sync()
        assert self.held is not None
        self.held.check()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.board is not None:
            self.board.close()
        self.run_dir.close()


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _nothing(*_: Any) -> None:
    pass
