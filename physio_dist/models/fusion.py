"""From frozen features to classes: pooling, and the head over concatenated modalities.

Concatenating the embeddings of frozen encoders and training one head on them is the fusion of arXiv 2512.15250
("Leveraging Foundational Models and Simple Fusion for Multi-modal Physiological Signal Analysis"). The paper does not
say how its embeddings are pooled or what its head looks like; that is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

COMPONENTS = 16


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


class ConcatHead(nn.Module):
    """Standardise each modality, concatenate, classify.

    The statistics are buffers and part of the head's state: each feature has mean 0 and standard deviation 1 over the
    rows that the head is trained on, so that the scales of modalities do not matter.

    Channels kept apart make thousands of features, most of which repeat each other. Of a modality with several channels
    the head keeps the first principal components of a channel's features: the same ones for all channels, computed
    from the rows it is trained on, scaled together to a mean square of 1.

    Args:
        features: name of each modality -> its number of features, in the order of concatenation.
        channels: name of each modality -> how many channels lie side by side in its features; absent: 1.
        components: principal components of a channel's features that are kept where there are several channels.
        classes: number of classes.
        depth: hidden layers (linear, layer norm, GELU, dropout); with 0 the head is linear.
        width: of the hidden layers.
        dropout: probability after each hidden layer.
    """

    def __init__(
        self, features: Mapping[str, int], classes: int, depth: int, width: int, dropout: float,
        channels: Mapping[str, int] | None = None, components: int = COMPONENTS,
    ) -> None:  # fmt: skip
        super().__init__()
        self.features = dict(features)
        self.channels = {name: (channels or {}).get(name, 1) for name in self.features}
        self.dropout = dropout
        inputs = 0
        for name, size in self.features.items():
            self.register_buffer(f"mean_{name}", torch.zeros(size))
            self.register_buffer(f"scale_{name}", torch.ones(size))
            each = size // self.channels[name]
            if self.channels[name] > 1 and each > components:
                self.register_buffer(f"basis_{name}", torch.eye(each, components))
                size = self.channels[name] * components
            inputs += size
        self.inputs = inputs
        sizes = [inputs, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.out = nn.Linear(sizes[-1], classes)

    def standardise_by(self, rows: Mapping[str, Tensor]) -> None:
        """Take the statistics of these rows, ``[row, features]`` for each modality.

        A feature that is constant in them is only centred.
        """
        for name in self.features:
            # In float64: float32 would lose the spread of features that are far from zero.
            std, mean = torch.std_mean(rows[name].double(), dim=0, correction=0)
            constant = std <= 1e-6 * mean.abs()
            self.get_buffer(f"mean_{name}").copy_(mean)
            self.get_buffer(f"scale_{name}").copy_(torch.where(constant, 1.0, 1.0 / std))
            if f"basis_{name}" in dict(self.named_buffers()):
                self._take_basis(name, rows[name])

    def _take_basis(self, name: str, rows: Tensor) -> None:
        basis = self.get_buffer(f"basis_{name}")
        z = self._standard(name, rows).reshape(-1, basis.shape[0])
        strength, axes = torch.linalg.eigh((z.T @ z).double() / len(z))
        strength, axes = strength.flip(0)[: basis.shape[1]], axes.flip(1)[:, : basis.shape[1]]
        # An axis has no direction of its own: its largest entry is made positive.
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        basis.copy_(axes / strength.mean().clamp_min(1e-12).sqrt())

    def _standard(self, name: str, x: Tensor) -> Tensor:
        return (x - self.get_buffer(f"mean_{name}")) * self.get_buffer(f"scale_{name}")

    def _input(self, name: str, x: Tensor) -> Tensor:
        x = self._standard(name, x)
        basis = dict(self.named_buffers()).get(f"basis_{name}")
        if basis is None:
            return x
        each = x.reshape(len(x), self.channels[name], basis.shape[0])
        return (each @ basis).flatten(1)

    def concatenate(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The standardised modalities side by side, ``[row, f]``, of ``[row, features]`` for each."""
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
