"""Held-out loss of both mask terms, against predicting zero and against interpolating in time.

The windows, their order and their masks are fixed for a run, so that its validations can be compared with each other.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import save as save_safetensors

from physio_dist.data.loading.dataset import ShardDataset
from physio_dist.data.loading.order import rank_slice
from physio_dist.models.encoders.criss_cross import UNIT_UV
from physio_dist.objectives.baselines import predict_interpolation, predict_zero
from physio_dist.objectives.dual_mask import MaskConfig, dual_mask_loss
from physio_dist.runtime.arrays import Int64Array
from physio_dist.training.backends.deepspeed_engine import Engine
from physio_dist.training.batch import MaskedBatch, MicroBatch, prepare_batch, to_device

EXAMPLES = 6
_PREDICTORS = ("", "zero_", "interp_")


class Validation:
    """The held-out part of a run on one rank.

    Args:
        source: opened shard sets.
        count: windows, at most; they are spread evenly over the split.
        size: windows a forward pass.
        mask, groups, seed, loss: as in training; the masks' purpose differs.
        rank, world: of this process.
    """

    def __init__(
        self, source: ShardDataset, count: int, size: int, mask: MaskConfig, groups: Sequence[Sequence[int]], seed: int,
        loss: str, rank: int, world: int,
    ) -> None:  # fmt: skip
        self._source, self._size, self._rank, self._loss = source, size, rank, loss
        # Always with all leads, so that runs with and without lead dropping can be compared.
        self._mask, self._groups, self._seed = replace(mask, lead_dropout=0.0), groups, seed
        members = source.members("val")
        sets = np.concatenate([np.full(len(ids), i, dtype=np.int64) for i, ids in enumerate(members)])
        ids = np.concatenate(members)
        chosen = np.unique(np.linspace(0, len(ids) - 1, min(count, len(ids))).astype(np.int64)) if len(ids) else ids
        self.total = len(chosen)
        low, high = rank_slice(self.total, rank, world) if self.total >= world else (0, self.total if rank == 0 else 0)
        self._sets, self._ids = sets[chosen][low:high], ids[chosen][low:high]
        self._positions: Int64Array = np.arange(low, high, dtype=np.int64)
        # Every rank takes the same number of forward passes, because under ZeRO 3 each is a collective.
        widest = self.total if self.total < world else -(-self.total // world)
        self._passes = -(-widest // size)

    def _load(self, number: int) -> MaskedBatch:
        rows = slice(number * self._size, (number + 1) * self._size)
        batch = self._source.read_batch(
            0, self._sets[rows], self._ids[rows], self._positions[rows], self._size, fetching=False
        )
        return prepare_batch(batch, self._mask, self._groups, self._seed, "val")

    @torch.no_grad()
    def run(self, engine: Engine, step: int) -> tuple[dict[str, float], bytes | None]:
        """Validate after ``step`` (a collective).

        Returns:
            ``val_loss``, ``val_intra``, ``val_inter`` and the same terms of the two predictors, in the unit of the
            loss; and on the first rank a safetensors file of some windows with masks and reconstructions.
        """
        engine.train(False)
        sums = torch.zeros(1 + 6 * len(_PREDICTORS), dtype=torch.float64, device=engine.device)
        examples: bytes | None = None
        for number in range(self._passes):
            prepared = self._load(number)
            micro = to_device(prepared, slice(None), engine.device)
            predicted = engine(micro.x, micro.hidden, micro.valid).float()
            guesses = (predicted, predict_zero(micro.x), predict_interpolation(micro.x, micro.hidden, micro.valid))
            terms = [
                dual_mask_loss(guess, micro.x, micro.intra, micro.inter, micro.valid, self._loss) for guess in guesses
            ]
            columns = [micro.weight]
            for t in terms:
                w = micro.weight
                columns += [t.loss * w, w, t.intra * w, t.has_intra * w, t.inter * w, t.has_inter * w]
            sums += torch.stack([column.double().sum() for column in columns])
            if number == 0 and self._rank == 0:
                examples = self._examples(prepared, micro, predicted, step)
            prepared.batch.release()
        if dist.is_initialized():
            dist.all_reduce(sums)
        engine.train(True)
        return _means(sums.tolist()), examples

    def _examples(self, prepared: MaskedBatch, micro: MicroBatch, predicted: torch.Tensor, step: int) -> bytes:
        n = min(EXAMPLES, len(prepared.batch.samples[1]))

        def wave(x: torch.Tensor) -> Any:
            return (x[:n].flatten(2) * UNIT_UV).cpu().numpy()

        sets = self._source.sets
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
                "channels": json.dumps(self._source.info.channels),
                "keys": json.dumps(self._source.keys((self._sets[:n], self._ids[:n]))),
                "simulated": json.dumps(any(shards.simulated for shards in sets)),
            },
        )


def _means(sums: Sequence[float]) -> dict[str, float]:
    means: dict[str, float] = {}
    for i, predictor in enumerate(_PREDICTORS):
        loss, n, intra, n_intra, inter, n_inter = sums[1 + 6 * i : 7 + 6 * i]
        for term, total, count in (("loss", loss, n), ("intra", intra, n_intra), ("inter", inter, n_inter)):
            means[f"val_{predictor}{term}"] = total / count if count else float("nan")
    return means
