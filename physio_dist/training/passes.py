"""Forward and backward passes: the same for training, validation and the diagnosis of a non-finite step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from physio_dist.config import PretrainConfig
from physio_dist.objectives.dual_mask import LossTerms, dual_mask_loss
from physio_dist.runtime.distributed import BatchShare
from physio_dist.training.backends.base import Backend
from physio_dist.training.batch import MaskedBatch, MicroBatch, seed_dropout, to_device

TERM_SUMS = ("loss", "weight", "intra", "intra_count", "inter", "inter_count")
"""The sums over samples that `sum_terms` returns."""


def forward(backend: Backend, micro: MicroBatch, loss: str) -> tuple[torch.Tensor, LossTerms]:
    """Predictions ``[sample, channel, patch, 200]`` for a micro batch, and their loss terms by sample."""
    predicted = backend(micro.x, micro.hidden, micro.valid)
    return predicted, dual_mask_loss(predicted, micro.x, micro.intra, micro.inter, micro.valid, loss)


def sum_terms(terms: LossTerms, weight: torch.Tensor) -> torch.Tensor:
    """Weighted sums of loss terms over samples, float64 ``[6]``, in the order of `TERM_SUMS`."""
    w = weight
    columns = (terms.loss * w, w, terms.intra * w, terms.has_intra * w, terms.inter * w, terms.has_inter * w)
    return torch.stack([column.detach().double().sum() for column in columns])


@dataclass(frozen=True)
class Passes:
    """This rank's passes of a step.

    Attributes:
        backend: holds the model.
        options: of the run.
        share: of each global batch.
    """

    backend: Backend
    options: PretrainConfig
    share: BatchShare

    def run(self, batch: MaskedBatch, step: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """All micro steps of a step, without the optimizer.

        Returns:
            `sum_terms` of this rank's samples, and their losses: ``[micro]`` for each micro step.
        """
        sums = torch.zeros(len(TERM_SUMS), dtype=torch.float64, device=self.backend.device)
        losses: list[torch.Tensor] = []
        for k in range(self.share.micro_steps):
            terms, weight = self.micro_step(batch, step, k)
            losses.append(terms.loss.detach())
            sums += sum_terms(terms, weight)
        return sums, losses

    def micro_step(self, batch: MaskedBatch, step: int, k: int) -> tuple[LossTerms, torch.Tensor]:
        """Forward and backward pass of micro step ``k``.

        Returns:
            Loss terms and weights ``[micro]`` of its samples.
        """
        share = self.share
        micro = to_device(batch, slice(k * share.micro, (k + 1) * share.micro), self.backend.device)
        seed_dropout(self.options.run.seed, step, k, share.rank)
        _, terms = forward(self.backend, micro, self.options.train.loss)
        # The backend averages over ranks; times the world over the batch this is the mean over samples, however
        # unequally the ranks share them.
        loss = (terms.loss * micro.weight).sum() * (share.world / self.options.train.global_batch)
        self.backend.backward(loss, k == share.micro_steps - 1, share.micro_steps)
        return terms, micro.weight
