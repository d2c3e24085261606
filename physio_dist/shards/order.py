"""The order in which training visits samples: pure functions, no I/O.

A run has lanes, a constant of the run and not of the cluster. The epoch's shards, permuted by (seed, epoch), form one
long sequence of samples; each lane owns a contiguous range of it, as long as its share of the global batch, and walks
it through a shuffle window of its own. A global batch takes the next samples of every lane, in lane order, and a rank
a contiguous slice of the batch. So the batch does not depend on the number of ranks, while a rank stays in few shards.

The whole state of the order is one number: how many global batches have been taken.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from physio_dist.errors import UserError

Ints = npt.NDArray[np.int64]

# More lanes mix better and serve more nodes; each has the shards of its shuffle window in hand, which are WINDOW over
# a shard's samples and one or two more. 128 is one lane for every node of a large cluster; a single node then holds up
# to 128 x 6 shards of 1,000 samples at a time, some 37 GB of 12-lead ECG.
LANES = 128
# Samples over which a lane shuffles: several shards' worth, so that neighbours in storage part.
WINDOW = 4096


def number_of(*purpose: object) -> int:
    """64 bits that are a function of ``purpose`` alone, as a seed or for a draw."""
    return int.from_bytes(hashlib.blake2b("/".join(map(str, purpose)).encode(), digest_size=8).digest(), "big")


def permutation(n: int, *purpose: str | int) -> Ints:
    """A permutation of ``range(n)`` that depends on ``purpose`` alone.

    Philox's raw bits are fixed by its specification, and sorting them keeps the result apart from NumPy's own
    shuffling, which may change between releases.

    Returns:
        int64 ``[n]``.
    """
    key = hashlib.blake2b("/".join(map(str, purpose)).encode(), digest_size=16).digest()
    bits = np.random.Philox(key=np.frombuffer(key, dtype="<u8").astype(np.uint64)).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers that add up to ``total`` in proportion to ``weights`` (largest remainders, ties to the first)."""
    scale = total / sum(weights)
    exact = [weight * scale for weight in weights]
    whole = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


@dataclass(frozen=True)
class SetOrder:
    """The visiting order of one shard set's split.

    Attributes:
        counts: int64 ``[shard]``, samples of the split in each shard, in the order of the index.
        batch: samples this set gives to every global batch.
        seed: the run's seed.
        name: tells sets of a mixture apart, so that they are not shuffled alike.
    """

    counts: Ints
    batch: int
    seed: int
    name: str

    @property
    def total(self) -> int:
        """Samples in the split."""
        return int(self.counts.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch; the rest, smaller than a batch, is left out."""
        return self.total // self.batch

    def take(self, step: int) -> Ints:
        """Ordinals within the split (storage order) that global batch ``step`` (from 0) takes from this set.

        Returns:
            int64 ``[batch]``.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        lanes = min(self.batch, LANES)
        border = np.arange(lanes + 1) * self.batch // lanes
        start = border * self.total // self.batch
        places = np.empty(self.batch, dtype=np.int64)
        for lane in range(lanes):
            width = int(border[lane + 1] - border[lane])
            length = int(start[lane + 1] - start[lane])
            first = within * width
            places[border[lane] : border[lane + 1]] = start[lane] + self._walk(epoch, lane, length, first, width)
        return self._storage(epoch, places)

    def _walk(self, epoch: int, lane: int, length: int, first: int, width: int) -> Ints:
        """Positions ``first .. first + width`` of a lane's walk through its range of ``length`` samples."""
        out = np.empty(width, dtype=np.int64)
        done = 0
        while done < width:
            block, offset = divmod(first + done, WINDOW)
            begin = block * WINDOW
            shuffled = self._block(epoch, lane, block, min(WINDOW, length - begin))
            piece = shuffled[offset : offset + width - done]
            out[done : done + len(piece)] = begin + piece
            done += len(piece)
        return out

    def _block(self, epoch: int, lane: int, block: int, size: int) -> Ints:
        # Threads share the caches: whatever another does to them, this one returns what it holds.
        cache: dict[tuple[int, int], tuple[int, Ints]] = self.__dict__.setdefault("_blocks", {})
        held = cache.get((epoch, lane))
        if held is None or held[0] != block:
            if len(cache) >= 4 * LANES:
                cache.clear()
            held = (block, permutation(size, self.seed, self.name, "window", epoch, lane, block))
            cache[(epoch, lane)] = held
        return held[1]

    def _storage(self, epoch: int, places: Ints) -> Ints:
        """Turn places in the epoch's sequence of permuted shards into ordinals in storage order."""
        cache: dict[int, tuple[Ints, Ints, Ints]] = self.__dict__.setdefault("_epochs", {})
        held = cache.get(epoch)
        if held is None:
            if len(cache) >= 2:
                cache.clear()
            shards = permutation(len(self.counts), self.seed, self.name, "shards", epoch)
            held = (shards, np.cumsum(self.counts[shards]), np.cumsum(self.counts) - self.counts)
            cache[epoch] = held
        shards, ends, begins = held
        index = np.searchsorted(ends, places, side="right")
        shard = shards[index]
        return begins[shard] + places - (ends[index] - self.counts[shard])


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

    def take(self, step: int) -> tuple[Ints, Ints]:
        """Global batch ``step`` (from 0).

        Returns:
            Two int64 ``[batch]``: the set of each sample, and its ordinal within the set's split.
        """
        source = np.concatenate([np.full(order.batch, i, dtype=np.int64) for i, order in enumerate(self.sets)])
        return source, np.concatenate([order.take(step) for order in self.sets])

    def epoch(self, step: int) -> int:
        """Epoch of the first set that batch ``step`` (from 0) belongs to."""
        return step // self.sets[0].steps_per_epoch


def mixture(
    counts: Sequence[Ints],
    weights: Sequence[float],
    names: Sequence[str],
    global_batch: int,
    seed: int,
    shown: Sequence[str] | None = None,
) -> Mixture:
    """The order of a run.

    Args:
        counts: for each set int64 ``[shard]``, samples of the split.
        weights: for each set its share of the batch, in any scale.
        names: for each set its fingerprint: two runs on the same data then have the same order wherever it lies.
        global_batch: samples a step, over all ranks.
        seed: the run's seed.
        shown: what messages call the sets, where it is not their names.

    Raises:
        UserError: a set without a place in the batch, or smaller than its part of one batch.
    """
    parts = shares(global_batch, weights)
    for i, called in enumerate(shown or names):
        if parts[i] == 0:
            raise UserError(
                f"{called}: its weight {weights[i]:g} leaves it no sample in a global batch of {global_batch}; "
                "use a larger train.global_batch or weight"
            )
        total = int(np.sum(counts[i]))
        if total < parts[i]:
            raise UserError(
                f"{called} holds {total} samples, fewer than the {parts[i]} that one global batch takes from it; "
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
