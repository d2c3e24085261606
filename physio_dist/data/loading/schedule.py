"""Schedule of the shards that a rank, or the ranks of a node, need, computed from the order without walking it."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from physio_dist.data.loading.order import Mixture, ShardUses


@dataclass(frozen=True, order=True)
class ShardUse:
    """A shard of which so many samples are needed between two steps of the run (from 0, both included)."""

    first: int
    last: int
    set: int
    shard: int
    samples: float


class Schedule:
    """The uses of shards by a range of slots of the global batch.

    Args:
        order: of the run.
        low, high: the slots, half-open.
    """

    def __init__(self, order: Mixture, low: int, high: int) -> None:
        self._parts = [(i, order.sets[i], first, last) for i, first, last in order.slots(low, high)]
        self._cached: dict[tuple[int, int], ShardUses] = {}

    def coming(self, step: int) -> Iterator[ShardUse]:
        """Iterate without end over the uses that do not end before ``step``, by their first step."""
        return heapq.merge(*(self._of_set(part, step) for part in range(len(self._parts))))

    def next_use(self, step: int) -> dict[tuple[int, int], int]:
        """First step from ``step`` on that needs each (set, shard), as far as the end of the next epoch."""
        first_steps: dict[tuple[int, int], int] = {}
        for part, (i, order, _, _) in enumerate(self._parts):
            epoch, within = divmod(step, order.steps_per_epoch)
            soonest = np.full(len(order.counts), np.iinfo(np.int64).max)
            for later in (0, 1):
                uses = self._uses(part, epoch + later)
                first = np.maximum(uses.first + later * order.steps_per_epoch, within)
                open_still = uses.last + later * order.steps_per_epoch >= within
                np.minimum.at(soonest, uses.shard[open_still], first[open_still])
            for shard in np.flatnonzero(soonest < np.iinfo(np.int64).max):
                first_steps[i, int(shard)] = step - within + int(soonest[shard])
        return first_steps

    def _uses(self, part: int, epoch: int) -> ShardUses:
        uses = self._cached.get((part, epoch))
        if uses is None:
            for old in [key for key in self._cached if key[0] == part and key[1] < epoch - 2]:
                del self._cached[old]
            _, order, low, high = self._parts[part]
            uses = self._cached[part, epoch] = order.uses(epoch, low, high)
        return uses

    def _of_set(self, part: int, step: int) -> Iterator[ShardUse]:
        i, order, _, _ = self._parts[part]
        epoch = step // order.steps_per_epoch
        while True:
            uses = self._uses(part, epoch)
            begin = epoch * order.steps_per_epoch
            for at in np.lexsort((uses.shard, uses.first)):
                last = begin + int(uses.last[at])
                if last >= step:
                    yield ShardUse(begin + int(uses.first[at]), last, i, int(uses.shard[at]), float(uses.samples[at]))
            epoch += 1
