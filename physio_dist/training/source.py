"""The samples of a run and their order, and whether the encoder can take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy

from physio_dist.config import PretrainConfig
from physio_dist.data.handle import open_dataset
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.loading.dataset import ShardDataset
from physio_dist.data.loading.order import Mixture
from physio_dist.errors import UserError
from physio_dist.models.encoders.criss_cross import PATCH
from physio_dist.objectives.dual_mask import MaskConfig, sample_masks
from physio_dist.signals.montage import mask_groups


@dataclass(frozen=True)
class TrainingSource:
    """The samples of a run and their order.

    Attributes:
        dataset: opened shard sets.
        order: of the samples.
        order_facts: what decides the order, beside the data itself.
    """

    dataset: ShardDataset
    order: Mixture
    order_facts: dict[str, Any]

    @property
    def fingerprints(self) -> list[str]:
        """Fingerprints of the shard sets, in the mixture's order."""
        return [shards.fingerprint for shards in self.dataset.sets]

    @classmethod
    def open(cls, options: PretrainConfig) -> TrainingSource:
        """Open the shard sets of a run."""
        cache = ShardCache(options.data.cache_dir, options.data.cache_gb * 1e9)
        dataset = open_dataset(options.data.index, options.data.signal, cache)
        seed, batch = options.run.seed, options.train.global_batch
        facts = {"seed": seed, "global_batch": batch, "weights": dataset.weights}
        return cls(dataset, dataset.order("train", batch, seed), facts)


def check_signal(dataset: ShardDataset, mask: MaskConfig) -> None:
    """Refuse data that the encoder cannot take.

    Raises:
        UserError: another rate, windows that are not whole patches, or nothing to hide in them.
    """
    for shards in dataset.sets:
        if shards.rate != PATCH:
            raise UserError(
                f"{shards.url} has {shards.rate:g} Hz; the encoder's patches are one second at {PATCH} Hz. Convert the "
                f"recordings again with window.rate={PATCH}"
            )
        if dataset.info.samples % PATCH:
            raise UserError(
                f"{shards.url} has windows of {dataset.info.samples} samples, which is no whole number of patches of "
                f"{PATCH}; convert the recordings again with window.seconds a whole number"
            )
    groups = mask_groups(dataset.info.channels)
    sample_masks(mask, groups, dataset.info.samples // PATCH, 0, "check", numpy.zeros(1, dtype=numpy.int64))
