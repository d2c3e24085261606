"""Stored signals to the patches that encoders take."""

from __future__ import annotations

import torch
from torch import Tensor

from physio_dist.models.encoders.criss_cross import PATCH, UNIT_UV


def to_patches(signal: Tensor, scale: Tensor, unit_uv: float = UNIT_UV) -> Tensor:
    """Scale int16 signals and cut them into patches, on the device they are on.

    Args:
        signal: int16 ``[batch, channel, time]``, ``time`` a multiple of ``PATCH``.
        scale: float32 ``[batch]``, microvolts per bit.
        unit_uv: microvolts that the encoder takes as 1.

    Returns:
        float32 ``[batch, channel, patch, PATCH]``.
    """
    samples, channels, time = signal.shape
    factor = (scale / unit_uv)[:, None, None]
    return signal.to(torch.float32).mul_(factor).view(samples, channels, time // PATCH, PATCH)
