"""Diagnosis of steps with a high or non-finite loss: the ranks and samples they come from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from physio_dist.data.loading.dataset import ShardDataset
from physio_dist.errors import PhysioError
from physio_dist.training.batch import MaskedBatch
from physio_dist.training.collectives import gather_objects
from physio_dist.training.passes import Passes

_MAX_NAMED = 4


class NonFiniteError(PhysioError):
    """A loss or a gradient became NaN or infinite; it was caught before any weight moved."""


class SampleLoss(NamedTuple):
    """Loss of a sample; infinity stands for every non-finite value."""

    loss: float
    rank: int
    key: str


def sample_losses(
    dataset: ShardDataset, batch: MaskedBatch, rank: int, losses: Sequence[torch.Tensor]
) -> list[SampleLoss]:
    """Losses of this rank's samples, in their order; ``losses`` ``[micro]`` for each micro step, padding last."""
    values = torch.cat(list(losses)).float().cpu().tolist()
    keys = dataset.keys(batch.batch.samples)
    return [
        SampleLoss(value if math.isfinite(value) else math.inf, rank, key)
        for value, key in zip(values, keys, strict=False)
    ]


def top_loss_samples(samples: Iterable[SampleLoss]) -> str:
    """Names of the samples with the highest losses over all ranks (a collective)."""
    local = sorted(samples, reverse=True)[:_MAX_NAMED]
    return _format_samples(sorted(gather_objects(local), reverse=True))


def diagnose_nonfinite(passes: Passes, batch: MaskedBatch, step: int, samples: Sequence[SampleLoss]) -> NonFiniteError:
    """Make the error for a step whose loss or gradient is not finite; it names ranks and samples (a collective).

    Once the ranks have shared the gradient it no longer tells which of them made it non-finite. So if all losses are
    finite, the step's passes are repeated and each rank looks at its own gradients.
    """
    bad = gather_objects([sample for sample in samples if math.isinf(sample.loss)][:_MAX_NAMED])
    quantity = "loss"
    if not bad:
        quantity = "gradient"
        passes.backend.skip()
        size = passes.share.micro
        microbatches = [samples[k * size : (k + 1) * size] for k in nonfinite_microbatches(passes, batch, step)]
        suspects = [sample for part in microbatches for sample in sorted(part, reverse=True)]
        bad = gather_objects(suspects[:_MAX_NAMED])
    return NonFiniteError(
        f"the {quantity} of step {step} is not a finite number ({_format_samples(bad)}); no weight was changed by it. "
        "A lower train.lr, a longer train.warmup_steps or train.precision=fp32 may help"
    )


def nonfinite_microbatches(passes: Passes, batch: MaskedBatch, step: int) -> list[int]:
    """Numbers of this rank's micro steps whose own gradient is not finite (a collective)."""
    nonfinite = []
    for k in range(passes.share.micro_steps):
        with passes.backend.own_norms() as norms:
            passes.micro_step(batch, step, k)
        if norms and not bool(torch.isfinite(torch.stack(norms).square().sum())):
            nonfinite.append(k)
    passes.backend.skip()
    return nonfinite


def _format_samples(samples: Sequence[SampleLoss]) -> str:
    if not samples:
        return "which rank it comes from could not be found out"
    ranks: dict[int, list[str]] = {}
    for sample in samples[:_MAX_NAMED]:
        ranks.setdefault(sample.rank, []).append(sample.key)
    return "; ".join(f"rank {rank}, samples {', '.join(keys)}" for rank, keys in ranks.items())
