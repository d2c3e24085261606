"""What a sweep may choose from: the options under ``search``, their defaults and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from physio_dist.config.loader import between, one_of
from physio_dist.errors import UserError

# One vector of each window and modality, made without learning anything.
POOLINGS = ("mean", "mean_std", "channels_mean", "channels_mean_std")
# Several, which a head weighs itself: patches, or channels.
TOKENS = ("attention", "channels_attention")
HEADS = ("concat", "gated", "cross_attention", "late")
CLASS_WEIGHTS = ("none", "balanced")


@dataclass
class SearchOptions:
    """What a sweep chooses from; a range is [low, high], drawn evenly on a logarithmic axis."""

    # Over patches (mean or mean and standard deviation), with channels averaged or kept apart; attention is learned,
    # over patches or (channels_) over channels.
    pooling: list[str] = field(default_factory=lambda: ["mean", "mean_std", "channels_mean", "channels_mean_std"])
    # concat is the reference; gated, cross_attention, late.
    head: list[str] = field(default_factory=lambda: ["concat"])
    # Probability that a training window shows one modality only, so that the head learns to do with one.
    modality_dropout: list[float] = field(default_factory=lambda: [0.0])
    # balanced: every class weighs the same in the loss.
    class_weight: list[str] = field(default_factory=lambda: ["none"])
    # Principal components that are kept of each modality's pooled features.
    components: list[int] = field(default_factory=lambda: [16, 64])
    # Hidden layers; 0 is a linear head.
    depth: list[int] = field(default_factory=lambda: [0, 1, 2])
    width: list[int] = field(default_factory=lambda: [32, 64, 128])
    dropout: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.5])
    label_smoothing: list[float] = field(default_factory=lambda: [0.0, 0.1])
    lr: list[float] = field(default_factory=lambda: [3e-4, 3e-2])
    weight_decay: list[float] = field(default_factory=lambda: [1e-4, 1.0])


def check_search(search: SearchOptions) -> None:
    """Refuse values no sweep could choose from.

    Raises:
        UserError: an option is empty, or a value of it is unknown or out of range.
    """
    for name in (
        "pooling", "head", "modality_dropout", "class_weight", "components", "depth", "width", "dropout",
        "label_smoothing",
    ):  # fmt: skip
        if not getattr(search, name):
            raise UserError(f"search.{name} is empty: there is nothing to choose from")
    for name, known in (("pooling", POOLINGS + TOKENS), ("head", HEADS), ("class_weight", CLASS_WEIGHTS)):
        for value in getattr(search, name):
            one_of(f"search.{name}", value, known)
    if min(search.depth) < 0 or min(search.width) < 1 or min(search.components) < 1:
        raise UserError("search.depth must not be negative, search.width and search.components must be at least 1")
    for name, most in (("dropout", 0.9), ("label_smoothing", 0.9), ("modality_dropout", 1.0)):
        for value in getattr(search, name):
            between(f"search.{name}", value, 0.0, most)
    for name in ("lr", "weight_decay"):
        span = getattr(search, name)
        if len(span) != 2 or not 0 < span[0] <= span[1] < math.inf:
            raise UserError(f"search.{name}={span}: it must be [low, high] with 0 < low <= high")
