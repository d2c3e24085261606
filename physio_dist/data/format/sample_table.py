"""The sample table of a shard set: facts of every sample, in a safetensors file beside the index.

Training needs of every sample its member offset, validity, split, person and key. Parsing a JSON per sample would cost
more than reading the signals.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from physio_dist import storage
from physio_dist.data.format.index import INDEX, SAMPLE_TABLE, SPLITS, ShardSet
from physio_dist.errors import DataError
from physio_dist.runtime.arrays import BoolArray, Int64Array, UInt8Array, UInt32Array, UInt64Array


@dataclass(frozen=True)
class SampleTable:
    """Facts of every sample, in storage order (shard after shard).

    Attributes:
        offset: for each signal int64 ``[sample]``, offset of its first value in the tar.
        check: for each signal uint32 ``[sample]``, CRC-32 of its values, for samples that are read singly.
        valid: for each signal bool ``[sample, channel]``.
        split: uint8 ``[sample]``, position in ``SPLITS``.
        person: uint64 ``[sample]``, pseudonym.
        waveform: uint64 ``[sample]``, hash of the recording's waveform; 0 where unknown.
        key: ASCII keys, zero-padded uint8 ``[sample, longest]``.
    """

    offset: dict[str, Int64Array]
    check: dict[str, UInt32Array]
    valid: dict[str, BoolArray]
    split: UInt8Array
    person: UInt64Array
    waveform: UInt64Array
    key: UInt8Array

    def keys(self, samples: Int64Array) -> list[str]:
        """Keys of the given samples."""
        return [row.tobytes().rstrip(b"\0").decode("ascii") for row in self.key[samples]]

    def to_bytes(self) -> bytes:
        """The sample table file."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "split": self.split, "person": self.person, "waveform": self.waveform, "key": self.key,
        }  # fmt: skip
        for signal, values in self.offset.items():
            tensors[f"offset.{signal}"] = values
        for signal, checks in self.check.items():
            tensors[f"check.{signal}"] = checks
        for signal, flags in self.valid.items():
            tensors[f"valid.{signal}"] = flags
        return save_safetensors({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})

    @staticmethod
    def from_bytes(data: bytes | bytearray, name: str) -> SampleTable:
        """Parse a sample table file.

        Raises:
            DataError: it is damaged.
        """
        try:
            tensors = load_safetensors(bytes(data))
            return SampleTable(
                offset={k.removeprefix("offset."): v for k, v in tensors.items() if k.startswith("offset.")},
                check={k.removeprefix("check."): v for k, v in tensors.items() if k.startswith("check.")},
                valid={k.removeprefix("valid."): v for k, v in tensors.items() if k.startswith("valid.")},
                split=tensors["split"], person=tensors["person"], waveform=tensors["waveform"], key=tensors["key"],
            )  # fmt: skip
        except (SafetensorError, KeyError, TypeError) as error:
            raise DataError(f"{name} is damaged: {error}") from None


def key_table(keys: Sequence[str]) -> UInt8Array:
    """Keys as zero-padded uint8 ``[sample, longest]``."""
    width = max((len(key) for key in keys), default=1)
    packed = b"".join(key.encode("ascii").ljust(width, b"\0") for key in keys)
    return np.frombuffer(packed, dtype=np.uint8).reshape(len(keys), width).copy()


def read_sample_table(shards: ShardSet, read: Callable[[str], bytes | bytearray] = storage.read_bytes) -> SampleTable:
    """Read and check the sample table of a set.

    Args:
        shards: the set.
        read: gives the bytes at a URL.

    Raises:
        DataError: it is not there, or disagrees with the index.
    """
    where = storage.join(shards.url, SAMPLE_TABLE)
    try:
        data = read(where)
    except storage.NotFoundError:
        raise DataError(f"{where} is missing; make the set again or fetch it again") from None
    if hashlib.sha256(data).hexdigest() != shards.sample_table_sha256:
        raise DataError(f"{where} disagrees with the index (sha256); make the set again or fetch it again")
    table = SampleTable.from_bytes(data, where)
    if wrong := _contradictions(shards, table):
        raise DataError(f"{where} contradicts the index: {', '.join(wrong)}")
    return table


def _contradictions(shards: ShardSet, table: SampleTable) -> list[str]:
    """Fields of a sample table that contradict its index: a fitting hash does not show that its writer was right."""
    n, ends = shards.nsamples, np.repeat([s.filesize for s in shards.shards], [s.nsamples for s in shards.shards])
    expected: dict[str, tuple[npt.NDArray[Any] | None, str, tuple[int, ...]]] = {
        "split": (table.split, "uint8", (n,)),
        "person": (table.person, "uint64", (n,)),
        "waveform": (table.waveform, "uint64", (n,)),
    }
    for name, info in shards.signals.items():
        expected[f"offset.{name}"] = (table.offset.get(name), "int64", (n,))
        expected[f"check.{name}"] = (table.check.get(name), "uint32", (n,))
        expected[f"valid.{name}"] = (table.valid.get(name), "bool", (n, len(info.channels)))
    wrong = [
        name
        for name, (values, dtype, shape) in expected.items()
        if values is None or values.dtype != dtype or values.shape != shape
    ]
    if table.key.dtype != np.uint8 or table.key.ndim != 2 or len(table.key) != n:
        wrong.append("key")
    if wrong:
        return wrong
    counts = np.bincount(table.split, minlength=len(SPLITS)).tolist()
    if counts != [shards.splits.get(name) for name in SPLITS]:
        wrong.append("splits")
    if len(np.unique(table.person)) != shards.people:
        wrong.append("people")
    for name, info in shards.signals.items():
        offset = table.offset[name]
        outside = np.flatnonzero((offset < 0) | (offset + info.nbytes > ends))
        if len(outside):
            shard = int(np.searchsorted(shards.shard_starts(), outside[0], side="right")) - 1
            key = table.keys(outside[:1])[0]
            wrong.append(f"offset.{name} (sample {key} does not lie within {shards.shards[shard].url})")
    return wrong


def publish(shards: ShardSet, table: SampleTable) -> None:
    """Write the sample table, then the index: a set without an index is not there yet."""
    storage.write_bytes(storage.join(shards.url, SAMPLE_TABLE), table.to_bytes())
    storage.write_json(storage.join(shards.url, INDEX), shards.to_json())
