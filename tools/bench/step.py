"""Speed of a training step relative to a plain implementation of the same mathematics: ``python tools/bench/step.py``.

docs/benchmarks.md says what is measured and how. The table and, as the last line, one JSON object go to stdout.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from common import BenchError, finish, interleave, last_line, rounded, say, table
from plain import PlainModel, plain_loss
from torch import Tensor, nn

from physio_dist.config import PretrainConfig
from physio_dist.data.loading.dataset import Batch
from physio_dist.models.cbramod import cbramod_name
from physio_dist.models.encoders.criss_cross import PRESETS, MaskedModel, count_flops, preset
from physio_dist.objectives.dual_mask import MaskConfig, dual_mask_loss
from physio_dist.runtime import processes
from physio_dist.runtime.distributed import choose_accelerator, init_dist_env
from physio_dist.runtime.preemption import PreemptionHandler
from physio_dist.signals.montage import ECG_12, mask_groups
from physio_dist.training.async_checkpoint import AsyncCheckpointer
from physio_dist.training.batch import MaskedBatch, prepare_batch, to_device
from physio_dist.training.callbacks import Callback
from physio_dist.training.throughput import device_peak, training_flops

PEER = "plain fp32"
CHANNELS, PATCHES = len(ECG_12), 10
# Steps in which losses are compared before anything is measured, without dropout.
CHECKED = 3
# Largest difference of their losses, as a share; measured 3e-7.
APART = 1e-5
# Windows of a batch on CUDA, of which every row takes its best.
CUDA_WINDOWS = (64, 128, 256, 512, 1024)

Clock = Callable[[], float]
Step = Callable[[], Tensor]
"""A whole training step, repeated on one batch; its loss."""


def draw(windows: int) -> MaskedBatch:
    """Windows of noise with masks from a feed's ``prepare``; all leads valid."""
    rng = np.random.default_rng(0)
    signal = (100 * rng.standard_normal((windows, CHANNELS, PATCHES * 200))).astype(np.int16)
    batch = Batch(
        step=0, signal=signal, scale=np.ones(windows, np.float32), valid=np.ones((windows, CHANNELS), np.bool_),
        weight=np.ones(windows, np.float32), positions=np.arange(windows),
        samples=(np.zeros(windows, np.int64), np.arange(windows)),
    )  # fmt: skip
    options = PretrainConfig().mask
    return prepare_batch(batch, MaskConfig(options.intra_ratio, options.inter_ratio), mask_groups(ECG_12), 0, "bench")


def as_plain(model: MaskedModel) -> PlainModel:
    """The peer with the same weights."""
    plain = PlainModel(model.config)
    plain.load_state_dict({cbramod_name(name): value for name, value in model.state_dict().items()})
    return plain


def bare(model: nn.Module, prepared: MaskedBatch, device: torch.device, low: bool) -> Step:
    """Forward pass, loss, backward pass, clipping and AdamW, and nothing around them.

    Args:
        model: ours or the plain one; it is copied.
        prepared: the batch of every step.
        device: of the step.
        low: whether under bf16 autocast.
    """
    options = PretrainConfig().train
    model, micro = copy.deepcopy(model).to(device).train(), to_device(prepared, slice(None), device)
    parameters = [p for p in model.parameters() if p.requires_grad]
    # Fused as in our engine, which computes the same in one pass.
    optimizer = torch.optim.AdamW(
        parameters, lr=options.lr, betas=(options.beta1, options.beta2), weight_decay=options.weight_decay,
        fused=isinstance(model, MaskedModel),
    )  # fmt: skip

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            predicted = model(micro.x, micro.hidden)
        if isinstance(model, PlainModel):
            loss = plain_loss(predicted, micro.x, micro.hidden)
        else:
            loss = dual_mask_loss(predicted, micro.x, micro.intra, micro.inter).loss.mean()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm)
        optimizer.step()
        return loss.detach()

    return step


class NoSnapshot:
    """A snapshot that stores nothing."""

    def upload(self) -> None:
        """Do nothing."""

    def commit(self) -> None:
        """Do nothing."""

    def on_commit(self) -> None:
        """Do nothing."""


class LastLine(Callback):
    """Keeps the newest line of metrics."""

    line: ClassVar[dict[str, Any]] = {}

    def on_metrics(self, step: int, line: dict[str, Any]) -> None:
        """Keep it."""
        self.line = line


class Loop:
    """The real loop over a DeepSpeed engine (ZeRO stage 1, one rank, bf16), fed one prepared batch again and again."""

    def __init__(self, model: MaskedModel, prepared: MaskedBatch) -> None:
        # Imported late: DeepSpeed takes seconds, and must know the device first.
        import deepspeed

        from physio_dist.runtime.distributed import BatchShare
        from physio_dist.training.backends.deepspeed_engine import Engine, quiet
        from physio_dist.training.step_guard import StepGuard

        init_dist_env()
        quiet()
        deepspeed.init_distributed(dist_backend=None if torch.cuda.is_available() else "gloo", verbose=False)
        windows = len(prepared.signal)
        options = PretrainConfig()
        train = replace(options.train, global_batch=windows, precision="bf16", save_every=10**9, val_every=10**9)
        self._options = replace(options, train=train)
        self._prepared, self._done, self._guard = prepared, 0, StepGuard(train, {})
        self._engine = Engine(copy.deepcopy(model), self._options, windows, 1)
        micro = to_device(prepared, slice(None), self._engine.device)
        self._engine.prepare((micro.x, micro.hidden, micro.valid))
        self._share = BatchShare(0, 1, windows, 1, count_flops(model.config, CHANNELS, PATCHES))

    def __call__(self, steps: int) -> float:
        """Train for some steps; the loss of the last."""
        from physio_dist.training.trainer import Trainer

        last = LastLine()
        options = replace(self._options, train=replace(self._options.train, steps=self._done + steps))
        no_validation: Any = SimpleNamespace(total=0)
        trainer = Trainer(
            options=options, share=self._share, backend=self._engine, dataset=cast(Any, None),
            loader=itertools.repeat(self._prepared), epoch_of=lambda _: 0, validation=no_validation,
            guard=self._guard, checkpointer=AsyncCheckpointer(True, lambda _: NoSnapshot()),
            preemption=PreemptionHandler(), callbacks=last,
        )  # fmt: skip
        trainer.fit(self._done)
        self._done += steps
        return float(last.line["loss"])

    def close(self) -> None:
        """Leave the group of ranks."""
        torch.distributed.destroy_process_group()


def check(config: str, device: torch.device) -> float:
    """Train ours and the plain one from the same weights without dropout.

    Returns:
        Largest difference of a step's losses, as a share.

    Raises:
        BenchError: they are not the same mathematics, so their speeds could not be compared.
    """
    torch.manual_seed(0)
    model, prepared = MaskedModel(preset(config, 0.0)), draw(4)
    # Training starts from predictions near zero, whose loss would be the same whatever computed them.
    nn.init.xavier_normal_(model.reconstruct.weight)
    ours, plain = bare(model, prepared, device, False), bare(as_plain(model), prepared, device, False)
    apart = max(abs(float(a) / float(b) - 1) for a, b in ((ours(), plain()) for _ in range(CHECKED)))
    if apart > APART:
        raise BenchError(f"ours and the plain one differ by {apart:.1e} of their loss: not the same mathematics")
    return apart


def rate(step: Step, windows: int, steps: int, clock: Clock, losses: list[float]) -> float:
    """Windows a second of some steps; notes their last loss."""
    began = clock()
    for _ in range(steps):
        loss = step()
    losses.append(float(loss))  # This waits for the device.
    seconds = clock() - began
    return windows * steps / seconds


def best_windows(make: Callable[[int], Step], tried: Sequence[int]) -> int:
    """The batch size with which a row is fastest, of those that fit into memory."""
    rates: dict[int, float] = {}
    for windows in tried:
        try:
            step = make(windows)
            rate(step, windows, 3, time.perf_counter, [])
            rates[windows] = rate(step, windows, 10, time.perf_counter, [])
        except torch.OutOfMemoryError:
            break
    if not rates:
        raise BenchError(f"not even {tried[0]} windows fit into the device's memory")
    return max(rates, key=lambda windows: rates[windows])


def breakdown(step: Step, device: torch.device) -> str:
    """Profile a step with torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    by = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return cast(str, profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=50))


def run(options: argparse.Namespace) -> str:
    """All measures; prints the table.

    Returns:
        The last line.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(options.threads)
    clock: Clock = time.process_time if options.cpu_time else time.perf_counter
    apart = check(options.preset, device)
    say(f"losses of {CHECKED} steps without dropout differ by at most {apart:.1e}")
    torch.manual_seed(0)
    model = MaskedModel(preset(options.preset, 0.1))
    plain = as_plain(model)
    tried = (options.windows,) if options.windows else (32,) if device.type == "cpu" else CUDA_WINDOWS
    kinds: dict[str, tuple[nn.Module, bool]] = {
        PEER: (plain, False), "plain bf16": (plain, True), "ours fp32": (model, False), "ours bf16": (model, True),
    }  # fmt: skip
    windows: dict[str, int] = {}
    steps: dict[str, Step] = {}
    for name, (kind, low) in kinds.items():

        def make(count: int, kind: nn.Module = kind, low: bool = low) -> Step:
            return bare(kind, draw(count), device, low)

        windows[name] = best_windows(make, tried) if len(tried) > 1 else tried[0]
        steps[name] = make(windows[name])
    losses: dict[str, list[float]] = {name: [] for name in [*steps, "loop"]}
    windows["loop"] = windows["ours bf16"]
    loop = Loop(model, draw(windows["loop"]))

    def looped() -> float:
        began = clock()
        losses["loop"].append(loop(options.steps))
        return windows["loop"] * options.steps / (clock() - began)

    measures: dict[str, Callable[[], float]] = {
        name: lambda name=name: rate(steps[name], windows[name], options.steps, clock, losses[name])  # type: ignore[misc]
        for name in steps
    }
    measures["loop"] = looped
    say("warms up")
    for measure in measures.values():
        measure()
    rates = interleave(options.repeats, measures)
    loop.close()
    title = f"Training steps of {options.preset}, {CHANNELS} leads x {PATCHES} patches, {options.threads} threads"
    unit = "windows/s of CPU time" if options.cpu_time else "windows/s"
    print(table(title, unit, rates))
    if options.profile:
        print(breakdown(steps["ours bf16"], device))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    also: dict[str, object] = {
        "ours_fp32": versus(medians, "ours fp32"), "plain_bf16": versus(medians, "plain bf16"),
        "ours_to_plain_bf16": round(medians["ours bf16"] / medians["plain bf16"], 3),
        "loop": {"rate": rounded(medians["loop"]), "share_of_bare": round(medians["loop"] / medians["ours bf16"], 3)},
        "windows": windows, "threads": options.threads,
        "apart_without_dropout": float(f"{apart:.1e}"),
        "last_loss": {name: round(values[-1], 4) for name, values in losses.items()},
    }  # fmt: skip
    if peak := device_peak(device):
        flops = training_flops(count_flops(model.config, CHANNELS, PATCHES))
        also["mfu"] = {name: round(medians[name] * flops / peak, 4) for name in ("ours bf16", "loop")}
    return last_line("step", unit, options.repeats, medians["ours bf16"], {PEER: medians[PEER]}, also)


def versus(medians: Mapping[str, float], name: str) -> dict[str, float | None]:
    """A row's rate and its ratio to the peer's."""
    return {"rate": rounded(medians[name]), "ratio": round(medians[name] / medians[PEER], 3)}


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--preset", default="base", choices=sorted(PRESETS))
    parser.add_argument("--windows", type=int, default=0, help="of a batch; 32 on a CPU, the best of some on CUDA")
    parser.add_argument("--threads", type=int, default=processes.cores(), help="of the CPU; all cores")
    parser.add_argument("--steps", type=int, default=4, help="of each row in a repeat")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cpu-time", action="store_true", help="with --threads 1, on a CPU that others use too")
    parser.add_argument("--profile", action="store_true", help="where a step of ours in bf16 spends its time")
    options = parser.parse_args()
    if min(options.threads, options.steps, options.repeats) < 1 or options.windows < 0:
        parser.error("--threads, --steps and --repeats must be at least 1, --windows at least 0")
    if options.cpu_time and (options.threads > 1 or torch.cuda.is_available()):
        # Threads that wait for each other, or for a GPU, use CPU time too.
        parser.error("--cpu-time needs --threads 1 and no GPU")
    choose_accelerator()
    return finish(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
