"""Samples of opened shard sets, read into batches.

Signals stay int16; scaling is left to the device.
"""

from __future__ import annotations

import itertools
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from physio_dist import storage
from physio_dist.data.format.index import ShardSet, SignalInfo
from physio_dist.data.format.sample_table import SampleTable
from physio_dist.data.loading.buffers import BufferPool
from physio_dist.data.loading.mixture import check_compatible, members, order_of
from physio_dist.data.loading.order import Mixture
from physio_dist.errors import DataError
from physio_dist.runtime.arrays import BoolArray, Float32Array, Int16Array, Int64Array, UInt8Array

if TYPE_CHECKING:
    from physio_dist.data.handle import ShardSetHandle

log = logging.getLogger("physio_dist")

# Batches whose memory is kept once they are released: those made ahead, the one in training, and one being made.
_BUFFERS = 5
# Samples that are read one by one at the same time.
_SINGLE_READS = 16


def _keep() -> None:
    """Release nothing: the memory of the batch is no pool's."""


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
        release: gives the memory of ``signal`` to later batches. The last consumer of the batch may call it once
            nothing reads ``signal``, or a view or tensor of it, any more. Batches that are not released keep their
            memory to themselves, which costs time and nothing else.
    """

    step: int
    signal: Int16Array
    scale: Float32Array
    valid: BoolArray
    weight: Float32Array
    positions: Int64Array
    samples: tuple[Int64Array, Int64Array]
    release: Callable[[], None] = field(default=_keep, repr=False, compare=False)


@dataclass(frozen=True)
class _ShardRead:
    """Samples of a batch that lie in the same shard; lists of equal length."""

    set: int
    shard: int
    rows: list[int]
    samples: list[int]
    offsets: list[int]


class ShardDataset:
    """One or several opened shard sets with the same channels, rate and length.

    Args:
        handles: the sets; they share one cache.
        signal: ``ecg`` or ``eeg``.
        weights: of each set in a mixture, in any scale; by default equal ones.

    Attributes:
        sets: index of each set.
        sample_tables: table of each set's samples.

    Raises:
        UserError: a set that lacks the signal, or does not fit the first one.
        DataError: a sample table that is damaged.
    """

    def __init__(
        self, handles: Sequence[ShardSetHandle], signal: str, weights: Sequence[float] | None = None
    ) -> None:  # fmt: skip
        self.signal = signal
        self.cache = handles[0].cache
        self.sets: list[ShardSet] = [handle.index for handle in handles]
        check_compatible(self.sets, signal)
        self.weights = list(weights or [1.0] * len(handles))
        self.sample_tables: list[SampleTable] = [handle.sample_table for handle in handles]
        self._starts = [shards.shard_starts() for shards in self.sets]
        self._buffers = BufferPool(_BUFFERS)

    @property
    def info(self) -> SignalInfo:
        """Channels and length of the signal."""
        return self.sets[0].signals[self.signal]

    def members(self, split: str) -> list[Int64Array]:
        """Samples of a split in storage order, for each set."""
        return [members(table, split) for table in self.sample_tables]

    def order(self, split: str, global_batch: int, seed: int) -> Mixture:
        """The order in which a run visits a split.

        Raises:
            UserError: a split with fewer samples than its part of one global batch.
        """
        return order_of(self.sets, self.sample_tables, self.weights, split, global_batch, seed)

    def keys(self, samples: tuple[Int64Array, Int64Array]) -> list[str]:
        """Keys of ``(set, sample)`` pairs."""
        sources, ids = samples
        keys = [""] * len(ids)
        for i, table in enumerate(self.sample_tables):
            places = np.flatnonzero(sources == i)
            for place, key in zip(places, table.keys(ids[places]), strict=True):
                keys[place] = key
        return keys

    def read_batch(
        self, step: int, sources: Int64Array, ids: Int64Array, positions: Int64Array, size: int, fetching: bool = True
    ) -> Batch:  # fmt: skip
        """Read samples into a batch of ``size``, padded at its end.

        Args:
            step: the batch's number.
            sources, ids, positions: set, sample and place in the run of each sample.
            size: of the batch.
            fetching: whether shards are fetched whole; otherwise only local and cached ones are used, and other
                samples are read one by one.

        Raises:
            DataError: a shard disagrees with the index.
        """
        info = self.info
        count = len(ids)
        signal, release = self._buffers.acquire((size, len(info.channels), info.samples))
        signal[count:] = 0
        scale = np.ones(size, dtype=np.float32)
        valid = np.ones((size, len(info.channels)), dtype=np.bool_)
        for i, table in enumerate(self.sample_tables):
            rows = np.flatnonzero(sources == i)
            scale[rows] = self.sets[i].signals[self.signal].uv_per_bit
            valid[rows] = table.valid[self.signal][ids[rows]]
        out = signal.reshape(size, -1).view(np.uint8)
        singles = [
            (read.set, read.shard, row, sample)
            for read in self._shard_reads(sources, ids) if not self._read(read, out, fetching)
            for row, sample in zip(read.rows, read.samples, strict=True)
        ]  # fmt: skip
        if singles:
            with ThreadPoolExecutor(min(_SINGLE_READS, len(singles)), thread_name_prefix="single") as pool:
                for _ in pool.map(lambda single: self._read_single(single, out), singles):
                    pass
        weight = np.zeros(size, dtype=np.float32)
        weight[:count] = 1
        return Batch(step, signal, scale, valid, weight, _padded(positions, size), (sources, ids), release)

    def _shard_reads(self, sources: Int64Array, ids: Int64Array) -> Iterator[_ShardRead]:
        """Group samples by shard, so that each shard is opened once."""
        for i, table in enumerate(self.sample_tables):
            rows = np.flatnonzero(sources == i)
            if not len(rows):
                continue
            samples = ids[rows]
            shard = np.searchsorted(self._starts[i], samples, side="right") - 1
            by_shard = np.argsort(shard, kind="stable")
            borders = [0, *(np.flatnonzero(np.diff(shard[by_shard])) + 1).tolist(), len(samples)]
            offset = table.offset[self.signal][samples]
            columns = [column[by_shard].tolist() for column in (rows, samples, offset)]
            for low, high in itertools.pairwise(borders):
                yield _ShardRead(i, int(shard[by_shard[low]]), *(column[low:high] for column in columns))

    def _read(self, read: _ShardRead, out: UInt8Array, fetching: bool) -> bool:
        """Read samples of a shard into rows of a batch; False where they have to be read one by one."""
        shards = self.sets[read.set]
        if not fetching and not self.cache.held(shards, read.shard):
            return False
        for _ in range(3):
            opened = self.cache.open(shards, read.shard)
            if opened is None:
                return False
            # A file that was truncated or altered meanwhile is verified again, and fetched again, when it is opened.
            if opened.read(read.offsets, read.rows, out):
                return True
        raise DataError(f"shard {shards.shard_url(read.shard)} keeps changing while it is read")

    def _read_single(self, place: tuple[int, int, int, int], out: UInt8Array) -> None:
        """Read one sample, given as (set, shard, row of the batch, sample), from storage."""
        which, shard, row, sample = place
        shards, table, nbytes = self.sets[which], self.sample_tables[which], self.info.nbytes
        url, start = shards.shard_url(shard), int(table.offset[self.signal][sample])
        (key,) = table.keys(np.array([sample]))
        for attempt in range(2):
            try:
                data = storage.read_bytes(url, start, start + nbytes)
            except storage.NotFoundError:
                raise DataError(f"shard {url} is in the index but not in storage") from None
            if len(data) == nbytes and zlib.crc32(data) == table.check[self.signal][sample]:
                out[row] = np.frombuffer(data, np.uint8)
                return
            if attempt == 0:
                log.warning("shard %s disagrees with its index; reading sample %s again", url, key)
        raise DataError(f"shard {url} disagrees with its index in sample {key}, also when read again")


def _padded(positions: Int64Array, size: int) -> Int64Array:
    return np.concatenate([positions, np.zeros(size - len(positions), dtype=np.int64)])
