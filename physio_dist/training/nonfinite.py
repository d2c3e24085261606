"""Which rank and which samples a bad step comes from. Costs nothing until there is one."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from physio_dist.config import PretrainConfig
from physio_dist.data.loading.dataset import ShardDataset
from physio_dist.errors import PhysioError
from physio_dist.objectives.dual_mask import dual_mask_loss
from physio_dist.runtime.distributed import BatchShare
from physio_dist.training.backends.deepspeed_engine import Engine
from physio_dist.training.batch import MaskedBatch, seed_dropout, to_device

_SHOWN = 4
Found = tuple[float, int, str]


class NonFiniteError(PhysioError):
    """A loss or a gradient became NaN or infinite; it was caught before any weight moved."""


def top_loss_samples(source: ShardDataset, prepared: MaskedBatch, share: BatchShare, each: list[torch.Tensor]) -> str:
    """The samples with the highest losses of a step, over all ranks (a collective)."""
    found = _gather(sorted(_samples(source, prepared, share, each), reverse=True)[:_SHOWN])
    return _told(sorted(found, reverse=True))


def diagnose_nonfinite(
    engine: Engine, source: ShardDataset, prepared: MaskedBatch, options: PretrainConfig, share: BatchShare, step: int,
    each: list[torch.Tensor],
) -> NonFiniteError:  # fmt: skip
    """The error of a step whose loss or gradient is not finite; it names ranks and samples (a collective).

    The gradient itself no longer tells by whom it was spoilt once the ranks have shared it, so the passes of the step
    are done again and every rank looks at its own.
    """
    mine = _samples(source, prepared, share, each)
    found = _gather([one for one in mine if math.isinf(one[0])][:_SHOWN])
    what = "loss"
    if not found:
        what = "gradient"
        engine.skip()
        spoilt = nonfinite_microbatches(engine, prepared, options, share, step)
        by_pass = [mine[k * share.micro : (k + 1) * share.micro] for k in spoilt]
        found = _gather([one for part in by_pass for one in sorted(part, reverse=True)][:_SHOWN])
    return NonFiniteError(
        f"the {what} of step {step} is not a finite number ({_told(found)}); no weight was changed by it. A lower "
        "train.lr, a longer train.warmup_steps or train.precision=fp32 may help"
    )


def _samples(source: ShardDataset, prepared: MaskedBatch, share: BatchShare, each: list[torch.Tensor]) -> list[Found]:
    """Loss, rank and key of this rank's samples, in their order; infinity stands for all that is no number."""
    losses = torch.cat(each).float().cpu().tolist()
    keys = source.keys(prepared.batch.samples)
    return [
        (loss if math.isfinite(loss) else math.inf, share.rank, key) for loss, key in zip(losses, keys, strict=False)
    ]


def nonfinite_microbatches(
    engine: Engine, prepared: MaskedBatch, options: PretrainConfig, share: BatchShare, step: int
) -> list[int]:
    """The passes of this rank whose own gradient is not finite."""
    spoilt = []
    for k in range(share.micro_steps):
        micro = to_device(prepared, slice(k * share.micro, (k + 1) * share.micro), engine.device)
        seed_dropout(options.run.seed, step, k, share.rank)
        with engine.own_norms() as norms:
            predicted = engine(micro.x, micro.hidden, micro.valid)
            terms = dual_mask_loss(predicted, micro.x, micro.intra, micro.inter, micro.valid, options.train.loss)
            loss = (terms.loss * micro.weight).sum() * (share.world / options.train.global_batch)
            engine.backward(loss, k == share.micro_steps - 1, share.micro_steps)
        if norms and not bool(torch.isfinite(torch.stack(norms).square().sum())):
            spoilt.append(k)
    engine.skip()
    return spoilt


def _gather(mine: list[Found]) -> list[Found]:
    if not dist.is_initialized():
        return mine
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, mine)
    return [one for box in boxes for one in box]


def _told(found: list[Found]) -> str:
    if not found:
        return "which rank it comes from could not be found out"
    ranks: dict[int, list[str]] = {}
    for _, rank, key in found[:_SHOWN]:
        ranks.setdefault(rank, []).append(key)
    return "; ".join(f"rank {rank}, samples {', '.join(keys)}" for rank, keys in ranks.items())
