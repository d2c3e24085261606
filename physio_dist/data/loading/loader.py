"""Batches of one rank, in the run's order, read ahead of need.

Everything is read by threads of this process: no worker process has to be forked, fed or resumed, and the S3 client's
event loop stays in one place. Signals stay int16; scaling is left to the device.
"""

from __future__ import annotations

import itertools
import logging
import queue
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from physio_dist import storage
from physio_dist.data.format.index import SampleTable, ShardSet, SignalInfo, read_sample_table
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.loading.mixture import members, open_sets, order_of
from physio_dist.data.loading.order import Ints, Mixture, node_slice, permutation, rank_slice
from physio_dist.data.loading.schedule import Schedule
from physio_dist.errors import DataError

T = TypeVar("T")
log = logging.getLogger("physio_dist")

# Batches made ahead of the training step.
_BATCHES_AHEAD = 3
# Shards that are fetched at once, and those that have been asked for and are not there yet.
_FETCHERS = 4
_ASKED_AHEAD = 16
# Steps ahead for which files of a local set are verified.
_STEPS_AHEAD = 64
# Batches whose memory is kept: those made ahead, the one in training, and one being made.
_BUFFERS = _BATCHES_AHEAD + 2
# Samples that are read one by one at the same time.
_SINGLE_READS = 16


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
        samples: ``(set, sample)`` of each sample that is not padding; see :meth:`ShardDataset.keys`.
    """

    step: int
    signal: npt.NDArray[np.int16]
    scale: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    weight: npt.NDArray[np.float32]
    positions: Ints
    samples: tuple[Ints, Ints]


@dataclass(frozen=True)
class _ShardRead:
    """Samples of a batch that lie in the same shard; of equal length, ``shards`` all the same."""

    set: int
    shards: list[int]
    rows: list[int]
    samples: list[int]
    offsets: list[int]


class _Buffers:
    """Memory of batches that nobody refers to any more, used again: fresh pages cost as much as reading into them."""

    def __init__(self) -> None:
        self._held: list[npt.NDArray[np.int16]] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, int, int]) -> npt.NDArray[np.int16]:
        with self._lock:
            for i in range(len(self._held)):
                # Views, tensors and memory views of an array refer to it; here are the list and the call itself.
                if self._held[i].shape == shape and sys.getrefcount(self._held[i]) == 2:
                    return self._held[i]
            fresh = np.empty(shape, dtype=np.int16)
            self._held = [*self._held[1 - _BUFFERS :], fresh]
            return fresh


class ShardDataset:
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
        self.sets = open_sets([url for url, _ in parts], signal)
        self.weights = [weight for _, weight in parts]
        self.sidecars: list[SampleTable] = [_sidecar(shards, cache) for shards in self.sets]
        self._starts = [shards.shard_starts() for shards in self.sets]
        self._buffers = _Buffers()

    @property
    def info(self) -> SignalInfo:
        """Channels and length of the signal."""
        return self.sets[0].signals[self.signal]

    def members(self, split: str) -> list[Ints]:
        """For each set the samples of a split, in storage order."""
        return [members(sidecar, split) for sidecar in self.sidecars]

    def order(self, split: str, global_batch: int, seed: int) -> Mixture:
        """The order in which a run visits a split.

        Raises:
            UserError: a split with fewer samples than its part of one global batch.
        """
        return order_of(self.sets, self.sidecars, self.weights, split, global_batch, seed)

    def keys(self, samples: tuple[Ints, Ints]) -> list[str]:
        """Keys of ``(set, sample)`` pairs."""
        sources, ids = samples
        keys = [""] * len(ids)
        for i, sidecar in enumerate(self.sidecars):
            places = np.flatnonzero(sources == i)
            for place, key in zip(places, sidecar.keys(ids[places]), strict=True):
                keys[place] = key
        return keys

    def read_batch(
        self, step: int, sources: Ints, ids: Ints, positions: Ints, size: int, fetching: bool = True
    ) -> Batch:  # fmt: skip
        """Read samples into a batch of ``size``, padded at its end.

        Args:
            step: the batch's number.
            sources, ids, positions: set, sample and place in the run of each sample.
            size: of the batch.
            fetching: whether shards are fetched whole; otherwise only those at hand are used, and what is missing is
                read sample by sample.

        Raises:
            DataError: a shard disagrees with the index.
        """
        info = self.info
        count = len(ids)
        signal = self._buffers.take((size, len(info.channels), info.samples))
        signal[count:] = 0
        scale = np.ones(size, dtype=np.float32)
        valid = np.ones((size, len(info.channels)), dtype=np.bool_)
        visits: list[_ShardRead] = []
        out = signal.reshape(size, -1).view(np.uint8)
        for i, sidecar in enumerate(self.sidecars):
            rows = np.flatnonzero(sources == i)
            if not len(rows):
                continue
            mine = ids[rows]
            scale[rows] = self.sets[i].signals[self.signal].uv_per_bit
            valid[rows] = sidecar.valid[self.signal][mine]
            shard = np.searchsorted(self._starts[i], mine, side="right") - 1
            # One visit to each shard.
            by_shard = np.argsort(shard, kind="stable")
            borders = [0, *(np.flatnonzero(np.diff(shard[by_shard])) + 1).tolist(), len(mine)]
            offset = sidecar.offset[self.signal][mine]
            wanted = [column[by_shard].tolist() for column in (shard, rows, mine, offset)]
            visits += [_ShardRead(i, *(column[a:b] for column in wanted)) for a, b in itertools.pairwise(borders)]
        singles = [
            (visit.set, visit.shards[0], row, sample)
            for visit in visits if not self._read(visit, out, fetching)
            for row, sample in zip(visit.rows, visit.samples, strict=True)
        ]  # fmt: skip
        if singles:
            with ThreadPoolExecutor(min(_SINGLE_READS, len(singles)), thread_name_prefix="single") as pool:
                for _ in pool.map(lambda one: self._read_single(one, out), singles):
                    pass
        weight = np.zeros(size, dtype=np.float32)
        weight[:count] = 1
        return Batch(step, signal, scale, valid, weight, _padded(positions, size), (sources, ids))

    def _read(self, visit: _ShardRead, out: npt.NDArray[np.uint8], fetching: bool) -> bool:
        """Read samples of a shard into rows of a batch; False where they have to be read one by one."""
        shards, shard = self.sets[visit.set], visit.shards[0]
        if not fetching and not self.cache.held(shards, shard):
            return False
        for _ in range(3):
            opened = self.cache.open(shards, shard)
            if opened is None:
                return False
            # What was cut short or altered under our hands is verified again, and fetched again, when it is opened.
            if opened.read(visit.offsets, visit.rows, out):
                return True
        raise DataError(f"shard {shards.shard_url(shard)} keeps changing while it is read")

    def _read_single(self, which: tuple[int, int, int, int], out: npt.NDArray[np.uint8]) -> None:
        i, shard, row, sample = which
        shards, sidecar, nbytes = self.sets[i], self.sidecars[i], self.info.nbytes
        url, start = shards.shard_url(shard), int(sidecar.offset[self.signal][sample])
        for attempt in range(2):
            try:
                data = storage.read_bytes(url, start, start + nbytes)
            except storage.NotFoundError:
                raise DataError(f"shard {url} is in the index but not in storage") from None
            if len(data) == nbytes and zlib.crc32(data) == sidecar.check[self.signal][sample]:
                out[row] = np.frombuffer(data, np.uint8)
                return
            if attempt == 0:
                log.warning("shard %s disagrees with its index; reading sample %s again", url, self._key(i, sample))
        raise DataError(f"shard {url} disagrees with its index in sample {self._key(i, sample)}, also when read again")

    def _key(self, i: int, sample: int) -> str:
        return self.sidecars[i].keys(np.array([sample]))[0]


def _sidecar(shards: ShardSet, cache: ShardCache) -> SampleTable:
    if storage.is_local(shards.url):
        return read_sample_table(shards)
    return read_sample_table(shards, lambda _: cache.sidecar(shards))


def _padded(positions: Ints, size: int) -> Ints:
    return np.concatenate([positions, np.zeros(size - len(positions), dtype=np.int64)])


def rank_batch(
    source: ShardDataset, order: Mixture, members: Sequence[Ints], step: int, rank: int, world: int
) -> tuple[Ints, Ints, Ints]:
    """What a rank trains on in global batch ``step``: (set, sample, position in the run) of each sample."""
    low, high = rank_slice(order.batch, rank, world)
    sets, ordinals = order.take(step)
    # A batch is in the order of the lanes, which is that of neighbouring shards; within a rank's slice it need not be.
    mine = low + permutation(high - low, order.sets[0].seed, "slice", step)
    sets, ordinals = sets[mine], ordinals[mine]
    ids = np.empty(high - low, dtype=np.int64)
    for i, samples in enumerate(members):
        of_set = sets == i
        ids[of_set] = samples[ordinals[of_set]]
    return sets, ids, mine + step * order.batch


class _Ahead:
    """Has shards opened before they are needed, in the order of need, as far ahead as the cache has room."""

    def __init__(
        self, source: ShardDataset, schedule: Schedule, steps: range, budget: float, pool: ThreadPoolExecutor
    ) -> None:  # fmt: skip
        self._source, self._budget, self._pool = source, budget, pool
        self._stop = steps.stop
        self._coming = schedule.coming(steps.start)
        self._next = next(self._coming)
        # (set, shard) -> last step of need, bytes.
        self._asked: dict[tuple[int, int], tuple[int, int]] = {}
        self._under_way: list[Future[object]] = []

    def look(self, step: int) -> None:
        """Ask for what ``step`` and those after it need."""
        self._asked = {key: use for key, use in self._asked.items() if use[0] >= step}
        self._under_way = [future for future in self._under_way if not future.done()]
        taken = sum(size for _, size in self._asked.values())
        while (use := self._next).first < self._stop and len(self._under_way) < _ASKED_AHEAD:
            shards, key = self._source.sets[use.set], (use.set, use.shard)
            size, local = shards.shards[use.shard].filesize, storage.is_local(shards.data_url)
            if use.first > step + _STEPS_AHEAD if local else taken + size > self._budget:
                break
            last, _ = self._asked.get(key, (-1, 0))
            if last < 0:
                # An error of a fetch ahead of need is raised when the shard is needed.
                self._under_way.append(self._pool.submit(self._source.cache.open, shards, use.shard, True))
                taken += size
            self._asked[key] = max(last, use.last), size
            self._next = next(self._coming)


class PrefetchLoader(Generic[T]):
    """Iterates over a rank's batches from a step on, made ahead in a thread.

    Args:
        source: opened shard sets.
        order: of the run.
        rank, world: of this process.
        size: samples in each batch, padding included.
        prepare: applied to every batch in the reading thread.
        start, stop: steps, half-open, from 0.
        node: the ranks that share this one's cache, half-open; by default this one alone.

    Errors of the reading thread are raised by the iteration.
    """

    def __init__(
        self, source: ShardDataset, order: Mixture, split: str, rank: int, world: int, size: int,
        prepare: Callable[[Batch], T], start: int, stop: int, node: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self._source, self._order, self._members = source, order, source.members(split)
        self._rank, self._world, self._size, self._prepare = rank, world, size, prepare
        self._range = range(start, stop)
        low, high = node or (rank, rank + 1)
        batch = order.batch
        self._mine = Schedule(order, *rank_slice(batch, rank, world))
        self._node = Schedule(order, *node_slice(batch, low, high, world))
        # What this rank may fill with shards that are not needed yet.
        self._budget = source.cache.limit_bytes / (high - low)
        self._step = start
        self._queue: queue.Queue[T | BaseException] = queue.Queue(_BATCHES_AHEAD)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="feed", daemon=True)

    def __enter__(self) -> PrefetchLoader[T]:
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

    def _next_use(self) -> tuple[int, dict[str, int]]:
        step, sets = self._step, self._source.sets
        soonest: dict[str, int] = {}
        for (i, shard), first in self._node.next_use(step).items():
            # A set may stand in a mixture twice.
            sha256 = sets[i].shards[shard].sha256
            soonest[sha256] = min(first, soonest.get(sha256, first))
        return step, soonest

    def _produce(self) -> None:
        source = self._source
        source.cache.next_use = self._next_use
        with ThreadPoolExecutor(_FETCHERS, thread_name_prefix="fetch") as pool:
            try:
                ahead = _Ahead(source, self._mine, self._range, self._budget, pool)
                for step in self._range:
                    self._step = step
                    ahead.look(step)
                    sets, ids, positions = rank_batch(source, self._order, self._members, step, self._rank, self._world)
                    self._put(self._prepare(source.read_batch(step, sets, ids, positions, self._size)))
                    if self._closed.is_set():
                        break
            except BaseException as error:
                self._put(error)
            finally:
                source.cache.next_use = None
                pool.shutdown(wait=False, cancel_futures=True)

    def _put(self, item: T | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue
