"""Readers of raw formats, by name.

A reader's module, and with it the format's library, is imported when its name is asked for and not before: a machine
that reads HDF5 needs no WFDB library.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from physio_dist.errors import UserError, nearest
from physio_dist.signals.recording import RecordError, Recording

# A module is never called like the library that it uses (house rule 6), hence `wfdb_records`.
_MODULES = {
    "code15": "code15",
    "cpsc2018": "cpsc2018",
    "dreamer": "dreamer",
    "edf": "edf_files",
    "simulate": "simulate",
    "wfdb": "wfdb_records",
}


class Reader(Protocol):
    """What conversion asks of a format."""

    @property
    def name(self) -> str:
        """The name on the command line."""

    @property
    def simulated(self) -> bool:
        """Whether its recordings are invented; whatever is made of them has to say so."""

    def records(self, source: str) -> list[str]:
        """The ids of all records in ``source``, sorted, the same on every call.

        Raises:
            UserError: the source does not exist, is empty or holds no record of this format.
        """

    def read(self, source: str, record: str) -> Recording:
        """One record.

        Raises:
            RecordError: with the reason why this record cannot be used.
        """


def names() -> list[str]:
    """The names of all readers."""
    return sorted(_MODULES)


def reader(name: str) -> Reader:
    """The reader of that name.

    Raises:
        UserError: there is no such reader.
    """
    if name not in _MODULES:
        raise UserError(f"there is no reader {name!r}; {nearest(name, _MODULES)}")
    return cast(Reader, import_module(f"{__name__}.{_MODULES[name]}").READER)


def read_file(file: str) -> Recording:
    """The recording in one raw file, an EDF or a WFDB record, which its header or any of its files names.

    Raises:
        UserError: there is no such file, it is of another format, or it cannot be used; the reason.
    """
    if "://" in file:
        raise UserError(f"{file}: raw recordings are read from the local disk; copy it there first")
    path = Path(file)
    header = next((p for p in (path.with_suffix(".hea"), Path(f"{file}.hea")) if p.is_file()), None)
    if path.suffix.lower() == ".edf":
        name, source = "edf", path
    elif header is not None:
        name, source = "wfdb", header
    else:
        what = "it is no EDF file (*.edf), and no WFDB header (*.hea) is beside it" if path.exists() else "no such file"
        raise UserError(f"{file}: {what}")
    try:
        return reader(name).read(str(source), source.stem)
    except RecordError as error:
        raise UserError(f"{file}: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
