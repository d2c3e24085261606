"""Heads beside concatenation, and what makes a head of plain values.

All of them answer for a window in which a modality is missing; where every modality is, they say what they have learnt
of the classes' frequencies at most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from physio_dist.models.fusion.base import ConcatHead, Head, build_mlp, masked_softmax

# Of a token in cross-attention: its products are by far the dearest part of any head.
_TOKEN_WIDTH = 32


class GatedHead(Head):
    """Each modality is projected to a common width; a gate, which sees all of them, weighs them for each window.

    Gates are a softmax over the modalities that are there, so with one alone its weight is 1. It begins with equal
    weights.
    """

    kind = "gated"
    hidden: nn.ModuleList
    norms: nn.ModuleList
    out: nn.Linear

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.project = nn.ModuleList(nn.Linear(size, self.width) for size in self.sizes.values())
        self.gate = nn.Linear(sum(self.sizes.values()), len(self.sizes))
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        build_mlp(self, self.width, self.classes, self.depth, self.width)

    def gates(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Weight of each modality, ``[row, modality]``, of what :meth:`concatenate` returns."""
        scores: Tensor = self.gate(torch.cat(self.pooled(x, mask), dim=-1))
        return scores.softmax(-1) if mask is None else masked_softmax(scores, self.present(mask))

    def classify(self, x: Tensor, keep: Sequence[Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """See :meth:`Head.classify`."""
        each = [project(part) for project, part in zip(self.project, self.pooled(x, mask), strict=True)]
        weight = self.gates(x, mask).unsqueeze(-1)
        return self.forward_mlp(self, (torch.stack(each, dim=-2) * weight).sum(dim=-2), keep)


class CrossAttentionHead(Head):
    """Tokens of each modality look at those of the others, once.

    Tokens are projected to a common width; each adds to itself what it finds at the other modalities' tokens (one
    attention head, scaled products). The mean over a modality's tokens, and over the modalities that are there, is
    classified. With one modality alone there is nothing to look at, and what remains is the mean of its tokens.
    """

    kind = "cross_attention"
    reads_tokens = True
    hidden: nn.ModuleList
    norms: nn.ModuleList
    out: nn.Linear

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        width = min(self.width, _TOKEN_WIDTH)
        self.project = nn.ModuleList(nn.Linear(size, width) for size in self.sizes.values())
        self.query, self.key = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.value = nn.Linear(width, width)
        build_mlp(self, width, self.classes, self.depth, self.width)
        owner = torch.arange(len(self.tokens)).repeat_interleave(torch.tensor(list(self.tokens.values())))
        # Which tokens are of another modality, ``[token, token]``.
        self.foreign = owner[:, None] != owner[None, :]

    def classify(self, x: Tensor, keep: Sequence[Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """See :meth:`Head.classify`."""
        mask = x.new_ones((*x.shape[:-1], len(self.foreign))).bool() if mask is None else mask
        each = [project(part) for project, part in zip(self.project, self.parts(x).values(), strict=True)]
        y = torch.cat(each, dim=-2)
        foreign = self.foreign.to(mask.device)
        scores = self.query(y) @ self.key(y).transpose(-1, -2) / y.shape[-1] ** 0.5
        y = y + masked_softmax(scores, foreign & mask.unsqueeze(-2)) @ self.value(y)
        counted = mask.to(y.dtype).split_with_sizes(list(self.tokens.values()), dim=-1)
        means = [
            (part * shown.unsqueeze(-1)).sum(dim=-2) / shown.sum(dim=-1, keepdim=True).clamp_min(1)
            for part, shown in zip(y.split_with_sizes(list(self.tokens.values()), dim=-2), counted, strict=True)
        ]
        there = self.present(mask).to(y.dtype).sum(dim=-1, keepdim=True).clamp_min(1)
        return self.forward_mlp(self, torch.stack(means).sum(dim=0) / there, keep)


class _Part(nn.Module):
    """The layers of one modality."""

    hidden: nn.ModuleList
    norms: nn.ModuleList
    out: nn.Linear

    def __init__(self, inputs: int, classes: int, depth: int, width: int) -> None:
        super().__init__()
        build_mlp(self, inputs, classes, depth, width)


class LateHead(Head):
    """A head for each modality, trained by itself; the mean of the probabilities of those that are there."""

    kind = "late"

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.each = nn.ModuleList(_Part(size, self.classes, self.depth, self.width) for size in self.sizes.values())
        self.layers = self.depth * len(self.sizes)

    def branch_logits(self, x: Tensor, keep: Sequence[Tensor] | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of each modality; see :meth:`Head.branch_logits`."""
        found = []
        for i, (part, mine) in enumerate(zip(self.each, self.pooled(x, mask), strict=True)):
            kept = None if keep is None else keep[i * self.depth : (i + 1) * self.depth]
            found.append(self.forward_mlp(part, mine, kept))  # type: ignore[arg-type]
        logits = torch.stack(found, dim=-2)
        return logits, logits.new_ones(logits.shape[:-1]).bool() if mask is None else self.present(mask)

    def classify(self, x: Tensor, keep: Sequence[Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """The logarithm of the mean probability; see :meth:`Head.classify`."""
        logits, there = self.branch_logits(x, keep, mask)
        # Where none is there each says what it says of nothing.
        counts = (there | ~there.any(dim=-1, keepdim=True)).unsqueeze(-1)
        return logits.log_softmax(-1).masked_fill(~counts, -torch.inf).logsumexp(dim=-2) - counts.sum(dim=-2).log()


HEADS: dict[str, type[Head]] = {one.kind: one for one in (ConcatHead, GatedHead, CrossAttentionHead, LateHead)}


def build(about: Mapping[str, Any]) -> Head:
    """A head from :meth:`Head.about`, its weights those of a new one; ``load_state_dict`` fills it.

    Raises:
        KeyError: of no known kind, or something is missing.
    """
    names = ("features", "classes", "depth", "width", "dropout", "components", "tokens")
    return HEADS[about["head"]](*(about[name] for name in names))


def input_kind(config: Mapping[str, Any]) -> str:
    """What :func:`physio_dist.models.fusion.tokens` makes of features for a head of this configuration.

    A head that reads tokens takes channels for them where the pooling keeps channels apart, else patches.
    """
    pooling = str(config["pooling"])
    if HEADS[config.get("head", "concat")].reads_tokens:
        return "channels_attention" if pooling.startswith("channels_") else "attention"
    return pooling
