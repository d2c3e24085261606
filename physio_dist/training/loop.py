"""The training loop of one rank."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from physio_dist.config import PretrainConfig
from physio_dist.errors import Stopped
from physio_dist.models.masking import dual_mask_loss
from physio_dist.shards.stream import Feed, Source
from physio_dist.training.engine import Engine
from physio_dist.training.guards import NonFiniteError, StopFlag, all_finite
from physio_dist.training.meters import StepClock, device_peak, peak_memory_mb, training_flops
from physio_dist.training.step import Prepared, learning_rate, seed_dropout, to_device
from physio_dist.training.validation import Validation


@dataclass(frozen=True)
class Share:
    """This rank's share of every step.

    Attributes:
        rank, world: of this process.
        micro: windows a forward pass.
        micro_steps: forward passes a step.
        flops: of one window's forward pass.
    """

    rank: int
    world: int
    micro: int
    micro_steps: int
    flops: int


@dataclass(frozen=True)
class Hooks:
    """What the loop calls and does not know.

    Attributes:
        log: takes a line of metrics (first rank only does something with it).
        trace: takes a step and the keys this rank trained on.
        examples: takes a file of held-out windows.
        save: commits a checkpoint of the step (a collective).
        show: takes step, loss, samples/s and data wait, for the display.
    """

    log: Callable[[dict[str, Any]], None]
    trace: Callable[[int, list[str]], None] | None
    examples: Callable[[bytes], None]
    save: Callable[[int], None]
    show: Callable[[int, float, float, float], None]


def train(
    engine: Engine, source: Source, feed: Feed[Prepared], validation: Validation, options: PretrainConfig,
    share: Share, start: int, stop: StopFlag, hooks: Hooks, epoch_of: Callable[[int], int],
) -> None:  # fmt: skip
    """Train from step ``start`` (done) to ``train.steps``.

    Raises:
        Stopped: a signal came; the step it came in was finished and saved.
        NonFiniteError: a loss became NaN or infinite, which is found before any weight moves, or a gradient did, which
            is found after; no checkpoint is written of it.
        DataError: a shard disagrees with its index.
    """
    opts = options.train
    clock = StepClock()
    saved = start
    peak = device_peak(engine.device)
    batches = iter(feed)
    for step in range(start + 1, opts.steps + 1):
        asked = time.perf_counter()
        prepared = next(batches)
        clock.waited(time.perf_counter() - asked)
        lr = learning_rate(step, opts)
        engine.set_lr(lr)
        sums = _step(engine, source, prepared, options, share, step)
        if hooks.trace is not None:
            hooks.trace(step, source.keys(prepared.batch.samples))
        stopping = _agree(sums, stop)
        if not math.isfinite(engine.grad_norm):
            raise NonFiniteError(
                f"the gradient of step {step} is not finite; the newest checkpoint is from before it. A lower train.lr "
                "or train.precision=bf16 may help"
            )

        logged = step % opts.log_every == 0 or step in (1, opts.steps)
        validated = validation.total > 0 and (step % opts.val_every == 0 or step == opts.steps)
        line: dict[str, Any] = {}
        if logged or validated:
            step_s, wait = clock.read()
            loss, _, intra, n_intra, inter, n_inter, _ = sums.tolist()
            rate = opts.global_batch / step_s
            line = {
                "step": step, "epoch": epoch_of(step - 1), "samples": step * opts.global_batch,
                "loss": loss / opts.global_batch, "loss_intra": _ratio(intra, n_intra),
                "loss_inter": _ratio(inter, n_inter), "val_loss": None, "lr": lr, "grad_norm": engine.grad_norm,
                "samples_per_s": rate, "data_wait_frac": _most(wait, engine.device),
                "mfu": training_flops(share.flops) * rate / (peak * share.world) if peak else None,
                "step_s": step_s, "time": time.time(), "peak_memory_mb": peak_memory_mb(engine.device),
            }  # fmt: skip
            clock.reset()
        if validated:
            began = time.perf_counter()
            means, examples = validation.run(engine, step)
            line |= means
            if examples is not None:
                hooks.examples(examples)
            clock.exclude(time.perf_counter() - began)
        if line:
            hooks.log(line)
            hooks.show(step, line["loss"], line["samples_per_s"], line["data_wait_frac"])
        if step % opts.save_every == 0 or step == opts.steps or stopping:
            began = time.perf_counter()
            hooks.save(step)
            saved = step
            clock.exclude(time.perf_counter() - began)
        if stopping and step < opts.steps:
            raise Stopped(f"stopped ({stop.reason or 'another rank was asked to stop'}) after saving step {saved}")


def _step(
    engine: Engine, source: Source, prepared: Prepared, options: PretrainConfig, share: Share, step: int
) -> torch.Tensor:
    """One optimizer step; this rank's sums of the loss terms and their counts, float64 ``[7]``."""
    sums = torch.zeros(7, dtype=torch.float64, device=engine.device)
    for k in range(share.micro_steps):
        micro = to_device(prepared, slice(k * share.micro, (k + 1) * share.micro), engine.device)
        seed_dropout(options.run.seed, step, k, share.rank)
        predicted = engine(micro.x, micro.hidden, micro.valid)
        terms = dual_mask_loss(predicted, micro.x, micro.intra, micro.inter, micro.valid)
        w = micro.weight
        # DeepSpeed averages over ranks; times the world over the batch this is the mean over samples, however
        # unequally the ranks share them.
        loss = (terms.loss * w).sum() * (share.world / options.train.global_batch)
        if not all_finite(loss):
            raise NonFiniteError(_told(source, prepared, share, k, step, terms.loss))
        engine.backward(loss, k == share.micro_steps - 1, share.micro_steps)
        parts = (terms.loss * w, w, terms.intra * w, terms.has_intra * w, terms.inter * w, terms.has_inter * w)
        sums[:6] += torch.stack([part.detach().double().sum() for part in parts])
    return sums


def _told(source: Source, prepared: Prepared, share: Share, k: int, step: int, loss: torch.Tensor) -> str:
    bad = torch.nonzero(~torch.isfinite(loss)).flatten().tolist()
    keys = source.keys(prepared.batch.samples)
    mine = [keys[k * share.micro + i] for i in bad if k * share.micro + i < len(keys)]
    where = f"on rank {share.rank}, samples {', '.join(mine[:4])}" if mine else "on another rank"
    return (
        f"the loss of step {step} is not a finite number ({where}); no weight was changed by it. A lower train.lr, a "
        "longer train.warmup_steps or train.precision=fp32 may help"
    )


def _agree(sums: torch.Tensor, stop: StopFlag) -> bool:
    """Sum the loss terms over the ranks, and learn whether any rank was asked to stop."""
    sums[6] = float(stop.reason is not None)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return float(sums[6]) > 0


def _most(value: float, device: torch.device) -> float:
    """The largest value over the ranks."""
    most = torch.tensor([value], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
