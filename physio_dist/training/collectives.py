"""Collectives that a process without a process group may call too: a world of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def sum_over_ranks(values: torch.Tensor) -> list[float]:
    """Sum a tensor over the ranks, in place, and wait for it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    total: list[float] = values.tolist()
    return total


def max_over_ranks(value: float, device: torch.device) -> float:
    """The largest value over the ranks; ``device`` is the process group's."""
    largest = torch.tensor([value], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return float(largest)


def gather_objects(objects: Sequence[T]) -> list[T]:
    """The objects of all ranks, in the order of the ranks."""
    if not dist.is_initialized():
        return list(objects)
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, list(objects))
    return [item for part in lists for item in part]


def broadcast(value: T) -> T:
    """The first rank's value."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()
