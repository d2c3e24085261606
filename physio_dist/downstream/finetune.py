"""Encoder and linear head trained end to end: what freezing costs."""

from __future__ import annotations

import hashlib
from copy import deepcopy

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from physio_dist.downstream.backbones import Backbone
from physio_dist.downstream.metrics import auc
from physio_dist.downstream.probe_options import ProbeOptions
from physio_dist.downstream.splits import Fold
from physio_dist.downstream.tasks import Table
from physio_dist.models.criss_cross import PATCH, CrissCrossEncoder
from physio_dist.models.fusion import pool
from physio_dist.shards.order import permutation
from physio_dist.shards.stream import Source

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

# The head begins at zero and has to come further than the encoder.
_HEAD_FASTER = 10.0


class _Classifier(nn.Module):
    """Encoder, pooling, normalisation without parameters, linear head that begins at zero."""

    def __init__(self, encoder: CrissCrossEncoder, channels: int, classes: int, pooling: str) -> None:
        super().__init__()
        # A standard deviation of nothing but zeros, as of an invalid channel, has no gradient.
        self.pooling = pooling.removesuffix("_std")
        features = encoder.config.d * (channels if self.pooling.startswith("channels_") else 1)
        self.encoder = encoder
        self.norm = nn.LayerNorm(features, elementwise_affine=False)
        self.head = nn.Linear(features, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        """``x`` ``[batch, channel, patch, 200]``, ``valid`` ``[batch, channel]`` -> logits ``[batch, class]``."""
        features = self.encoder(x, valid=valid[:, :, None].expand(x.shape[:3]))
        logits: Tensor = self.head(self.norm(pool(features, valid, self.pooling)))
        return logits


def finetune(
    backbone: Backbone, source: Source, table: Table, fold: Fold, options: ProbeOptions, purpose: str
) -> tuple[Floats, int]:  # fmt: skip
    """Train an encoder and a head on a fold's first inner split, and test after the epoch that its validation people
    chose.

    Args:
        backbone: where training begins; it stays as it is.
        source: of the windows.
        table: the labelled windows.
        fold: its first inner split trains and validates.
        options: ``epochs``, ``lr``, ``batch``, ``pooling``.
        purpose: what the random draws depend on.

    Returns:
        Probabilities float64 ``[test row, class]``, and the epoch, from 1.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, validation = fold.inner[0]
    digest = hashlib.blake2b(f"finetune/{purpose}".encode(), digest_size=8).digest()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(digest, "little") >> 1)
        encoder = deepcopy(backbone.module)
        model = _Classifier(encoder, len(source.info.channels), len(table.classes), options.pooling).to(device)
        groups = [
            {"params": list(model.encoder.parameters()), "lr": options.lr},
            {"params": list(model.head.parameters()), "lr": options.lr * _HEAD_FASTER},
        ]
        counts = np.bincount(table.label[train], minlength=len(table.classes))
        weight = torch.from_numpy(len(train) / (len(counts) * counts)).float().to(device)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        best: tuple[float, int, Floats] | None = None
        for epoch in range(1, options.epochs + 1):
            model.train()
            order = train[permutation(len(train), "finetune", purpose, epoch)]
            for rows in np.array_split(order, -(-len(order) // options.batch)):
                x, valid = _windows(source, table.sample[rows], backbone.unit_uv, device)
                loss = F.cross_entropy(model(x, valid), torch.from_numpy(table.label[rows]).to(device), weight)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
            chosen = _probability(model, source, table.sample[validation], backbone.unit_uv, device, options.batch)
            area = auc(table.label[validation], chosen) or 0.0
            if best is None or area > best[0]:
                tested = _probability(model, source, table.sample[fold.test], backbone.unit_uv, device, options.batch)
                best = (area, epoch, tested)
    assert best is not None
    return best[2], best[1]


def _windows(source: Source, ids: Ints, unit_uv: float, device: torch.device) -> tuple[Tensor, Tensor]:
    batch = source.gather(0, np.zeros_like(ids), ids, ids, len(ids))
    signal = torch.from_numpy(batch.signal).to(device)
    scale = torch.from_numpy(batch.scale).to(device) / unit_uv
    x = (signal * scale[:, None, None]).view(*signal.shape[:2], -1, PATCH)
    return x, torch.from_numpy(batch.valid).to(device)


@torch.no_grad()
def _probability(
    model: nn.Module, source: Source, ids: Ints, unit_uv: float, device: torch.device, size: int
) -> Floats:  # fmt: skip
    model.eval()
    parts = [
        model(*_windows(source, ids[low : low + size], unit_uv, device)).double().softmax(1).cpu().numpy()
        for low in range(0, len(ids), size)
    ]
    found: Floats = np.concatenate(parts)
    return found
