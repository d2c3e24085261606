"""Options under ``search``: the space of configurations that a sweep samples from."""

from __future__ import annotations

import math
from dataclasses import dataclass

from physio_dist.config.options import OneOf, Range, at_least, inside, option
from physio_dist.errors import UserError

# One vector of each window and modality, without learned parameters.
POOLINGS = ("mean", "mean_std", "channels_mean", "channels_mean_std")
# Several vectors, which a head weighs itself: patches, or channels.
TOKENS = ("attention", "channels_attention")
HEADS = ("concat", "gated", "cross_attention", "late")


def _interval(name: str, value: list[float]) -> None:
    if len(value) != 2 or not 0 < value[0] <= value[1] < math.inf:
        raise UserError(f"{name}={value}: it must be [low, high] with 0 < low <= high")


def _not_empty(name: str, value: list[object]) -> None:
    if not value:
        raise UserError(f"{name} is empty: there is nothing to choose from")


@dataclass
class SearchOptions:
    """Lists of choices, or intervals ``[low, high]`` sampled log-uniformly."""

    pooling: list[str] = option(
        list(POOLINGS),
        "Mean, or mean and standard deviation, over patches, with channels averaged or kept apart (`channels_`); "
        "`attention` is learned, over patches or over channels.",
        _not_empty, OneOf(POOLINGS + TOKENS),
    )  # fmt: skip
    head: list[str] = option(["concat"], "Kinds of fusion head; `concat` is the reference.", _not_empty, OneOf(HEADS))
    modality_dropout: list[float] = option(
        [0.0], "Probability that a training window shows one modality only.", _not_empty, inside(0.0, 1.0)
    )
    class_weight: list[str] = option(
        ["none"], "`balanced`: every class has the same weight in the loss.", _not_empty, OneOf(("none", "balanced"))
    )
    components: list[int] = option(
        [16, 64], "Principal components that are kept of each modality's pooled features.", _not_empty, at_least(1)
    )
    depth: list[int] = option(
        [0, 1, 2], "Hidden layers; 0 is a linear head.", _not_empty, Range(0, math.inf, "it must not be negative")
    )
    width: list[int] = option([32, 64, 128], "Units of a hidden layer.", _not_empty, at_least(1))
    dropout: list[float] = option([0.0, 0.2, 0.5], "Dropout probability.", _not_empty, inside(0.0, 0.9))
    label_smoothing: list[float] = option([0.0, 0.1], "Label smoothing.", _not_empty, inside(0.0, 0.9))
    lr: list[float] = option([3e-4, 3e-2], "Learning rate, an interval.", _interval)
    weight_decay: list[float] = option([1e-4, 1.0], "Weight decay, an interval.", _interval)
