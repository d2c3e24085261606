"""The training loop of one rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from physio_dist.config import PretrainConfig
from physio_dist.data.loading.dataset import ShardDataset
from physio_dist.data.loading.loader import PrefetchLoader
from physio_dist.errors import Stopped
from physio_dist.objectives.dual_mask import dual_mask_loss
from physio_dist.runtime import watchdog
from physio_dist.runtime.distributed import BatchShare
from physio_dist.runtime.preemption import PreemptionHandler
from physio_dist.training.async_checkpoint import AsyncCheckpointer
from physio_dist.training.backends.deepspeed_engine import Engine
from physio_dist.training.batch import MaskedBatch, learning_rate, seed_dropout, to_device
from physio_dist.training.nonfinite import diagnose_nonfinite, top_loss_samples
from physio_dist.training.step_guard import StepAction, StepGuard
from physio_dist.training.throughput import StepClock, device_peak, peak_memory_mb, training_flops
from physio_dist.training.validation import Validation


@dataclass(frozen=True)
class Hooks:
    """What the loop calls and does not know.

    Attributes:
        at: takes a step and what this rank now turns to, for the watchdog.
        begin: takes a step before it begins.
        log: takes a line of metrics (first rank only does something with it).
        trace: takes a step and the keys this rank trained on.
        examples: takes a file of held-out windows.
        warn: takes a sentence for the log.
        show: takes step, loss, samples/s and data wait, for the display.
    """

    at: Callable[[int, str], None]
    begin: Callable[[int], None]
    log: Callable[[dict[str, Any]], None]
    trace: Callable[[int, list[str]], None] | None
    examples: Callable[[bytes], None]
    warn: Callable[[str], None]
    show: Callable[[int, float, float, float], None]


def train(
    engine: Engine, source: ShardDataset, feed: PrefetchLoader[MaskedBatch], validation: Validation,
    options: PretrainConfig,
    share: BatchShare, start: int, stop: PreemptionHandler, judge: StepGuard, saver: AsyncCheckpointer, hooks: Hooks,
    epoch_of: Callable[[int], int],
) -> None:  # fmt: skip
    """Train from step ``start`` (done) to ``train.steps``.

    Raises:
        Stopped: a signal came; the step it came in was finished and saved.
        NonFiniteError: a loss or a gradient became NaN or infinite on some rank; no weight was moved by it on any.
        DataError: a shard disagrees with its index.
    """
    opts = options.train
    clock = StepClock()
    peak = device_peak(engine.device)
    skipped = 0
    batches = iter(feed)
    for step in range(start + 1, opts.steps + 1):
        hooks.begin(step)
        hooks.at(step, watchdog.DATA)
        asked = time.perf_counter()
        prepared = next(batches)
        clock.waited(time.perf_counter() - asked)
        lr = learning_rate(step, opts)
        engine.set_lr(lr)
        engine.scale = judge.scale
        hooks.at(step, watchdog.PASS)
        sums, each = _backward(engine, prepared, options, share, step)
        if hooks.trace is not None:
            hooks.trace(step, source.keys(prepared.batch.samples))
        hooks.at(step, watchdog.AGREE)
        sums[6] = engine.gradient_norm() / share.world
        sums[7:] = torch.tensor([float(stop.reason is not None), float(stop.save), *saver.local_status()])
        # The one time in a step that the ranks agree and the device is waited for.
        loss, _, intra, n_intra, inter, n_inter, norm, stops, saves, sent, committed = _total(sums)
        loss, stopping, saving = loss / opts.global_batch, stops > 0, saves > 0
        hooks.at(step, watchdog.MOVE)
        verdict = judge(loss, norm)
        if verdict is StepAction.NONFINITE:
            # One of an earlier step is whole.
            saver.finish()
            raise diagnose_nonfinite(engine, source, prepared, options, share, step, each)
        if verdict in (StepAction.SPIKE, StepAction.SKIP):
            before, usual = judge.medians()
            what = "left out" if verdict is StepAction.SKIP else "taken; train.skip_spikes=true would leave it out"
            hooks.warn(
                f"spike in step {step}, {what}: loss {loss:.4g} (median {before:.4g}), gradient norm {norm:.4g} "
                f"(median {usual:.4g}); highest losses: {top_loss_samples(source, prepared, share, each)}"
            )
        if verdict in (StepAction.APPLY, StepAction.SPIKE):
            engine.step(norm)
        else:
            engine.skip()
            skipped += 1
        saver.update(sent == share.world, committed > 0)
        # Nothing reads the signals any more: the step's collective has waited for the device.
        prepared.batch.release()

        logged = step % opts.log_every == 0 or step in (1, opts.steps)
        validated = validation.total > 0 and (step % opts.val_every == 0 or step == opts.steps)
        line: dict[str, Any] = {}
        if logged or validated:
            step_s, wait = clock.read()
            rate = opts.global_batch / step_s
            line = {
                "step": step, "epoch": epoch_of(step - 1), "samples": step * opts.global_batch,
                "loss": loss, "loss_intra": _ratio(intra, n_intra),
                "loss_inter": _ratio(inter, n_inter), "val_loss": None, "lr": lr, "grad_norm": norm,
                "samples_per_s": rate, "samples_per_s_device": rate / share.world,
                "data_wait_frac": _most(wait, engine.device),
                "mfu": training_flops(share.flops) * rate / (peak * share.world) if peak else None,
                "step_s": step_s, "time": time.time(), "peak_memory_mb": peak_memory_mb(engine.device),
                # For how long checkpoints have held the loop up since the line before.
                "ckpt_s": saver.blocked_s, "loss_scale": engine.scale,
                "skipped": skipped,
            }  # fmt: skip
            saver.blocked_s, skipped = 0.0, 0
            clock.reset()
        if validated:
            hooks.at(step, watchdog.VALIDATE)
            began = time.perf_counter()
            means, examples = validation.run(engine, step)
            line |= means
            if examples is not None:
                hooks.examples(examples)
            clock.exclude(time.perf_counter() - began)
        if line:
            hooks.log(line)
            hooks.show(step, line["loss"], line["samples_per_s"], line["data_wait_frac"])
        if step % opts.save_every == 0 or step == opts.steps or stopping or saving:
            hooks.at(step, watchdog.SAVE)
            began = time.perf_counter()
            saver.save(step)
            if saving:
                stop.save = False
            if stopping or saving or step == opts.steps:
                saver.finish()
            clock.exclude(time.perf_counter() - began)
        if stopping and step < opts.steps:
            raise Stopped(f"stopped ({stop.reason or 'another rank was asked to stop'}) after saving step {step}")


def _backward(
    engine: Engine, prepared: MaskedBatch, options: PretrainConfig, share: BatchShare, step: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Forward and backward passes of a step, without the step.

    Returns:
        This rank's sums of the loss terms and their counts, float64 ``[11]`` with five places to spare, and the losses
        of its samples, ``[micro]`` for each pass.
    """
    sums = torch.zeros(11, dtype=torch.float64, device=engine.device)
    each: list[torch.Tensor] = []
    for k in range(share.micro_steps):
        micro = to_device(prepared, slice(k * share.micro, (k + 1) * share.micro), engine.device)
        seed_dropout(options.run.seed, step, k, share.rank)
        predicted = engine(micro.x, micro.hidden, micro.valid)
        terms = dual_mask_loss(predicted, micro.x, micro.intra, micro.inter, micro.valid, options.train.loss)
        w = micro.weight
        # DeepSpeed averages over ranks; times the world over the batch this is the mean over samples, however
        # unequally the ranks share them.
        loss = (terms.loss * w).sum() * (share.world / options.train.global_batch)
        engine.backward(loss, k == share.micro_steps - 1, share.micro_steps)
        each.append(terms.loss.detach())
        parts = (terms.loss * w, w, terms.intra * w, terms.has_intra * w, terms.inter * w, terms.has_inter * w)
        sums[:6] += torch.stack([part.detach().double().sum() for part in parts])
    return sums, each


def _total(sums: torch.Tensor) -> list[float]:
    """Sums over the ranks."""
    if dist.is_initialized():
        dist.all_reduce(sums)
    total: list[float] = sums.tolist()
    return total


def _most(value: float, device: torch.device) -> float:
    """The largest value over the ranks."""
    most = torch.tensor([value], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return float(most)


def _ratio(total: float, count: float) -> float | None:
    return total / count if count else None
