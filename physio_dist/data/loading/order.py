"""The order in which training visits samples: pure functions, no I/O.

A run has lanes, a constant of the run and not of the cluster. The epoch's shards, permuted by (seed, epoch), form one
long sequence of samples; each lane owns a contiguous range of it, as long as its share of the global batch, and walks
it in blocks, each of them permuted. A global batch takes the next samples of every lane, in lane order, and a rank
a contiguous slice of the batch. So the batch does not depend on the number of ranks, while a rank stays in few shards.

The whole state of the order is one number: how many global batches have been taken.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from physio_dist.errors import UserError
from physio_dist.runtime.arrays import Float64Array, Int64Array
from physio_dist.runtime.seeding import permutation

# More lanes mix better and serve more nodes: 128 is one lane for every node of a large cluster.
LANES = 128
# Samples over which a run shuffles, all lanes together: with 128 lanes each shuffles over 4,096, several shards' worth,
# so that neighbours in storage part. A node holds its lanes' share of the shards that these samples lie in.
WINDOW = 524_288


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to ``total`` in proportion to ``weights`` (largest remainders, ties to the first)."""
    scale = total / sum(weights)
    exact = [weight * scale for weight in weights]
    parts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (parts[i] - exact[i], i))
    for i in by_remainder[: total - sum(parts)]:
        parts[i] += 1
    return parts


@dataclass(frozen=True)
class ShardUses:
    """Shards that some slots of the batches need in one epoch, and the steps in which they do.

    Attributes:
        shard: int64 ``[n]``; a shard occurs once for each block of each lane that it has samples in.
        first, last: int64 ``[n]``, steps of the epoch (from 0) between which it may be needed, both included.
        samples: float64 ``[n]``, samples that are needed of it meanwhile: whole lanes exactly, of a lane that others
            share the expected number.
    """

    shard: Int64Array
    first: Int64Array
    last: Int64Array
    samples: Float64Array


class SetOrder:
    """The visiting order of one shard set's split.

    Args:
        counts: int64 ``[shard]``, samples of the split in each shard, in the order of the index.
        batch: samples this set gives to every global batch.
        seed: the run's seed.
        name: distinguishes the sets of a mixture, so that they are not shuffled alike.
    """

    def __init__(self, counts: Int64Array, batch: int, seed: int, name: str) -> None:
        self.counts, self.batch, self.seed, self.name = counts, batch, seed, name
        self.total = int(counts.sum())
        self.lanes = min(batch, LANES)
        border = np.arange(self.lanes + 1, dtype=np.int64) * batch // self.lanes
        self._start = border * self.total // batch
        self._length = np.diff(self._start)
        # Samples that a lane gives to each batch.
        self._width = np.diff(border)
        self._block = max(WINDOW // self.lanes, 1)
        # The lanes' first blocks are of different lengths, so that the lanes do not all ask for new shards at once.
        self._phase = np.maximum(self._block * np.arange(1, self.lanes + 1, dtype=np.int64) // self.lanes, 1)
        self._lane = np.repeat(np.arange(self.lanes), self._width)
        self._place = np.arange(batch, dtype=np.int64) - border[self._lane]
        self._lock = threading.Lock()
        # For each lane the permuted block it is in, and which that is: (epoch, number of the block).
        self._shuffled = np.empty((self.lanes, min(self._block, int(self._length.max()))), dtype=np.int32)
        self._held = np.full((self.lanes, 2), -1, dtype=np.int64)
        self._epochs: dict[int, tuple[Int64Array, Int64Array]] = {}
        self._begins = np.cumsum(counts) - counts

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; the rest, smaller than a batch, is left out."""
        return self.total // self.batch

    def take(self, step: int) -> Int64Array:
        """Ordinals within the split (storage order) that global batch ``step`` (from 0) takes from this set.

        Returns:
            int64 ``[batch]``.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        lane = self._lane
        place = within * self._width[lane] + self._place
        phase = self._phase[lane]
        block = np.where(place < phase, 0, 1 + (place - phase) // self._block)
        begin = np.where(block == 0, 0, phase + (block - 1) * self._block)
        offset = place - begin
        out = np.empty(self.batch, dtype=np.int64)
        todo = np.arange(self.batch)
        with self._lock:
            # Once, but where a lane goes from one block to the next within the batch.
            while len(todo):
                held = self._held[lane[todo]]
                ready = (held[:, 0] == epoch) & (held[:, 1] == block[todo])
                now = todo[ready]
                out[now] = begin[now] + self._shuffled[lane[now], offset[now]]
                todo = todo[~ready]
                for slot in todo[np.unique(lane[todo], return_index=True)[1]]:
                    self._shuffle(int(lane[slot]), epoch, int(block[slot]), int(begin[slot]))
            return self._storage(epoch, self._start[lane] + out)

    def _shuffle(self, lane: int, epoch: int, block: int, begin: int) -> None:
        length = int(self._phase[lane]) if block == 0 else self._block
        size = min(length, int(self._length[lane]) - begin)
        self._shuffled[lane, :size] = permutation(size, self.seed, self.name, "window", epoch, lane, block)
        self._held[lane] = epoch, block

    def _sequence(self, epoch: int) -> tuple[Int64Array, Int64Array]:
        """The epoch's shards in their order, and where each ends in the sequence of samples."""
        held = self._epochs.get(epoch)
        if held is None:
            if len(self._epochs) >= 3:
                self._epochs.clear()
            shards = permutation(len(self.counts), self.seed, self.name, "shards", epoch)
            held = self._epochs[epoch] = (shards, np.cumsum(self.counts[shards]))
        return held

    def _storage(self, epoch: int, places: Int64Array) -> Int64Array:
        """Turn places in the epoch's sequence of permuted shards into ordinals in storage order."""
        shards, ends = self._sequence(epoch)
        index = np.searchsorted(ends, places, side="right")
        shard = shards[index]
        return self._begins[shard] + places - (ends[index] - self.counts[shard])

    def uses(self, epoch: int, low: int, high: int) -> ShardUses:
        """The shards that the slots ``low .. high`` of this set's part of the batch need, and when."""
        with self._lock:
            shards, ends = self._sequence(epoch)
        columns: list[tuple[Int64Array, Int64Array, Int64Array, Float64Array]] = []
        lanes, slots = np.unique(self._lane[low:high], return_counts=True)
        for lane, count_of_slots in zip(lanes.tolist(), slots.tolist(), strict=True):
            width, length = int(self._width[lane]), int(self._length[lane])
            # The rest of a lane's range, less than a sample a batch, is not visited in this epoch.
            visited = self.steps_per_epoch * width
            begin = np.concatenate([[0], np.arange(self._phase[lane], visited, self._block)])
            end = np.minimum(np.concatenate([self._phase[lane : lane + 1], begin[1:] + self._block]), length)
            first = np.searchsorted(ends, self._start[lane] + begin, side="right")
            count = np.searchsorted(ends, self._start[lane] + end - 1, side="right") - first + 1
            of = np.repeat(np.arange(len(begin)), count)
            index = first[of] + np.arange(len(of)) - np.repeat(np.cumsum(count) - count, count)
            shard, origin = shards[index], int(self._start[lane])
            inside = np.minimum(ends[index], origin + end[of]) - np.maximum(
                ends[index] - self.counts[shard], origin + begin[of]
            )
            share = inside * (np.minimum(end, visited) - begin)[of] / (end - begin)[of] * count_of_slots / width
            columns.append((shard, begin[of] // width, (np.minimum(end, visited)[of] - 1) // width, share))
        shard, start, stop, samples = (np.concatenate(part) for part in zip(*columns, strict=True))
        used = self.counts[shard] > 0
        return ShardUses(shard[used], start[used], stop[used], samples[used])


@dataclass(frozen=True)
class Mixture:
    """The global batches of a run over one or several shard sets.

    A set of a mixture gives a fixed number of samples to every batch, its weight rounded to whole samples, and has
    epochs of its own.
    """

    sets: tuple[SetOrder, ...]

    @property
    def batch(self) -> int:
        """Samples in a global batch."""
        return sum(order.batch for order in self.sets)

    def take(self, step: int) -> tuple[Int64Array, Int64Array]:
        """Global batch ``step`` (from 0).

        Returns:
            Two int64 ``[batch]``: the set of each sample, and its ordinal within the set's split.
        """
        source = np.concatenate([np.full(order.batch, i, dtype=np.int64) for i, order in enumerate(self.sets)])
        return source, np.concatenate([order.take(step) for order in self.sets])

    def slots(self, low: int, high: int) -> list[tuple[int, int, int]]:
        """Ranges of the sets, as (set, low, high), that make up the slots ``low .. high`` of the batch."""
        ranges, begin = [], 0
        for i, order in enumerate(self.sets):
            first, last = max(low - begin, 0), min(high - begin, order.batch)
            if first < last:
                ranges.append((i, first, last))
            begin += order.batch
        return ranges

    def epoch(self, step: int) -> int:
        """Epoch of the first set that batch ``step`` (from 0) belongs to."""
        return step // self.sets[0].steps_per_epoch


def mixture(
    counts: Sequence[Int64Array],
    weights: Sequence[float],
    names: Sequence[str],
    global_batch: int,
    seed: int,
    labels: Sequence[str] | None = None,
) -> Mixture:
    """The order of a run.

    Args:
        counts: for each set int64 ``[shard]``, samples of the split.
        weights: for each set its share of the batch, in any scale.
        names: for each set its fingerprint, so that the order does not depend on the set's location.
        global_batch: samples a step, over all ranks.
        seed: the run's seed.
        labels: of the sets in messages; by default their names.

    Raises:
        UserError: a set without a place in the batch, or smaller than its part of one batch.
    """
    parts = shares(global_batch, weights)
    for i, label in enumerate(labels or names):
        if parts[i] == 0:
            raise UserError(
                f"{label}: its weight {weights[i]:g} leaves it no sample in a global batch of {global_batch}; "
                "use a larger train.global_batch or weight"
            )
        total = int(np.sum(counts[i]))
        if total < parts[i]:
            raise UserError(
                f"{label} holds {total} samples, fewer than the {parts[i]} that one global batch takes from it; "
                "use a smaller train.global_batch"
            )
    # The same set given twice must not be walked twice in the same order.
    unique = [f"{name}#{i}" if name in names[:i] else name for i, name in enumerate(names)]
    return Mixture(
        tuple(
            SetOrder(np.asarray(c, dtype=np.int64), part, seed, name)
            for c, part, name in zip(counts, parts, unique, strict=True)
        )
    )


def rank_slice(batch: int, rank: int, world: int) -> tuple[int, int]:
    """The half-open range of a global batch's slots that a rank trains on.

    Raises:
        UserError: more ranks than samples.
    """
    if world > batch:
        raise UserError(
            f"{world} ranks cannot share a global batch of {batch}: use at most {batch} ranks or a larger "
            "train.global_batch"
        )
    return rank * batch // world, (rank + 1) * batch // world


def node_slice(batch: int, first: int, last: int, world: int) -> tuple[int, int]:
    """The half-open range of slots that the ranks ``first .. last`` (half-open) of one node train on together."""
    return rank_slice(batch, first, world)[0], rank_slice(batch, last - 1, world)[1]
