"""Fusion heads by name, and their construction from plain values.

Every head accepts missing modalities; with none left it returns at most the class prior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from physio_dist.models.fusion.head import Head, build_mlp, masked_softmax

# Of a token in cross-attention, whose products are by far the most expensive part of any head.
_TOKEN_WIDTH = 32


class ConcatHead(Head):
    """Concatenation of the reduced modalities and an MLP: the fusion of arXiv 2512.15250. Linear at depth 0."""

    kind = "concat"
    hidden: nn.ModuleList
    norms: nn.ModuleList
    out: nn.Linear

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        build_mlp(self, sum(self.sizes.values()), self.classes, self.depth, self.width)

    def classify(self, x: Tensor, keep: Sequence[Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """See :meth:`Head.classify`."""
        return self.forward_mlp(self, torch.cat(self.pooled(x, mask), dim=-1) if len(self.attend) else x, keep)


class GatedHead(Head):
    """Gated fusion: modalities are projected to a common width and weighted by a gate that takes all of them.

    Weights are a softmax over the available modalities, equal at the start.
    """

    kind = "gated"
    hidden: nn.ModuleList
    norms: nn.ModuleList
    out: nn.Linear

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
    """Cross-attention fusion: tokens of each modality attend once to those of the others.

    Tokens are projected to a common width; the result of attention to the other modalities' tokens (one head, scaled
    products) is added to each. The mean over a modality's tokens, then over the available modalities, is classified.
    With one modality alone it is the mean of its tokens.
    """

    kind = "cross_attention"
    reads_tokens = True
    hidden: nn.ModuleList
    norms: nn.ModuleList
    out: nn.Linear

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        width = min(self.width, _TOKEN_WIDTH)
        self.project = nn.ModuleList(nn.Linear(size, width) for size in self.sizes.values())
        self.query, self.key = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.value = nn.Linear(width, width)
        build_mlp(self, width, self.classes, self.depth, self.width)
        owner = torch.arange(len(self.tokens)).repeat_interleave(torch.tensor(list(self.tokens.values())))
        # bool ``[token, token]``: pairs of different modalities.
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
    """MLP of one modality."""

    hidden: nn.ModuleList
    norms: nn.ModuleList
    out: nn.Linear

    def __init__(self, inputs: int, classes: int, depth: int, width: int) -> None:
        super().__init__()
        build_mlp(self, inputs, classes, depth, width)


class LateHead(Head):
    """Late fusion: a head per modality, trained independently; the mean probability of the available ones."""

    kind = "late"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.each = nn.ModuleList(_Part(size, self.classes, self.depth, self.width) for size in self.sizes.values())
        self.layers = self.depth * len(self.sizes)

    def branch_logits(self, x: Tensor, keep: Sequence[Tensor] | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Logits of each modality; see :meth:`Head.branch_logits`."""
        branches = []
        for i, (mlp, vector) in enumerate(zip(self.each, self.pooled(x, mask), strict=True)):
            branch_keep = None if keep is None else keep[i * self.depth : (i + 1) * self.depth]
            branches.append(self.forward_mlp(mlp, vector, branch_keep))  # type: ignore[arg-type]
        logits = torch.stack(branches, dim=-2)
        return logits, logits.new_ones(logits.shape[:-1]).bool() if mask is None else self.present(mask)

    def classify(self, x: Tensor, keep: Sequence[Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
        """The logarithm of the mean probability; see :meth:`Head.classify`."""
        logits, available = self.branch_logits(x, keep, mask)
        # If none is available, all branches count, each with its output for an empty input.
        counts = (available | ~available.any(dim=-1, keepdim=True)).unsqueeze(-1)
        return logits.log_softmax(-1).masked_fill(~counts, -torch.inf).logsumexp(dim=-2) - counts.sum(dim=-2).log()


HEADS: dict[str, type[Head]] = {head.kind: head for head in (ConcatHead, GatedHead, CrossAttentionHead, LateHead)}


def build_head(values: Mapping[str, Any]) -> Head:
    """Build a head from :meth:`Head.to_dict`, with new weights, for ``load_state_dict``.

    Raises:
        KeyError: the kind is unknown, or a value is missing.
    """
    names = ("features", "classes", "depth", "width", "dropout", "components", "tokens")
    return HEADS[values["head"]](*(values[name] for name in names))


def input_kind(config: Mapping[str, Any]) -> str:
    """The kind of input that `make_tokens` has to make for a head of this configuration.

    For a head that reads tokens these are channels if the pooling keeps channels apart, else patches.
    """
    pooling = str(config["pooling"])
    if HEADS[config.get("head", "concat")].reads_tokens:
        return "channels_attention" if pooling.startswith("channels_") else "attention"
    return pooling
