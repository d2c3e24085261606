"""Batches of one rank, in the run's order, read ahead of need.

Everything is read by threads of this process: no worker process has to be forked, fed or resumed, and the S3 client's
event loop stays in one place. Signals stay int16; scaling is left to the device.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from physio_dist.errors import UserError
from physio_dist.shards.cache import ShardCache
from physio_dist.shards.index import SPLITS, ShardSet, Sidecar, SignalInfo, open_set, read_sidecar
from physio_dist.shards.order import Ints, Mixture, mixture, rank_slice

T = TypeVar("T")

# Batches made ahead of the training step, and steps whose shards are fetched ahead of that.
_BATCHES_AHEAD = 3
_STEPS_AHEAD = 16
_FETCHERS = 8


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch, or some held-out samples.

    Attributes:
        step: the global batch's number, from 0.
        signal: int16 ``[sample, channel, time]``.
        scale: float32 ``[sample]``, microvolts per bit.
        valid: bool ``[sample, channel]``.
        weight: float32 ``[sample]``: 1, or 0 for padding, whose signal is all zero.
        positions: int64 ``[sample]``, place in the run's whole sequence of samples.
        samples: ``(set, sample)`` of each sample that is not padding; see :meth:`Source.keys`.
    """

    step: int
    signal: npt.NDArray[np.int16]
    scale: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    weight: npt.NDArray[np.float32]
    positions: Ints
    samples: tuple[Ints, Ints]


class Source:
    """One or several opened shard sets with the same channels, rate and length.

    Args:
        parts: (URL, weight) of each set.
        signal: ``ecg`` or ``eeg``.
        cache: where shards are opened.

    Raises:
        UserError: a set that is not there, lacks the signal, or does not fit the first one.
        DataError: an index or sidecar that is damaged.
    """

    def __init__(self, parts: Sequence[tuple[str, float]], signal: str, cache: ShardCache) -> None:
        self.signal = signal
        self.cache = cache
        self.sets = [open_set(url) for url, _ in parts]
        self.weights = [weight for _, weight in parts]
        for shards in self.sets:
            if signal not in shards.signals:
                raise UserError(f"{shards.url} holds no {signal} signal; it has: {', '.join(shards.signals)}")
            _agree(self.sets[0], shards, signal)
        self.sidecars: list[Sidecar] = [read_sidecar(shards) for shards in self.sets]
        self._starts = [shards.shard_starts() for shards in self.sets]

    @property
    def info(self) -> SignalInfo:
        """Channels and length of the signal."""
        return self.sets[0].signals[self.signal]

    def members(self, split: str) -> list[Ints]:
        """For each set the samples of a split, in storage order."""
        code = SPLITS.index(split)
        return [np.flatnonzero(sidecar.split == code).astype(np.int64) for sidecar in self.sidecars]

    def order(self, split: str, global_batch: int, seed: int) -> Mixture:
        """The order in which a run visits a split.

        Raises:
            UserError: a split with fewer samples than its part of one global batch.
        """
        counts = [
            np.diff(np.searchsorted(ids, starts)) for ids, starts in zip(self.members(split), self._starts, strict=True)
        ]
        names = [f"{shards.fingerprint}/{split}" for shards in self.sets]
        shown = [f"{shards.url}: split {split}" for shards in self.sets]
        return mixture(counts, self.weights, names, global_batch, seed, shown)

    def keys(self, samples: tuple[Ints, Ints]) -> list[str]:
        """Keys of ``(set, sample)`` pairs."""
        sources, ids = samples
        keys = [""] * len(ids)
        for i, sidecar in enumerate(self.sidecars):
            places = np.flatnonzero(sources == i)
            for place, key in zip(places, sidecar.keys(ids[places]), strict=True):
                keys[place] = key
        return keys

    def shards_of(self, sources: Ints, ids: Ints) -> set[tuple[int, int]]:
        """The (set, shard) pairs that samples lie in."""
        found: set[tuple[int, int]] = set()
        for i, starts in enumerate(self._starts):
            mine = ids[sources == i]
            found |= {(i, int(s)) for s in np.unique(np.searchsorted(starts, mine, side="right") - 1)}
        return found

    def gather(self, step: int, sources: Ints, ids: Ints, positions: Ints, size: int) -> Batch:
        """Read samples into a batch of ``size``, padded at its end.

        Raises:
            DataError: a shard disagrees with the index.
        """
        info = self.info
        count, nbytes = len(ids), info.nbytes
        signal = np.zeros((size, len(info.channels), info.samples), dtype=np.int16)
        flat = signal.reshape(size, -1).view(np.uint8)
        scale = np.ones(size, dtype=np.float32)
        valid = np.ones((size, len(info.channels)), dtype=np.bool_)
        for i, sidecar in enumerate(self.sidecars):
            rows = np.flatnonzero(sources == i)
            if not len(rows):
                continue
            mine = ids[rows]
            shard = np.searchsorted(self._starts[i], mine, side="right") - 1
            offset = sidecar.offset[self.signal][mine]
            scale[rows] = self.sets[i].signals[self.signal].uv_per_bit
            valid[rows] = sidecar.valid[self.signal][mine]
            for number in np.unique(shard):
                data = self.cache.open(self.sets[i], int(number))
                for row, start in zip(rows[shard == number], offset[shard == number], strict=True):
                    flat[row] = data[start : start + nbytes]
        weight = np.zeros(size, dtype=np.float32)
        weight[:count] = 1
        return Batch(step, signal, scale, valid, weight, _padded(positions, size), (sources, ids))


def _padded(positions: Ints, size: int) -> Ints:
    return np.concatenate([positions, np.zeros(size - len(positions), dtype=np.int64)])


def _agree(first: ShardSet, other: ShardSet, signal: str) -> None:
    ours, theirs = first.signals[signal], other.signals[signal]
    for what, a, b in (
        ("rate", first.rate, other.rate),
        ("window length", ours.samples, theirs.samples),
        ("channels", ours.channels, theirs.channels),
    ):
        if a != b:
            raise UserError(f"{other.url} and {first.url} cannot be mixed: {what} {b} against {a}")


def rank_batch(
    source: Source, order: Mixture, members: Sequence[Ints], step: int, rank: int, world: int
) -> tuple[Ints, Ints, Ints]:
    """What a rank trains on in global batch ``step``: (set, sample, position in the run) of each sample."""
    low, high = rank_slice(order.batch, rank, world)
    sets, ordinals = order.take(step)
    sets, ordinals = sets[low:high], ordinals[low:high]
    ids = np.empty(high - low, dtype=np.int64)
    for i, samples in enumerate(members):
        mine = sets == i
        ids[mine] = samples[ordinals[mine]]
    return sets, ids, np.arange(low, high, dtype=np.int64) + step * order.batch


class Feed(Generic[T]):
    """Iterates over a rank's batches from a step on, made ahead in a thread.

    Args:
        source: opened shard sets.
        order: of the run.
        rank, world: of this process.
        size: samples in each batch, padding included.
        prepare: applied to every batch in the reading thread.
        start, stop: steps, half-open, from 0.

    Errors of the reading thread are raised by the iteration.
    """

    def __init__(
        self, source: Source, order: Mixture, split: str, rank: int, world: int, size: int,
        prepare: Callable[[Batch], T], start: int, stop: int,
    ) -> None:  # fmt: skip
        self._source, self._order, self._members = source, order, source.members(split)
        self._rank, self._world, self._size, self._prepare = rank, world, size, prepare
        self._range = range(start, stop)
        self._queue: queue.Queue[T | BaseException] = queue.Queue(_BATCHES_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="feed", daemon=True)

    def __enter__(self) -> Feed[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(timeout=10)

    def __iter__(self) -> Iterator[T]:
        for _ in self._range:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def _mine(self, step: int) -> tuple[Ints, Ints, Ints]:
        return rank_batch(self._source, self._order, self._members, step, self._rank, self._world)

    def _produce(self) -> None:
        with ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetch") as pool:
            try:
                coming: deque[tuple[tuple[Ints, Ints, Ints], set[tuple[int, int]]]] = deque()
                for step in self._range:
                    for ahead in range(step + len(coming), min(step + _STEPS_AHEAD, self._range.stop)):
                        mine = self._mine(ahead)
                        shards = self._source.shards_of(mine[0], mine[1])
                        for where in sorted(shards.difference(*(asked for _, asked in coming))):
                            # An error of a fetch ahead of need is raised when the shard is needed.
                            pool.submit(self._source.cache.open, self._source.sets[where[0]], where[1])
                        coming.append((mine, shards))
                    (sets, ids, positions), _ = coming.popleft()
                    self._put(self._prepare(self._source.gather(step, sets, ids, positions, self._size)))
                    if self._closed.is_set():
                        break
            except BaseException as error:
                self._put(error)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _put(self, item: T | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue
