"""One rank of `test_bad_gradients.py`: one rank's gradient is not finite; all write whether their weights changed.

Started by a launcher with an output folder, it goes through all ZeRO stages and precisions.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

from physio_dist.runtime.distributed import choose_accelerator

choose_accelerator()

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from physio_dist.config import PretrainConfig  # noqa: E402
from physio_dist.models.encoders.criss_cross import MaskedModel, preset  # noqa: E402
from physio_dist.training.backends.deepspeed_engine import Engine, Tensors, quiet  # noqa: E402


def full_state(engine: Engine) -> Tensors:
    state = engine.optimizer_state()
    return {**engine.weights(), **state}


def same(a: Tensors, b: Tensors) -> bool:
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def engine_of(stage: int, precision: str, batch: tuple[torch.Tensor, torch.Tensor, None]) -> Engine:
    options = PretrainConfig()
    options.zero.stage, options.train.precision = stage, precision
    torch.manual_seed(0)
    engine = Engine(MaskedModel(preset("tiny", 0.0)), options, 2, 2)
    engine.prepare(batch)
    engine.set_lr(1e-3)
    engine.scale = 1024.0 if precision == "fp16" else 1.0
    return engine


def step(engine: Engine, batch: tuple[torch.Tensor, torch.Tensor, None], nonfinite: bool = False) -> float:
    """A step of two passes; with ``nonfinite`` the last rank has a finite loss and a gradient that is not finite."""
    for k in range(2):
        out = engine(*batch).float()
        loss = out.square().mean()
        if nonfinite and k == 0 and dist.get_rank() == dist.get_world_size() - 1:
            # The root of zero is zero; its slope is infinite, and times zero no number.
            loss = loss + (out * 0.0).square().sum().sqrt()
        assert torch.isfinite(loss)
        engine.backward(loss / 2, k == 1, 2)
    norm = float(engine.gradient_norm())
    if math.isfinite(norm):
        engine.step(norm)
    else:
        engine.skip()
    return norm


def main(out: str) -> None:
    torch.set_num_threads(1)
    quiet()
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    rank = dist.get_rank()
    x = torch.randn(2, 3, 4, 200, generator=torch.Generator().manual_seed(rank))
    hidden = torch.zeros(2, 3, 4, dtype=torch.bool)
    hidden[:, :, 1] = True
    batch = (x, hidden, None)
    results = {}
    for stage in range(4):
        for precision in ("fp32", "bf16", "fp16"):
            disturbed, calm = engine_of(stage, precision, batch), engine_of(stage, precision, batch)
            norms = [step(disturbed, batch), step(disturbed, batch)]
            before = full_state(disturbed)
            norms += [step(disturbed, batch, nonfinite=True), step(disturbed, batch, nonfinite=True)]
            unchanged = same(before, full_state(disturbed))
            norms.append(step(disturbed, batch))
            for _ in range(3):
                step(calm, batch)
            results[f"{stage} {precision}"] = {
                "finite": [math.isfinite(norm) for norm in norms], "kept": unchanged,
                "moved": not same(before, full_state(disturbed)), "as_undisturbed": same(
                    full_state(disturbed), full_state(calm)
                ),
            }  # fmt: skip
    Path(out, f"rank-{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
