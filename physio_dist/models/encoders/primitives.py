"""Matrix products, dropout and attention, each in the form that is fast on the device at hand.

On CUDA these are torch's own. On a CPU some of torch's choices cost more than a third of a training step of the base
encoder: fp32 products go to a library that is slow on some processors, dropout draws a full random number an element,
and attention is made for long sequences, not for a dozen leads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# CUDA launches take at most 65,535 blocks along the axis on which the fused attention kernels lay
# their batch.
_MAX_ROWS = 65_535
_LEVELS = 1 << 16
# fp32 numbers in the widest vector register of a CPU.
_LANES = 16


def at_least_fp32(x: Tensor) -> Tensor:
    """``x``, widened to fp32 if it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def like(x: Tensor, weight: Tensor) -> Tensor:
    """``x`` in the dtype of ``weight``, for an operation on both; as it is under autocast, which converts both."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x if autocast else x.to(weight.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``x`` ``[batch, channel, patch, width]`` times the transposed ``weight``, plus ``bias``.

    In the weight's dtype, which may be narrower than that of ``x`` where DeepSpeed has cast the module, or autocast's.
    In fp32 on a CPU as a convolution of kernel 1, which computes the same: torch has oneDNN do convolutions and MKL do
    matrix products, and on processors that are not Intel's MKL's fp32 takes twice as long.
    """
    x = like(x, weight)
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of ``x`` with probability ``p``; ``x`` itself where ``p`` is 0 or not ``training``.

    On a CPU every element has 16 bits of a generator that is seeded from torch's default one, which rounds ``p`` to a
    multiple of 2^-16; what is kept is scaled by the rounded probability, so the expectation is exact.
    """
    if p == 0.0 or not training:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p, True)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    seed = int(torch.randint(1 << 62, (), device="cpu"))
    words = np.random.SFC64(seed).random_raw(-(-x.numel() // 4))
    bits = torch.from_numpy(words.view(np.int16))[: x.numel()].view(x.shape)
    result: Tensor = _Keep.apply(x, bits.ge_(dropped - _LEVELS // 2), _LEVELS / (_LEVELS - dropped))  # type: ignore[no-untyped-call]
    return result


class _Keep(torch.autograd.Function):
    """Keeps and scales elements of a tensor where ``kept`` (int16) is 1; the others become zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return _keep(x, kept, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _keep(grad, ctx.saved_tensors[0], ctx.scale), None, None


def _keep(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    if x.element_size() == kept.element_size():
        # A product of the bit patterns: no conversion of the mask.
        return (x.view(kept.dtype) * kept).view(x.dtype).mul_(scale)
    return (x * kept.to(x.dtype)).mul_(scale)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention of ``[rows, heads, length, width]``; dropout on the attention weights.

    ``bias`` ``[rows, 1, 1, length]`` is added to the scores; a row of -inf alone is the caller's fault.
    """
    if q.device.type != "cpu":
        return _fused(q, k, v, None if bias is None else bias.to(q.dtype), dropout)
    scores = at_least_fp32(q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    # Whole vector registers: several times as fast as a softmax over a length like 10 or 12.
    weights = F.pad(scores, (0, -scores.shape[-1] % _LANES), value=-math.inf).softmax(-1)[..., : scores.shape[-1]]
    return drop(weights.to(v.dtype), dropout, True) @ v


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    parts = [
        F.scaled_dot_product_attention(
            q[start : start + _MAX_ROWS],
            k[start : start + _MAX_ROWS],
            v[start : start + _MAX_ROWS],
            attn_mask=None if bias is None else bias[start : start + _MAX_ROWS],
            dropout_p=dropout,
        )
        for start in range(0, len(q), _MAX_ROWS)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
