"""Traffic simulation: bytes that a node fetches in a run, from the sample order and the cache policy, without data."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from physio_dist.data.loading.order import Mixture
from physio_dist.data.loading.schedule import Schedule, ShardUse
from physio_dist.runtime.arrays import Int64Array

_NEVER = 2**62
# Fraction of the cache that is freed at once, so that its content need not be ranked for every shard.
_FREE_FRACTION = 0.02

Key = tuple[int, int]


@dataclass(frozen=True)
class Traffic:
    """Traffic of one node.

    Attributes:
        epochs: bytes fetched in each simulated epoch of the first set; the last may be incomplete.
        shards: number of fetches of whole shards over all these epochs.
        singles: number of samples that were read one by one because the cache was full.
        cache_needed: bytes of cache needed to fetch no shard twice in an epoch.
    """

    epochs: tuple[int, ...]
    shards: int
    singles: int
    cache_needed: int


def node_traffic(
    order: Mixture,
    sizes: Sequence[Int64Array],
    sample_bytes: int,
    slots: tuple[int, int],
    cache_bytes: float,
    steps: int,
) -> Traffic:
    """Simulate ``steps`` steps of a node.

    Args:
        order: of the run.
        sizes: for each set int64 ``[shard]``, bytes.
        sample_bytes: of one sample.
        slots: the half-open range of the global batch that the node's ranks train on.
        cache_bytes: size of the node's cache.
        steps: number of steps, from the first one on.
    """
    coming = Schedule(order, *slots).coming(0)
    uses = list(itertools.takewhile(lambda use: use.first < steps, coming))
    epoch = order.sets[0].steps_per_epoch
    fetched = [0] * (-(-steps // epoch))
    cache = _Cache(uses, cache_bytes)
    shards, singles = 0, 0.0
    for use in uses:
        size = int(sizes[use.set][use.shard])
        outcome = cache.request((use.set, use.shard), use.first, size)
        if outcome == "fetched":
            shards += 1
            fetched[use.first // epoch] += size
        elif outcome == "refused":
            singles += use.samples
            fetched[use.first // epoch] += round(use.samples * sample_bytes)
    return Traffic(tuple(fetched), shards, round(singles), _most_in_use(order, uses, sizes, steps))


class _Cache:
    """A node's cache: evicts the shards needed last, never those in use."""

    def __init__(self, uses: Sequence[ShardUse], limit: float) -> None:
        self._limit = limit
        self._sizes: dict[Key, int] = {}
        self._total = 0
        self._firsts: dict[Key, list[int]] = defaultdict(list)
        self._lasts: dict[Key, list[int]] = defaultdict(list)
        for use in uses:
            self._firsts[use.set, use.shard].append(use.first)
            lasts = self._lasts[use.set, use.shard]
            lasts.append(max(use.last, lasts[-1] if lasts else 0))

    def request(self, key: Key, step: int, size: int) -> str:
        if key in self._sizes:
            return "cached"
        if self._total + size > self._limit and not self._free(step, size):
            return "refused"
        self._sizes[key] = size
        self._total += size
        return "fetched"

    def _free(self, step: int, size: int) -> bool:
        later = sorted(((self._next(key, step), key) for key in self._sizes), reverse=True)
        target = max(size, int(_FREE_FRACTION * self._limit))
        for needed, key in later:
            if needed <= step or self._total + target <= self._limit:
                break
            self._total -= self._sizes.pop(key)
        return self._total + size <= self._limit

    def _next(self, key: Key, step: int) -> int:
        firsts = self._firsts[key]
        at = bisect_right(firsts, step)
        if at and self._lasts[key][at - 1] >= step:
            return step
        return firsts[at] if at < len(firsts) else _NEVER


def _most_in_use(order: Mixture, uses: Sequence[ShardUse], sizes: Sequence[Int64Array], steps: int) -> int:
    """Largest number of bytes that are between their first and last use in an epoch at the same time."""
    spans: dict[tuple[int, int, int], tuple[int, int]] = {}
    for use in uses:
        key = (use.set, use.first // order.sets[use.set].steps_per_epoch, use.shard)
        first, last = spans.get(key, (use.first, use.last))
        spans[key] = min(first, use.first), max(last, use.last)
    change = np.zeros(steps + 1, dtype=np.int64)
    for (i, _, shard), (first, last) in spans.items():
        change[first] += sizes[i][shard]
        change[min(last + 1, steps)] -= sizes[i][shard]
    return int(np.cumsum(change)[:-1].max())
