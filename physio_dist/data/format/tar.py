"""One shard: a tar of ``{key}.ecg.npy`` / ``{key}.eeg.npy`` and ``{key}.json`` members.

Equal samples give equal bytes: times, owners and modes are fixed. Reading never unpickles: arrays are taken by their
``.npy`` header, and a header that asks for objects is refused.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

from physio_dist.errors import DataError
from physio_dist.runtime.arrays import Int16Array

BLOCK = 512

# For each signal of a sample: offset of its first value in the tar, and CRC-32 of its values.
Places = dict[str, tuple[int, int]]


@dataclass
class Sample:
    """A sample as it is written."""

    key: str
    signals: dict[str, Int16Array]
    facts: dict[str, Any]


@dataclass
class Member:
    """A sample as it is found in a tar: where each signal's values start, their dtype and shape, and its JSON."""

    key: str
    offset: dict[str, int] = field(default_factory=dict)
    shape: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtype: dict[str, np.dtype[Any]] = field(default_factory=dict)
    facts: dict[str, Any] | None = None


def write(samples: Iterable[Sample], out: BinaryIO) -> list[Places]:
    """Write a tar.

    Args:
        samples: with unique keys of at most 80 characters.
        out: a seekable file, positioned at 0.

    Returns:
        For each sample, for each signal, the offset of its first value in the tar and the check of its values.
    """
    placed: list[Places] = []
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            places: Places = {}
            for name in sorted(sample.signals):
                buffer = io.BytesIO()
                values = np.ascontiguousarray(sample.signals[name])
                np.lib.format.write_array(buffer, values, allow_pickle=False)
                data = buffer.getvalue()
                places[name] = out.tell() + BLOCK + len(data) - values.nbytes, zlib.crc32(values.data)
                _add(tar, f"{sample.key}.{name}.npy", data)
            facts = json.dumps(sample.facts, sort_keys=True, ensure_ascii=True, allow_nan=False).encode()
            _add(tar, f"{sample.key}.json", facts)
            placed.append(places)
    return placed


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o444
    tar.addfile(info, io.BytesIO(data))


def scan(data: BinaryIO, name: str) -> list[Member]:
    """Read the structure of a tar: every sample's members, in order.

    Args:
        data: a seekable file.
        name: of the shard, for messages.

    Raises:
        DataError: truncated, unsafe member names, a member that is no plain array, a repeated key.
    """
    members: dict[str, Member] = {}
    size = data.seek(0, io.SEEK_END)
    data.seek(0)
    try:
        with tarfile.open(fileobj=data, mode="r:") as tar:
            for info in tar:
                if info.name.startswith("/") or ".." in info.name.split("/") or not (info.isfile() or info.isdir()):
                    raise DataError(f"{name}: member {info.name!r} is not a plain file with a plain name")
                if info.isdir():
                    continue
                if info.issparse() or info.offset_data + info.size > size:
                    raise DataError(f"{name}: truncated in member {info.name!r}")
                key, _, ending = info.name.removeprefix("./").partition(".")
                member = members.setdefault(key, Member(key))
                if ending == "json":
                    _once(member.facts is None, name, info.name)
                    member.facts = _facts(data, info, name)
                elif ending.endswith("npy"):
                    signal = ending.removesuffix("npy").rstrip(".") or "npy"
                    _once(signal not in member.offset, name, info.name)
                    shape, dtype, offset = _array(data, info, name)
                    member.shape[signal], member.dtype[signal], member.offset[signal] = shape, dtype, offset
            if tar.offset + BLOCK > size:
                raise DataError(f"{name}: truncated: it has no end mark")
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{name}: not a whole tar: {error}") from None
    return list(members.values())


def _once(first: bool, shard: str, member: str) -> None:
    if not first:
        raise DataError(f"{shard}: member {member!r} stands in it twice")


def _facts(data: BinaryIO, info: tarfile.TarInfo, shard: str) -> dict[str, Any]:
    data.seek(info.offset_data)
    try:
        facts = json.loads(data.read(info.size))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{shard}: member {info.name!r} is not JSON: {error}") from None
    if not isinstance(facts, dict):
        raise DataError(f"{shard}: member {info.name!r} is not a JSON object")
    return facts


def _array(data: BinaryIO, info: tarfile.TarInfo, shard: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    data.seek(info.offset_data)
    head = io.BytesIO(data.read(min(info.size, 4096)))
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head)
    except Exception as error:  # the header is parsed as Python, which can fail in many ways
        raise DataError(f"{shard}: member {info.name!r} is not a NumPy array: {type(error).__name__}") from None
    if dtype.hasobject:
        raise DataError(f"{shard}: member {info.name!r} holds pickled objects, which are never opened")
    if fortran and len(shape) > 1:
        raise DataError(f"{shard}: member {info.name!r} is stored column by column; store it row by row")
    if head.tell() + math.prod(shape) * dtype.itemsize != info.size:
        raise DataError(f"{shard}: member {info.name!r} has {info.size} bytes, its header promises another size")
    return tuple(shape), dtype, info.offset_data + head.tell()
