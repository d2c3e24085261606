"""Dropout and attention, each in the form that is fast on the device at hand.

On CUDA these are torch's own. On a CPU two of torch's choices cost a third of a training step of the base
encoder: dropout draws a full random number an element, and the fused attention kernel is made for long
sequences, not for a dozen leads.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# CUDA launches take at most 65,535 blocks along the axis on which the fused attention kernels lay
# their batch.
_MAX_ROWS = 65_535
_LEVELS = 1 << 16


def at_least_fp32(x: Tensor) -> Tensor:
    """``x``, widened to fp32 if it is narrower."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def drop(x: Tensor, p: float, training: bool) -> Tensor:
    """Dropout of ``x`` with probability ``p``; ``x`` itself where ``p`` is 0 or not ``training``.

    On a CPU four elements share one 64-bit draw of torch's default generator, which rounds ``p`` to a
    multiple of 2^-16; what is kept is scaled by the rounded probability, so the expectation is exact.
    """
    if p == 0.0 or not training:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p, True)
    # random_() without bounds draws 63 bits, and every fourth element would never be dropped.
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    kept = (bits >= dropped - _LEVELS // 2).to(x.dtype)
    return x * kept.mul_(_LEVELS / (_LEVELS - dropped))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention of ``[rows, heads, length, width]``; dropout on the attention weights.

    ``bias`` ``[rows, 1, 1, length]`` is added to the scores; a row of -inf alone is the caller's fault.
    """
    if bias is not None:
        bias = bias.to(q.dtype)
    if q.device.type != "cpu":
        return _fused(q, k, v, bias, dropout)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias
    return drop(scores.softmax(-1).to(v.dtype), dropout, True) @ v


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
