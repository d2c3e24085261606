"""From frozen features to classes: pooling, and the head over concatenated modalities; others: ``fusion_heads.py``.

Concatenating the embeddings of frozen encoders and training one head on them is the fusion of arXiv 2512.15250
("Leveraging Foundational Models and Simple Fusion for Multi-modal Physiological Signal Analysis"). The paper does not
say how its embeddings are pooled or what its head looks like; that is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.linalg import eigh
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


def make_tokens(
    values: Tensor | npt.NDArray[Any], valid: Tensor | npt.NDArray[Any], kind: str
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What a head is given of a modality: one vector of each window, or several that it weighs itself.

    ``attention``: a token for each patch, channels averaged over the valid ones; ``channels_attention``: a token for
    each channel, patches averaged. Other kinds: see :func:`pool`.

    Args:
        values: float ``[window, channel, patch, d]``.
        valid: bool ``[window, channel]``.
        kind: one of ``search_options.POOLINGS`` or ``search_options.TOKENS``.

    Returns:
        float ``[window, f]`` or ``[window, token, d]``; and bool ``[window, 1]`` or ``[window, token]``: what is there.
    """
    x, channels = torch.as_tensor(values), torch.as_tensor(valid)
    if kind == "channels_attention":
        return x.mean(dim=2).masked_fill(~channels[:, :, None], 0.0), channels
    there = channels.any(dim=1, keepdim=True)
    if kind == "attention":
        kept = x.masked_fill(~channels[:, :, None, None], 0.0).sum(dim=1)
        return kept / channels.sum(dim=1)[:, None, None].clamp_min(1), there.expand(-1, x.shape[2])
    return pool(x, channels, kind), there


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
        strength, axes = _leading(z.T @ z, k)
        strength, axes = strength / n, axes.float()
    else:
        # Fewer rows than features: the same axes from the rows' products (Turk and Pentland 1991).
        strength, along = _leading(z @ z.T, min(k, n))
        strength = strength / n
        axes = z.T @ along.float() / (n * strength.clamp_min(1e-9)).sqrt().float()
        axes = torch.where(strength.float() > 1e-6 * strength.max().float(), axes, 0.0)
    strength, axes = strength.flip(0)[:k].clamp_min(0.0), axes.flip(1)[:, :k]
    if axes.shape[1] < k:
        axes, strength = F.pad(axes, (0, k - axes.shape[1])), F.pad(strength, (0, k - len(strength)))
    # An axis has no direction of its own: its largest entry is made positive.
    sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    parts = (mean, scale, axes * torch.where(sign == 0, 1.0, sign), strength)
    return Reduction(*(part.float().contiguous().numpy() for part in parts))


def _leading(products: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest eigenvalues, ascending, and their vectors; float64. A third of the time of all of them."""
    size = len(products)
    values, vectors = eigh(products.double().numpy(), subset_by_index=[size - k, size - 1], overwrite_a=True)
    return torch.from_numpy(values), torch.from_numpy(vectors)


class Layers(Protocol):
    """Hidden layers, the norm after each, and the last one."""

    hidden: nn.ModuleList
    norms: nn.ModuleList
    out: nn.Linear


def build_mlp(module: Layers, inputs: int, classes: int, depth: int, width: int) -> None:
    """Give a module the layers of a classifier: ``depth`` times linear, layer norm, GELU, dropout; then linear."""
    sizes = [inputs, *[width] * depth]
    module.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
    module.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
    module.out = nn.Linear(sizes[-1], classes)
    if depth == 0:
        # A linear head begins without an opinion: the little that few people teach it is not mixed with noise.
        nn.init.zeros_(module.out.weight)
        nn.init.zeros_(module.out.bias)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension of what ``mask`` shows; zeros where it shows nothing."""
    # Not minus infinity: a row that shows nothing would have no gradient but NaN.
    return scores.masked_fill(~mask, -1e9).softmax(dim=-1) * mask


class Head(nn.Module):
    """What all heads have in common: each modality reduced to its principal components, and a missing one to zeros.

    Pooled features are many (19 channels kept apart make 1,520 of 80) and repeat each other, and their number differs
    between modalities. So each modality is standardised, projected on its first principal axes, and scaled as a whole
    to a mean square of 1: no modality outweighs another by its units or by how many features it has. All of it comes
    from the rows that the head is trained on (:func:`reduction`), and is part of its state.

    Where a modality comes as several tokens, one vector is made of them by attention: weights are the softmax of a
    learned direction's products with the tokens, so that it begins as their mean.

    Args:
        features: name of each modality -> its number of features, in the order of concatenation.
        classes: number of classes.
        depth: hidden layers (linear, layer norm, GELU, dropout); with 0 there is none.
        width: of the hidden layers.
        dropout: probability after each hidden layer.
        components: principal components of each modality, at most.
        tokens: name of each modality -> its number of tokens; one where none is given.

    Attributes:
        inputs: values of a row, after the reduction.
        owner: of each of them the number of its token, counted over all modalities.
        layers: hidden layers, which is how many times dropout is drawn for.
    """

    kind = ""
    # Whether it looks at tokens itself, rather than at what attention makes of them.
    reads_tokens = False

    def __init__(
        self, features: Mapping[str, int], classes: int, depth: int, width: int, dropout: float, components: int,
        tokens: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.features = dict(features)
        self.tokens = {name: (tokens or {}).get(name, 1) for name in self.features}
        self.sizes = {name: min(components, size) for name, size in self.features.items()}
        self.classes, self.depth, self.width, self.dropout, self.components = classes, depth, width, dropout, components
        self.layers = depth
        each = [size for name, size in self.sizes.items() for _ in range(self.tokens[name])]
        self.inputs = sum(each)
        self.owner = torch.arange(len(each)).repeat_interleave(torch.tensor(each))
        # Of its probabilities: fitted on validation people where that is asked for.
        self.register_buffer("temperature", torch.ones(()))
        for name, size in self.features.items():
            self.register_buffer(f"mean_{name}", torch.zeros(size))
            self.register_buffer(f"basis_{name}", torch.zeros(size, self.sizes[name]))
        self.attend = nn.ParameterDict()
        if not self.reads_tokens:
            many = [name for name in self.features if self.tokens[name] > 1]
            self.attend.update({name: nn.Parameter(torch.zeros(self.sizes[name])) for name in many})

    def about(self) -> dict[str, Any]:
        """What it is built from, as plain values: :func:`physio_dist.models.fusion.heads.build` is the way back."""
        return {
            "head": self.kind, "features": self.features, "tokens": self.tokens, "classes": self.classes,
            "depth": self.depth, "width": self.width, "dropout": self.dropout, "components": self.components,
        }  # fmt: skip

    def reduce_by(self, reductions: Mapping[str, Reduction]) -> None:
        """Take each modality's statistics and its first axes."""
        for name in self.features:
            basis, given = self.get_buffer(f"basis_{name}"), reductions[name]
            k = basis.shape[1]
            spread = np.sqrt(max(float(given.strength[:k].mean()), 1e-12))
            basis.copy_(torch.from_numpy(given.scale[:, None] * given.axes[:, :k] / spread))
            self.get_buffer(f"mean_{name}").copy_(torch.from_numpy(given.mean))

    def concatenate(self, inputs: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """The reduced modalities side by side, ``[row, inputs]``, zeros where something is missing.

        Args:
            inputs: of each modality ``[row, features]`` or ``[row, token, features]``.
            mask: of :meth:`shown`; None: everything is there.
        """
        parts = [
            ((inputs[name] - self.get_buffer(f"mean_{name}")) @ self.get_buffer(f"basis_{name}")).flatten(1)
            for name in self.features
        ]
        x = torch.cat(parts, dim=-1)
        return x if mask is None else self.hide(x, mask)

    def shown(self, there: Mapping[str, Tensor], rows: int) -> Tensor:
        """bool ``[row, token]``, the tokens of all modalities side by side.

        Args:
            there: of a modality bool ``[row, token]`` or ``[row, 1]``; a modality that is not named is there.
            rows: how many.
        """
        whole = torch.ones(rows, 1, dtype=torch.bool)
        return torch.cat([there.get(name, whole).expand(rows, many) for name, many in self.tokens.items()], dim=1)

    def hide(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` with zeros for every token that ``mask``, ``[..., token]``, does not show."""
        return torch.where(mask[..., self.owner], x, 0.0)

    def present(self, mask: Tensor) -> Tensor:
        """bool ``[..., modality]``: which show any token."""
        parts = mask.split_with_sizes(list(self.tokens.values()), dim=-1)
        return torch.stack([part.any(dim=-1) for part in parts], dim=-1)

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        """Each modality's tokens ``[row, token, size]`` out of :meth:`concatenate`."""
        split = x.split_with_sizes([self.tokens[name] * self.sizes[name] for name in self.features], dim=-1)
        return {
            name: part.reshape(*part.shape[:-1], self.tokens[name], self.sizes[name])
            for name, part in zip(self.features, split, strict=True)
        }

    def pooled(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        """One vector ``[row, size]`` for each modality."""
        found = []
        masks = None if mask is None else mask.split_with_sizes(list(self.tokens.values()), dim=-1)
        for number, (name, part) in enumerate(self.parts(x).items()):
            if name in self.attend:
                scores = part @ self.attend[name] / self.sizes[name] ** 0.5
                weight = scores.softmax(-1) if masks is None else masked_softmax(scores, masks[number])
                found.append((weight.unsqueeze(-1) * part).sum(dim=-2))
            else:
                found.append(part.flatten(-2))
        return found

    def forward_mlp(self, layers: Layers, x: Tensor, keep: Sequence[Tensor] | None) -> Tensor:
        """``x`` through the layers of :func:`grow`; ``keep`` as in :meth:`classify`."""
        for i, (linear, norm) in enumerate(zip(layers.hidden, layers.norms, strict=True)):
            x = F.gelu(norm(linear(x)))
            x = F.dropout(x, self.dropout, self.training) if keep is None else x * keep[i]
        logits: Tensor = layers.out(x)
        return logits

    def classify(self, x: Tensor, keep: Sequence[Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits ``[row, class]`` of what :meth:`concatenate` returns.

        Args:
            x: ``[row, inputs]``, zeros where ``mask`` shows nothing.
            keep: for each hidden layer ``[row, width]``, what its output is multiplied by in place of dropout's own
                draw: 0, or 1 / (1 - dropout).
            mask: bool ``[row, token]``; None: everything is there.
        """
        raise NotImplementedError

    def branch_logits(self, x: Tensor, keep: Sequence[Tensor] | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What is trained: logits ``[row, opinion, class]``, and bool ``[row, opinion]``: which rest on anything."""
        return self.classify(x, keep, mask).unsqueeze(-2), mask.any(dim=-1, keepdim=True)

    def forward(self, inputs: Mapping[str, Tensor], there: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits ``[row, class]`` of what :func:`tokens` returns for each modality, at the head's temperature."""
        mask = None if there is None else self.shown(there, len(next(iter(inputs.values()))))
        return self.classify(self.concatenate(inputs, mask), None, mask) / self.get_buffer("temperature")


class ConcatHead(Head):
    """Concatenate the reduced modalities, classify: the fusion of arXiv 2512.15250. With no hidden layer it is
    linear."""

    kind = "concat"
    hidden: nn.ModuleList
    norms: nn.ModuleList
    out: nn.Linear

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        build_mlp(self, sum(self.sizes.values()), self.classes, self.depth, self.width)

    def classify(self, x: Tensor, keep: Sequence[Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """See :meth:`Head.classify`."""
        return self.forward_mlp(self, torch.cat(self.pooled(x, mask), dim=-1) if len(self.attend) else x, keep)
