"""Validation: held-out loss of both mask terms, and that of predicting zero and of interpolating in time.

The windows, their order and their masks are fixed for a run, so that its validations can be compared with each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save as save_safetensors

from physio_dist.config import PretrainConfig
from physio_dist.data.loading.dataset import ShardDataset
from physio_dist.data.loading.order import rank_slice
from physio_dist.models.encoders.criss_cross import UNIT_UV
from physio_dist.objectives.baselines import predict_interpolation, predict_zero
from physio_dist.objectives.dual_mask import MaskConfig, dual_mask_loss
from physio_dist.runtime.arrays import Int64Array
from physio_dist.runtime.distributed import BatchShare
from physio_dist.signals.montage import mask_groups
from physio_dist.training.backends.base import Backend
from physio_dist.training.batch import MaskedBatch, MicroBatch, prepare_batch, to_device
from physio_dist.training.collectives import sum_over_ranks
from physio_dist.training.passes import TERM_SUMS, forward, sum_terms

EXAMPLES = 6
_PREDICTORS = ("", "zero_", "interp_")


class Validation:
    """Validation on the held-out windows of a run, on one rank.

    Args:
        dataset: opened shard sets.
        mask: options of the masks; lead dropout is left out, so that runs with and without it can be compared.
        options: of the run.
        share: of this rank; as many windows are in a forward pass as in training.

    Attributes:
        total: windows over all ranks, ``train.val_samples`` at most, spread evenly over the split.
    """

    def __init__(self, dataset: ShardDataset, mask: MaskConfig, options: PretrainConfig, share: BatchShare) -> None:
        self._dataset, self._rank, self._size = dataset, share.rank, share.micro
        self._mask, self._groups = replace(mask, lead_dropout=0.0), mask_groups(dataset.info.channels)
        self._seed, self._loss = options.run.seed, options.train.loss
        members = dataset.members("val")
        sets = np.concatenate([np.full(len(ids), i, dtype=np.int64) for i, ids in enumerate(members)])
        ids = np.concatenate(members)
        count = min(options.train.val_samples, len(ids))
        chosen = np.unique(np.linspace(0, len(ids) - 1, count).astype(np.int64)) if len(ids) else ids
        self.total = len(chosen)
        rank, world = share.rank, share.world
        low, high = rank_slice(self.total, rank, world) if self.total >= world else (0, self.total if rank == 0 else 0)
        self._sets, self._ids = sets[chosen][low:high], ids[chosen][low:high]
        self._positions: Int64Array = np.arange(low, high, dtype=np.int64)
        # Every rank takes the same number of forward passes, because under ZeRO 3 each is a collective.
        widest = self.total if self.total < world else -(-self.total // world)
        self._passes = -(-widest // share.micro)

    def _load(self, number: int) -> MaskedBatch:
        rows = slice(number * self._size, (number + 1) * self._size)
        batch = self._dataset.read_batch(
            0, self._sets[rows], self._ids[rows], self._positions[rows], self._size, fetching=False
        )
        return prepare_batch(batch, self._mask, self._groups, self._seed, "val")

    @torch.no_grad()
    def run(self, backend: Backend, step: int) -> tuple[dict[str, float], bytes | None]:
        """Validate after ``step`` (a collective).

        Returns:
            ``val_loss``, ``val_intra``, ``val_inter`` and the same terms of the two baseline predictors, in the unit
            of the loss; and on the first rank a safetensors file of some windows with masks and reconstructions.
        """
        backend.train(False)
        sums = torch.zeros(len(TERM_SUMS) * len(_PREDICTORS), dtype=torch.float64, device=backend.device)
        examples: bytes | None = None
        for number in range(self._passes):
            prepared = self._load(number)
            micro = to_device(prepared, slice(None), backend.device)
            predicted, terms = forward(backend, micro, self._loss)
            baselines = (predict_zero(micro.x), predict_interpolation(micro.x, micro.hidden, micro.valid))
            all_terms = [terms] + [
                dual_mask_loss(guess, micro.x, micro.intra, micro.inter, micro.valid, self._loss) for guess in baselines
            ]
            sums += torch.cat([sum_terms(terms, micro.weight) for terms in all_terms])
            if number == 0 and self._rank == 0:
                examples = self._examples(prepared, micro, predicted.float(), step)
            prepared.batch.release()
        totals = sum_over_ranks(sums)
        backend.train(True)
        return _means(totals), examples

    def _examples(self, prepared: MaskedBatch, micro: MicroBatch, predicted: torch.Tensor, step: int) -> bytes:
        n = min(EXAMPLES, len(prepared.batch.samples[1]))

        def wave(x: torch.Tensor) -> Any:
            return (x[:n].flatten(2) * UNIT_UV).cpu().numpy()

        sets = self._dataset.sets
        return save_safetensors(
            {
                "target": wave(micro.x),
                "reconstruction": wave(predicted),
                "intra": prepared.intra[:n].numpy().astype(np.uint8),
                "inter": prepared.inter[:n].numpy().astype(np.uint8),
                "valid": prepared.valid[:n].numpy().astype(np.uint8),
            },
            {
                "step": str(step),
                "rate": f"{sets[0].rate:g}",
                "unit": "uV",
                "channels": json.dumps(self._dataset.info.channels),
                "keys": json.dumps(self._dataset.keys((self._sets[:n], self._ids[:n]))),
                "simulated": json.dumps(any(shards.simulated for shards in sets)),
            },
        )


def _means(sums: Sequence[float]) -> dict[str, float]:
    means: dict[str, float] = {}
    for i, predictor in enumerate(_PREDICTORS):
        loss, weight, intra, intra_count, inter, inter_count = sums[len(TERM_SUMS) * i : len(TERM_SUMS) * (i + 1)]
        terms = (("loss", loss, weight), ("intra", intra, intra_count), ("inter", inter, inter_count))
        for term, total, count in terms:
            means[f"val_{predictor}{term}"] = total / count if count else float("nan")
    return means
