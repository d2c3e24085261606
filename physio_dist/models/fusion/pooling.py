"""Pooling of an encoder's features: one vector per window, or one per patch or channel."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def pool(values: Tensor | npt.NDArray[Any], valid: Tensor | npt.NDArray[Any], kind: str) -> Tensor:
    """Pool the features of each window's patches.

    Over patches ``mean`` takes the mean, ``mean_std`` the mean and the standard deviation. Channels are averaged over
    the valid ones, or with the prefix ``channels_`` kept apart, side by side, invalid ones as zeros. A window without a
    valid channel gets zeros.

    Args:
        values: float ``[window, channel, patch, d]``.
        valid: bool ``[window, channel]``.
        kind: one of the option ``pooling``'s values.

    Returns:
        float ``[window, f]``: f is d, doubled by ``_std``, times the number of channels with ``channels_``.
    """
    x, mask = torch.as_tensor(values), torch.as_tensor(valid)[:, :, None]
    over_patches = kind.removeprefix("channels_")
    if over_patches == "mean":
        pooled = x.mean(dim=2)
    elif over_patches == "mean_std":
        std, mean = torch.std_mean(x, dim=2, correction=0)
        pooled = torch.cat([mean, std], dim=2)
    else:
        raise ValueError(f"no pooling {kind!r}")
    # Not a product: features of invalid channels may be infinite.
    pooled = pooled.masked_fill(~mask, 0.0)
    if kind.startswith("channels_"):
        return pooled.flatten(1)
    return pooled.sum(dim=1) / mask.sum(dim=1).clamp_min(1)


def make_tokens(
    values: Tensor | npt.NDArray[Any], valid: Tensor | npt.NDArray[Any], kind: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The input of a head for one modality: one vector per window, or several tokens.

    ``attention``: one token per patch, averaged over the valid channels; ``channels_attention``: one token per
    channel, averaged over patches. Other kinds: one vector, see :func:`pool`.

    Args:
        values: float ``[window, channel, patch, d]``.
        valid: bool ``[window, channel]``.
        kind: see :func:`physio_dist.models.fusion.heads.input_kind`.

    Returns:
        float ``[window, f]`` or ``[window, token, d]``; and which are available, bool ``[window, 1]`` or
        ``[window, token]``.
    """
    x, channels = torch.as_tensor(values), torch.as_tensor(valid)
    if kind == "channels_attention":
        return x.mean(dim=2).masked_fill(~channels[:, :, None], 0.0), channels
    available = channels.any(dim=1, keepdim=True)
    if kind == "attention":
        total = x.masked_fill(~channels[:, :, None, None], 0.0).sum(dim=1)
        return total / channels.sum(dim=1)[:, None, None].clamp_min(1), available.expand(-1, x.shape[2])
    return pool(x, channels, kind), available
