"""From frozen features to classes: pooling, and the head over concatenated modalities.

Concatenating the embeddings of frozen encoders and training one head on them is the fusion of arXiv 2512.15250
("Leveraging Foundational Models and Simple Fusion for Multi-modal Physiological Signal Analysis"). The paper does not
say how its embeddings are pooled or what its head looks like; that is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def pool(values: Tensor | npt.NDArray[Any], valid: Tensor | npt.NDArray[Any], kind: str) -> Tensor:
    """Features of each window from those of its patches.

    Over patches ``mean`` takes the mean, ``mean_std`` the mean and the standard deviation. Channels are averaged over
    the valid ones, or with the prefix ``channels_`` kept apart, side by side, invalid ones as zeros. A window without a
    valid channel gets zeros.

    Args:
        values: float ``[window, channel, patch, d]``.
        valid: bool ``[window, channel]``.
        kind: one of ``config.POOLINGS``.

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
    # Not a product: whatever an encoder makes of an invalid channel, be it infinite, has no part in this.
    pooled = pooled.masked_fill(~mask, 0.0)
    if kind.startswith("channels_"):
        return pooled.flatten(1)
    return pooled.sum(dim=1) / mask.sum(dim=1).clamp_min(1)


@dataclass(frozen=True)
class Reduction:
    """What a modality's features are reduced by, computed from the rows that a head is trained on and no others.

    Plain arrays, so that processes can share them.

    Attributes:
        mean, scale: float32 ``[f]``; a feature minus its mean, times its scale, has standard deviation 1 there.
        axes: float32 ``[f, k]``, principal axes of the features so standardised, the strongest first.
        strength: float32 ``[k]``, variance along each.
    """

    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    axes: npt.NDArray[np.float32]
    strength: npt.NDArray[np.float32]


def reduction(rows: npt.NDArray[np.float32], most: int) -> Reduction:
    """The statistics and the first ``most`` principal axes of ``rows``, ``[row, f]``.

    A feature that is constant in them is only centred.
    """
    # In float64: float32 would lose the spread of features that are far from zero.
    std, mean = torch.std_mean(torch.from_numpy(rows).double(), dim=0, correction=0)
    scale = torch.where(std <= 1e-6 * mean.abs(), 1.0, 1.0 / std).nan_to_num(1.0, 1.0, 1.0)
    z = ((torch.from_numpy(rows) - mean) * scale).float()
    n, f = z.shape
    k = min(most, f)
    if n >= f:
        strength, axes = torch.linalg.eigh((z.T @ z).double() / n)
        axes = axes.float()
    else:
        # Fewer rows than features: the same axes from the rows' products (Turk and Pentland 1991).
        strength, along = torch.linalg.eigh((z @ z.T).double() / n)
        axes = z.T @ along.float() / (n * strength.clamp_min(1e-9)).sqrt().float()
        axes = torch.where(strength.float() > 1e-6 * strength.max().float(), axes, 0.0)
    strength, axes = strength.flip(0)[:k].clamp_min(0.0), axes.flip(1)[:, :k]
    if axes.shape[1] < k:
        axes, strength = F.pad(axes, (0, k - axes.shape[1])), F.pad(strength, (0, k - len(strength)))
    # An axis has no direction of its own: its largest entry is made positive.
    sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    parts = (mean, scale, axes * torch.where(sign == 0, 1.0, sign), strength)
    return Reduction(*(part.float().contiguous().numpy() for part in parts))


class ConcatHead(nn.Module):
    """Reduce each modality to its principal components, concatenate, classify.

    Pooled features are many (19 channels kept apart make 1,520 of 80) and repeat each other, and their number differs
    between modalities. So each modality is standardised, projected on its first principal axes, and scaled as a whole
    to a mean square of 1: no modality outweighs another by its units or by how many features it has. All of it comes
    from the rows that the head is trained on (:func:`reduction`), and is part of its state.

    Args:
        features: name of each modality -> its number of features, in the order of concatenation.
        classes: number of classes.
        depth: hidden layers (linear, layer norm, GELU, dropout); with 0 the head is linear.
        width: of the hidden layers.
        dropout: probability after each hidden layer.
        components: principal components of each modality, at most.
    """

    def __init__(
        self, features: Mapping[str, int], classes: int, depth: int, width: int, dropout: float, components: int
    ) -> None:
        super().__init__()
        self.features = dict(features)
        self.dropout = dropout
        self.inputs = 0
        for name, size in self.features.items():
            self.register_buffer(f"mean_{name}", torch.zeros(size))
            self.register_buffer(f"basis_{name}", torch.zeros(size, min(components, size)))
            self.inputs += min(components, size)
        sizes = [self.inputs, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.out = nn.Linear(sizes[-1], classes)
        if depth == 0:
            # A linear head begins without an opinion: the little that few people teach it is not mixed with noise.
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def reduce_by(self, reductions: Mapping[str, Reduction]) -> None:
        """Take each modality's statistics and its first axes."""
        for name in self.features:
            basis, given = self.get_buffer(f"basis_{name}"), reductions[name]
            k = basis.shape[1]
            spread = np.sqrt(max(float(given.strength[:k].mean()), 1e-12))
            basis.copy_(torch.from_numpy(given.scale[:, None] * given.axes[:, :k] / spread))
            self.get_buffer(f"mean_{name}").copy_(torch.from_numpy(given.mean))

    def _input(self, name: str, x: Tensor) -> Tensor:
        return (x - self.get_buffer(f"mean_{name}")) @ self.get_buffer(f"basis_{name}")

    def concatenate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The reduced modalities side by side, ``[row, f]``, of ``[row, features]`` for each."""
        return torch.cat([self._input(name, inputs[name]) for name in self.features], dim=-1)

    def classify(self, x: Tensor, keep: Sequence[Tensor] | None = None) -> Tensor:
        """Logits ``[row, class]`` of what :meth:`concatenate` returns.

        Args:
            x: ``[row, f]``.
            keep: for each hidden layer ``[row, width]``, what its output is multiplied by in place of dropout's own
                draw: 0, or 1 / (1 - dropout).
        """
        for i, (linear, norm) in enumerate(zip(self.hidden, self.norms, strict=True)):
            x = F.gelu(norm(linear(x)))
            x = F.dropout(x, self.dropout, self.training) if keep is None else x * keep[i]
        logits: Tensor = self.out(x)
        return logits

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Logits ``[row, class]`` of ``[row, features]`` for each modality."""
        return self.classify(self.concatenate(inputs))
