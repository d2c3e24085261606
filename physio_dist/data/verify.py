"""Verification of every shard against the index: hash, count, shape, offset and range."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from physio_dist import storage
from physio_dist.data.format import tar
from physio_dist.data.format.index import (
    ShardInfo,
    ShardSet,
    open_set,
)
from physio_dist.data.format.sample_table import SampleTable, read_sample_table
from physio_dist.errors import DataError
from physio_dist.runtime.arrays import BoolArray


def verify(url: str) -> Iterator[str]:
    """Faults of a shard set, one sentence each.

    Raises:
        UserError: there is no shard set.
        DataError: the index or the sample table themselves are damaged.
    """
    shards = open_set(url)
    table = read_sample_table(shards)
    starts = shards.shard_starts()
    present = storage.names(shards.data_url)
    for name in sorted({name for name in present if name.endswith(".tar")} - {s.url for s in shards.shards}):
        yield f"{name}: lies beside the shards but is not in the index"
    keys = table.keys(np.arange(shards.nsamples))
    for key in sorted(key for key, count in Counter(keys).items() if count > 1):
        yield f"key {key!r} stands in the set more than once"
    for number, info in enumerate(shards.shards):
        if info.url not in present:
            yield f"{info.url}: missing"
            continue
        data = storage.read_bytes(shards.shard_url(number))
        rows = slice(int(starts[number]), int(starts[number + 1]))
        intact = len(data) == info.filesize and hashlib.sha256(data).hexdigest() == info.sha256
        yield from _shard_faults(_Shard(shards, table, info, rows, data, intact), keys[rows])


@dataclass(frozen=True)
class _Shard:
    """A shard under verification: its bytes, and what index and table say of it.

    Attributes:
        shards, table: index and sample table of the set.
        info: what the index says of the shard.
        rows: its rows of the table.
        intact: whether its bytes have the hash of the index.
    """

    shards: ShardSet
    table: SampleTable
    info: ShardInfo
    rows: slice
    data: bytes
    intact: bool

    def fault(self, member: tar.Member, text: str) -> str:
        """A fault of one sample."""
        return f"{self.info.url}: sample {member.key}{text}"


def _shard_faults(shard: _Shard, keys: list[str]) -> Iterator[str]:
    info = shard.info
    if len(shard.data) != info.filesize:
        yield f"{info.url}: {len(shard.data)} bytes, the index says {info.filesize}"
    elif not shard.intact:
        yield f"{info.url}: its sha256 disagrees with the index"
    try:
        members = tar.scan(io.BytesIO(shard.data), info.url)
    except DataError as error:
        yield str(error)
        return
    if [member.key for member in members] != keys:
        yield f"{info.url}: holds {len(members)} samples, or other keys, than the {len(keys)} of the index"
        return
    for row, member in enumerate(members, shard.rows.start):
        yield from _facts_faults(shard, member)
        for name in shard.shards.signals:
            yield from _signal_faults(shard, member, name, row)


def _facts_faults(shard: _Shard, member: tar.Member) -> Iterator[str]:
    if member.facts is None:
        # Shards of others may do without; see index_existing().
        if shard.shards.made_by.get("reader") != "index":
            yield shard.fault(member, " has no json")
    elif bool(member.facts.get("simulated")) and not shard.shards.simulated:
        yield shard.fault(member, " is simulated, which the index does not say")


def _signal_faults(shard: _Shard, member: tar.Member, name: str, row: int) -> Iterator[str]:
    """Faults of one signal of the sample in a row of the table."""
    signal, table = shard.shards.signals[name], shard.table
    shape = (len(signal.channels), signal.samples)
    if member.shape.get(name) != shape or member.dtype.get(name) != np.int16:
        stored = f"{member.dtype[name]} {member.shape[name]}" if name in member.shape else "no such array"
        yield shard.fault(member, f": {name} is {stored} instead of int16 {shape}")
        return
    start = member.offset[name]
    if start != table.offset[name][row]:
        yield shard.fault(member, " stands elsewhere than the sample table says")
        return
    check = zlib.crc32(memoryview(shard.data)[start : start + signal.nbytes])
    if shard.intact and check != table.check[name][row]:
        yield shard.fault(member, f" {name} disagrees with its check in the sample table")
    flat, railed = dead_channels(shard.data, start, shape)
    valid = table.valid[name][row]
    for state, channels in (("constant", flat & valid), ("at the end of the range", railed & valid)):
        for channel in np.flatnonzero(channels):
            yield shard.fault(member, f" {name} lead {signal.channels[channel]} is {state} but marked valid")


def dead_channels(
    data: bytes, offset: int, shape: tuple[int, int]
) -> tuple[BoolArray, BoolArray]:  # fmt: skip
    """Channels without a signal, as two bool ``[channel]``: constant, and at the end of the range for half their time.

    Args:
        data: of a shard.
        offset: of the first value of an int16 array in it.
        shape: channels and samples of the array.
    """
    values = np.frombuffer(data, "<i2", shape[0] * shape[1], offset).reshape(shape)
    low, high = values.min(axis=1), values.max(axis=1)
    return low == high, np.mean((values <= -32767) | (values >= 32767), axis=1) > 0.5
