"""Base class of the heads that fuse the features of frozen encoders.

Concatenating the embeddings of frozen encoders and training one head on them is the fusion of arXiv 2512.15250
("Leveraging Foundational Models and Simple Fusion for Multi-modal Physiological Signal Analysis"). The paper does not
say how its embeddings are pooled or what its head looks like; those choices are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from physio_dist.models.fusion.reduction import Reduction


class Layers(Protocol):
    """A module with the layers of an MLP: hidden layers, the norm after each, and the output layer."""

    hidden: nn.ModuleList
    norms: nn.ModuleList
    out: nn.Linear


def build_mlp(module: Layers, inputs: int, classes: int, depth: int, width: int) -> None:
    """Add an MLP classifier's layers to a module: ``depth`` times linear, layer norm, GELU, dropout; then linear."""
    sizes = [inputs, *[width] * depth]
    module.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
    module.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
    module.out = nn.Linear(sizes[-1], classes)
    if depth == 0:
        # Zero logits at the start: with few people, the noise of random weights would remain in a linear head.
        nn.init.zeros_(module.out.weight)
        nn.init.zeros_(module.out.bias)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the last dimension, of values where ``mask`` is True; zeros elsewhere."""
    # Not minus infinity: the gradient of a row without any value would be NaN.
    return scores.masked_fill(~mask, -1e9).softmax(dim=-1) * mask


class Head(nn.Module):
    """Base class of heads: reduces each modality to its principal components, and a missing one to zeros.

    Pooled features are many (19 channels kept apart make 1,520 of 80) and repeat each other, and their number differs
    between modalities. So each modality is standardised, projected on its first principal axes, and scaled as a whole
    to a mean square of 1: no modality outweighs another by its units or by how many features it has. All of it comes
    from the rows that the head is trained on (`fit_reduction`), and is part of its state.

    Where a modality comes as several tokens, one vector is made of them by attention: weights are the softmax of a
    learned direction's products with the tokens, which are equal at the start.

    Args:
        features: name of each modality -> its number of features, in the order of concatenation.
        classes: number of classes.
        depth: hidden layers (linear, layer norm, GELU, dropout); with 0 there is none.
        width: of the hidden layers.
        dropout: probability after each hidden layer.
        components: principal components of each modality, at most.
        tokens: name of each modality -> its number of tokens; 1 by default.

    Attributes:
        inputs: number of values of a row, after the reduction.
        owner: int64 ``[inputs]``, number of the token that a value belongs to, counted over all modalities.
        layers: number of hidden layers, each of which draws dropout.
    """

    kind = ""
    # Whether it takes all tokens of a modality, rather than their pooled vector.
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
        # Of its probabilities; fitted on validation people if calibration is on.
        self.register_buffer("temperature", torch.ones(()))
        for name, size in self.features.items():
            self.register_buffer(f"mean_{name}", torch.zeros(size))
            self.register_buffer(f"basis_{name}", torch.zeros(size, self.sizes[name]))
        self.attend = nn.ParameterDict()
        if not self.reads_tokens:
            many = [name for name in self.features if self.tokens[name] > 1]
            self.attend.update({name: nn.Parameter(torch.zeros(self.sizes[name])) for name in many})

    def to_dict(self) -> dict[str, Any]:
        """The arguments it was built from, as plain values for `physio_dist.models.fusion.heads.build_head`."""
        return {
            "head": self.kind, "features": self.features, "tokens": self.tokens, "classes": self.classes,
            "depth": self.depth, "width": self.width, "dropout": self.dropout, "components": self.components,
        }  # fmt: skip

    def reduce_by(self, reductions: Mapping[str, Reduction]) -> None:
        """Set each modality's statistics and its first axes."""
        for name in self.features:
            basis, reduction = self.get_buffer(f"basis_{name}"), reductions[name]
            k = basis.shape[1]
            spread = np.sqrt(max(float(reduction.strength[:k].mean()), 1e-12))
            basis.copy_(torch.from_numpy(reduction.scale[:, None] * reduction.axes[:, :k] / spread))
            self.get_buffer(f"mean_{name}").copy_(torch.from_numpy(reduction.mean))

    def concatenate(self, inputs: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """The reduced modalities side by side, ``[row, inputs]``, with zeros for missing tokens.

        Args:
            inputs: of each modality ``[row, features]`` or ``[row, token, features]``.
            mask: of :meth:`token_mask`; None if everything is available.
        """
        parts = [
            ((inputs[name] - self.get_buffer(f"mean_{name}")) @ self.get_buffer(f"basis_{name}")).flatten(1)
            for name in self.features
        ]
        x = torch.cat(parts, dim=-1)
        return x if mask is None else self.hide(x, mask)

    def token_mask(self, available: Mapping[str, Tensor], rows: int) -> Tensor:
        """bool ``[row, token]``, the tokens of all modalities side by side.

        Args:
            available: for a modality bool ``[row, token]`` or ``[row, 1]``; modalities without an entry are available.
            rows: number of rows.
        """
        complete = torch.ones(rows, 1, dtype=torch.bool)
        return torch.cat(
            [available.get(name, complete).expand(rows, many) for name, many in self.tokens.items()], dim=1
        )

    def hide(self, x: Tensor, mask: Tensor) -> Tensor:
        """``x`` with zeros for every token that is False in ``mask`` ``[..., token]``."""
        return torch.where(mask[..., self.owner], x, 0.0)

    def present(self, mask: Tensor) -> Tensor:
        """Modalities with any token in ``mask``, bool ``[..., modality]``."""
        parts = mask.split_with_sizes(list(self.tokens.values()), dim=-1)
        return torch.stack([part.any(dim=-1) for part in parts], dim=-1)

    def parts(self, x: Tensor) -> dict[str, Tensor]:
        """Split what :meth:`concatenate` returns into each modality's tokens ``[row, token, size]``."""
        split = x.split_with_sizes([self.tokens[name] * self.sizes[name] for name in self.features], dim=-1)
        return {
            name: part.reshape(*part.shape[:-1], self.tokens[name], self.sizes[name])
            for name, part in zip(self.features, split, strict=True)
        }

    def pooled(self, x: Tensor, mask: Tensor | None) -> list[Tensor]:
        """One vector ``[row, size]`` per modality."""
        vectors = []
        masks = None if mask is None else mask.split_with_sizes(list(self.tokens.values()), dim=-1)
        for number, (name, part) in enumerate(self.parts(x).items()):
            if name in self.attend:
                scores = part @ self.attend[name] / self.sizes[name] ** 0.5
                weight = scores.softmax(-1) if masks is None else masked_softmax(scores, masks[number])
                vectors.append((weight.unsqueeze(-1) * part).sum(dim=-2))
            else:
                vectors.append(part.flatten(-2))
        return vectors

    def forward_mlp(self, layers: Layers, x: Tensor, keep: Sequence[Tensor] | None) -> Tensor:
        """Apply the layers of `build_mlp` to ``x``; ``keep`` as in :meth:`classify`."""
        for i, (linear, norm) in enumerate(zip(layers.hidden, layers.norms, strict=True)):
            x = F.gelu(norm(linear(x)))
            x = F.dropout(x, self.dropout, self.training) if keep is None else x * keep[i]
        logits: Tensor = layers.out(x)
        return logits

    def classify(self, x: Tensor, keep: Sequence[Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits ``[row, class]`` of what :meth:`concatenate` returns.

        Args:
            x: ``[row, inputs]``, zeros where ``mask`` is False.
            keep: for each hidden layer ``[row, width]``, factors of its output that replace dropout's own draw: 0, or
                1 / (1 - dropout).
            mask: bool ``[row, token]``; None if everything is available.
        """
        raise NotImplementedError

    def branch_logits(self, x: Tensor, keep: Sequence[Tensor] | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits to train on: ``[row, branch, class]``, and bool ``[row, branch]``: branches with any input."""
        return self.classify(x, keep, mask).unsqueeze(-2), mask.any(dim=-1, keepdim=True)

    def forward(self, inputs: Mapping[str, Tensor], available: Mapping[str, Tensor] | None = None) -> Tensor:
        """Logits ``[row, class]`` of each modality's `make_tokens`, at the head's temperature."""
        mask = None if available is None else self.token_mask(available, len(next(iter(inputs.values()))))
        return self.classify(self.concatenate(inputs, mask), None, mask) / self.get_buffer("temperature")
