"""Fine-tuning of encoders and a linear head end to end, to compare with frozen encoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from physio_dist.data.loading.dataset import ShardDataset
from physio_dist.evaluation.backbones import Backbone
from physio_dist.evaluation.label_table import LabelTable
from physio_dist.evaluation.splits import Fold
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder
from physio_dist.models.encoders.patches import to_patches
from physio_dist.models.fusion.pooling import pool
from physio_dist.runtime.arrays import FloatArray, Int64Array
from physio_dist.runtime.seeding import permutation, seed_torch
from physio_dist.stats.scores import auc

# Factor of the head's learning rate: it starts from zero.
_HEAD_LR_FACTOR = 10.0


class Finetuning(Protocol):
    """Training options: epochs, learning rate of the encoders, windows per batch, pooling of the features."""

    epochs: int
    lr: float
    batch: int
    pooling: str


class _Classifier(nn.Module):
    """Encoders, pooling and normalisation without parameters for each signal, and a linear head over their
    concatenation, initialised to zero."""

    def __init__(
        self, encoders: Mapping[str, CrissCrossEncoder], channels: Mapping[str, int], classes: int, pooling: str
    ) -> None:
        super().__init__()
        # A standard deviation of nothing but zeros, as of an invalid channel, has no gradient.
        self.pooling = pooling.removesuffix("_std")
        apart = self.pooling.startswith("channels_")
        sizes = {name: one.config.d * (channels[name] if apart else 1) for name, one in encoders.items()}
        self.encoders = nn.ModuleDict(encoders)
        self.norms = nn.ModuleDict({n: nn.LayerNorm(size, elementwise_affine=False) for n, size in sizes.items()})
        self.head = nn.Linear(sum(sizes.values()), classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Compute logits ``[batch, class]`` from ``[batch, channel, patch, 200]`` and validity ``[batch, channel]`` of
        each signal. A signal without a valid channel contributes zeros."""
        parts = []
        for name, encoder in self.encoders.items():
            x, valid = inputs[name]
            features = encoder(x, valid=valid[:, :, None].expand(x.shape[:3]))
            parts.append(self.norms[name](pool(features, valid, self.pooling)))
        logits: Tensor = self.head(torch.cat(parts, dim=1))
        return logits


def finetune(
    backbones: Mapping[str, Backbone], sources: Mapping[str, ShardDataset], table: LabelTable, fold: Fold,
    options: Finetuning, purpose: str,
) -> tuple[FloatArray, int]:  # fmt: skip
    """Train encoders and a head on a fold's first inner split, and test after the epoch that its validation people
    select.

    Args:
        backbones: initial encoders, by signal; not modified.
        sources: datasets, by signal.
        table: the labelled windows.
        fold: its first inner split trains and validates.
        options: ``epochs``, ``lr``, ``batch``, ``pooling``.
        purpose: seed of the random draws.

    Returns:
        Probabilities float64 ``[test row, class]``, and the epoch, from 1.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, validation = fold.inner[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed_torch("finetune", purpose)
        encoders = {name: deepcopy(backbone.module) for name, backbone in backbones.items()}
        channels = {name: len(source.info.channels) for name, source in sources.items()}
        model = _Classifier(encoders, channels, len(table.classes), options.pooling).to(device)
        groups = [
            {"params": list(model.encoders.parameters()), "lr": options.lr},
            {"params": list(model.head.parameters()), "lr": options.lr * _HEAD_LR_FACTOR},
        ]
        counts = np.bincount(table.label[train], minlength=len(table.classes))
        weight = torch.from_numpy(len(train) / (len(counts) * counts)).float().to(device)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)

        def read(rows: Int64Array) -> dict[str, tuple[Tensor, Tensor]]:
            ids = table.sample[rows]
            return {name: _windows(sources[name], ids, one.unit_uv, device) for name, one in backbones.items()}

        best: tuple[float, int, FloatArray] | None = None
        for epoch in range(1, options.epochs + 1):
            model.train()
            order = train[permutation(len(train), "finetune", purpose, epoch)]
            for rows in np.array_split(order, -(-len(order) // options.batch)):
                loss = F.cross_entropy(model(read(rows)), torch.from_numpy(table.label[rows]).to(device), weight)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            validated = _probability(model, read, validation, options.batch)
            area = auc(table.label[validation], validated) or 0.0
            if best is None or area > best[0]:
                best = (area, epoch, _probability(model, read, fold.test, options.batch))
    assert best is not None
    return best[2], best[1]


def _windows(source: ShardDataset, ids: Int64Array, unit_uv: float, device: torch.device) -> tuple[Tensor, Tensor]:
    batch = source.read_batch(0, np.zeros_like(ids), ids, ids, len(ids))
    x = to_patches(torch.from_numpy(batch.signal).to(device), torch.from_numpy(batch.scale).to(device), unit_uv)
    batch.release()
    return x, torch.from_numpy(batch.valid).to(device)


@torch.no_grad()
def _probability(
    model: nn.Module, read: Callable[[Int64Array], dict[str, tuple[Tensor, Tensor]]], rows: Int64Array, size: int
) -> FloatArray:  # fmt: skip
    model.eval()
    parts = [model(read(rows[low : low + size])).double().softmax(1).cpu().numpy() for low in range(0, len(rows), size)]
    probability: FloatArray = np.concatenate(parts)
    return probability
