"""Batches with their masks, micro batches on the device, learning rate and dropout seeds of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from physio_dist.config import TrainOptions
from physio_dist.data.loading.dataset import Batch
from physio_dist.models.encoders.criss_cross import PATCH
from physio_dist.models.encoders.patches import to_patches
from physio_dist.objectives.dual_mask import DualMask, MaskConfig, sample_masks
from physio_dist.runtime.seeding import seed_torch


@dataclass(frozen=True)
class MaskedBatch:
    """A rank's batch with its masks, as CPU tensors; the signal is still int16.

    Attributes:
        batch: from the data loader.
        signal: int16 ``[sample, channel, time]``.
        scale: float32 ``[sample]``, microvolts per bit.
        valid: bool ``[sample, channel]``, without dropped leads.
        weight: float32 ``[sample]``, 0 for padding.
        intra, inter: bool ``[sample, channel, patch]``, the two parts of the dual mask.
        all_valid: whether ``valid`` is True everywhere.
    """

    batch: Batch
    signal: torch.Tensor
    scale: torch.Tensor
    valid: torch.Tensor
    weight: torch.Tensor
    intra: torch.Tensor
    inter: torch.Tensor
    all_valid: bool


@dataclass(frozen=True)
class MicroBatch:
    """A micro batch on the device.

    Attributes:
        x: float ``[sample, channel, patch, 200]`` in units of 100 uV.
        intra, inter, hidden: bool ``[sample, channel, patch]``; ``hidden`` is ``intra | inter``.
        valid: bool of that shape; None if everything is valid.
        weight: float32 ``[sample]``.
    """

    x: torch.Tensor
    intra: torch.Tensor
    inter: torch.Tensor
    hidden: torch.Tensor
    valid: torch.Tensor | None
    weight: torch.Tensor


def prepare_batch(
    batch: Batch, mask: MaskConfig, groups: Sequence[Sequence[int]], seed: int, purpose: str
) -> MaskedBatch:
    """Draw a batch's masks.

    Args:
        batch: from the data loader.
        mask: options of the masks.
        groups: channels that are linearly dependent; see `sample_masks`.
        seed: of the run.
        purpose: ``train`` or ``val``; different masks for each.
    """
    patches = batch.signal.shape[2] // PATCH
    masks: DualMask = sample_masks(mask, groups, patches, seed, purpose, batch.positions, batch.valid)
    valid = batch.valid & masks.kept_leads
    return MaskedBatch(
        batch=batch, signal=torch.from_numpy(batch.signal), scale=torch.from_numpy(batch.scale),
        valid=torch.from_numpy(valid), weight=torch.from_numpy(batch.weight),
        intra=torch.from_numpy(masks.intra), inter=torch.from_numpy(masks.inter), all_valid=bool(valid.all()),
    )  # fmt: skip


def pin(prepared: MaskedBatch) -> MaskedBatch:
    """Copy a batch to page-locked memory, so that copies to a GPU overlap with its work."""
    pinned: dict[str, Any] = {k: v.pin_memory() for k, v in vars(prepared).items() if isinstance(v, torch.Tensor)}
    return replace(prepared, **pinned)


def to_device(prepared: MaskedBatch, rows: slice, device: torch.device) -> MicroBatch:
    """Move some samples to the device as int16 and convert them to patches there."""
    signal, scale, valid, weight, intra, inter = (
        getattr(prepared, name)[rows].to(device, non_blocking=True)
        for name in ("signal", "scale", "valid", "weight", "intra", "inter")
    )
    x = to_patches(signal, scale)
    # Where all is valid the mask would cost time and change nothing.
    patch_valid = None if prepared.all_valid else valid[:, :, None].expand(x.shape[:3])
    return MicroBatch(x, intra, inter, intra | inter, patch_valid, weight)


def seed_dropout(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed dropout by these numbers, so that a resumed run draws what an uninterrupted one would."""
    seed_torch("dropout", seed, step, micro, rank)


def learning_rate(step: int, train: TrainOptions) -> float:
    """Learning rate of a step (from 1): linear warm-up, then a cosine from ``lr`` to ``min_lr`` at the last step."""
    if step <= train.warmup_steps:
        return train.lr * step / train.warmup_steps
    low = min(train.min_lr, train.lr)
    share = (step - train.warmup_steps) / max(train.steps - train.warmup_steps, 1)
    return low + (train.lr - low) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
