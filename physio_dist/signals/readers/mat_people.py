"""``.mat`` files that hold one cell a person, read a person at a time.

DREAMER's is 430 MB, which is 2 GB of numbers. SciPy reads a variable of a version 5 file whole, and has no way into it;
what is needed of the format here is where the cells of a struct's field begin, each of which SciPy then reads. Version
7.3 is HDF5, where everything is found by reference.

Format: MathWorks, "MAT-File Format" (version 5); a variable is a matrix element that is deflated as a whole, within it
every element has a tag of 8 bytes and is padded to a multiple of 8.
"""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

_HEADER = 128
_DEFLATED, _MATRIX = 15, 14
_CELL, _STRUCT = 1, 2
_STEP = 1 << 20
# A name of one letter in the place of none: SciPy takes a variable without a name for something else.
_NAMED = {"<": b"\x01\x00\x01\x00x\0\0\0", ">": b"\x00\x01\x00\x01x\0\0\0"}


class NotSuchError(Exception):
    """The file is not of this kind, or not whole; ``str(error)`` says in what way."""


def people(path: Path, variable: str, field: str) -> Iterator[tuple[str, Any]]:
    """Every field of the struct ``variable``, the cells of ``field`` one by one as they are asked for.

    Args:
        path: a ``.mat`` file of version 5 (or 6, 7) or 7.3.
        variable: its struct.
        field: of the struct, an array of cells.

    Yields:
        Name and content: of structs a dict, of cells a list in MATLAB's order, of text a str, of numbers an array.

    Raises:
        NotSuchError: the file holds something else, or ends too early.
    """
    with path.open("rb") as file:
        head = file.read(_HEADER)
        if h5py.is_hdf5(path):
            yield from _version73(path, variable, field)
        elif len(head) < _HEADER or head[126:128] not in (b"IM", b"MI"):
            raise NotSuchError("it is no MATLAB file of version 5 or 7.3")
        else:
            yield from _version5(file, head, variable, field)


def _version73(path: Path, variable: str, field: str) -> Iterator[tuple[str, Any]]:
    try:
        with h5py.File(path, "r") as file:
            top = file.get(variable)
            if not isinstance(top, h5py.Group):
                there = ", ".join(sorted(name for name in file if not name.startswith("#"))[:5])
                raise NotSuchError(f"it has no struct {variable}, only {there or 'nothing'}")
            for name, item in top.items():
                if name != field:
                    yield name, _of_hdf5(file, item)
                elif not _refers(item):
                    if _of_hdf5(file, item) == []:
                        continue
                    raise NotSuchError(f"{variable}.{field} is no array of cells")
                else:
                    # HDF5 has MATLAB's dimensions in reverse, so that its rows are MATLAB's columns.
                    yield from ((name, _of_hdf5(file, file[one])) for one in item[()].ravel())
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise NotSuchError(f"it cannot be read as MATLAB 7.3 ({type(error).__name__}: {error})") from error


def _refers(item: Any) -> bool:
    return isinstance(item, h5py.Dataset) and h5py.check_ref_dtype(item.dtype) is not None


def _of_hdf5(file: Any, item: Any) -> Any:
    if isinstance(item, h5py.Group):
        return {name: _of_hdf5(file, one) for name, one in item.items()}
    if item.attrs.get("MATLAB_empty"):
        return [] if item.attrs.get("MATLAB_class") == b"cell" else np.zeros(tuple(item[()].tolist()))
    if _refers(item):
        return [_of_hdf5(file, file[one]) for one in item[()].ravel()]
    if item.attrs.get("MATLAB_class") == b"char":
        return "".join(map(chr, item[()].ravel().tolist()))
    return np.asarray(item[()]).T


def _version5(file: BinaryIO, head: bytes, variable: str, field: str) -> Iterator[tuple[str, Any]]:
    order = "<" if head[126:128] == b"IM" else ">"
    seen = []
    while tag := file.read(8):
        if len(tag) < 8:
            raise NotSuchError("it ends in the middle of a variable")
        kind, size = struct.unpack(f"{order}II", tag)
        after = file.tell() + size
        inside = _Elements(io.BufferedReader(_Inflated(file)) if kind == _DEFLATED else file, order)
        if kind == _DEFLATED:
            kind, _ = inside.tag()
        if kind == _MATRIX:
            shape, name = inside.matrix()
            if name == variable:
                if shape[0] != _STRUCT or shape[1] != 1:
                    raise NotSuchError(f"{variable} is no single struct")
                yield from _fields(inside, head, order, variable, field)
                return
            seen.append(name)
        file.seek(after)
    raise NotSuchError(f"it has no struct {variable}, only {', '.join(filter(None, seen[:5])) or 'nothing'}")


def _fields(inside: _Elements, head: bytes, order: str, variable: str, field: str) -> Iterator[tuple[str, Any]]:
    (width,) = struct.unpack(f"{order}i", inside.element()[:4])
    names = inside.element()
    for start in range(0, len(names), max(width, 1)):
        name = names[start : start + width].split(b"\0")[0].decode("latin-1")
        _, size = inside.tag()
        if name != field:
            yield name, _of_scipy(inside.take(size), head, order)
            continue
        (kind, count), _ = inside.matrix() if size else ((_CELL, 0), "")
        if kind != _CELL:
            raise NotSuchError(f"{variable}.{field} is no array of cells")
        for _ in range(count):
            yield name, _of_scipy(inside.take(inside.tag()[1]), head, order)


class _Elements:
    """The elements of a version 5 file one after the other."""

    def __init__(self, stream: BinaryIO | io.BufferedReader, order: str) -> None:
        self._stream, self._order = stream, order

    def take(self, size: int) -> bytes:
        """The next bytes, of which there have to be so many."""
        data = self._stream.read(size)
        if len(data) < size:
            raise NotSuchError("it ends in the middle of a variable")
        return data

    def tag(self) -> tuple[int, int]:
        """Type and size of the element that comes next; its content follows."""
        kind, size = struct.unpack(f"{self._order}II", self.take(8))
        return kind, size

    def element(self) -> bytes:
        """The content of a small element; up to 4 bytes stand within the tag."""
        head = self.take(8)
        kind, size = struct.unpack(f"{self._order}II", head)
        if kind >> 16:
            return head[4 : 4 + (kind >> 16)]
        return self.take(size + -size % 8)[:size]

    def matrix(self) -> tuple[tuple[int, int], str]:
        """Class and number of cells of a matrix, and its name; what it holds follows."""
        flags, dims, name = self.element(), self.element(), self.element()
        (word,) = struct.unpack(f"{self._order}I", flags[:4])
        sides = struct.unpack(f"{self._order}{len(dims) // 4}i", dims)
        return (word & 0xFF, int(np.prod(sides))), name.decode("latin-1")


class _Inflated(io.RawIOBase):
    """Content of a deflated part of a file, from the file's position on."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._zip, self._rest = file, zlib.decompressobj(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._zip.eof:
            given = self._rest or self._file.read(_STEP)
            try:
                data = self._zip.decompress(given, len(buffer))
            except zlib.error as error:
                raise NotSuchError(f"it is damaged ({error})") from error
            self._rest = self._zip.unconsumed_tail
            buffer[: len(data)] = data
            if data or not given:
                return len(data)
        return 0


def _of_scipy(body: bytes, head: bytes, order: str) -> Any:
    """A matrix element, given without its tag, as SciPy reads it."""
    if not body:
        return np.zeros((0, 0))
    # Flags take 16 bytes, dimensions 8 and 4 a side; then comes the name, which within a struct or cells is empty.
    (sides,) = struct.unpack(f"{order}I", body[20:24])
    at = 24 + sides + -sides % 8
    made = io.BytesIO()
    made.write(head[:116] + b" " * 8 + head[124:] + struct.pack(f"{order}II", _MATRIX, len(body)))
    made.write(memoryview(body)[:at])
    made.write(_NAMED[order])
    made.write(memoryview(body)[at + 8 :])
    made.seek(0)
    try:
        return _plain(loadmat(made, variable_names=["x"])["x"])
    except (MatReadError, KeyError, ValueError, TypeError, OSError, NotImplementedError) as error:
        raise NotSuchError(f"a part of it cannot be read ({type(error).__name__}: {error})") from error


def _plain(value: Any) -> Any:
    if value.dtype.names:
        if value.size != 1:
            raise NotSuchError(f"a struct array of {value.size} where one struct was expected")
        return {name: _plain(value[name].flat[0]) for name in value.dtype.names}
    if value.dtype == object:
        return [_plain(one) for one in value.ravel(order="F")]
    if value.dtype.kind == "U":
        return "".join(itertools.chain(value.ravel().tolist()))
    return value
