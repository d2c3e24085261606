"""Readers of raw formats, by name.

To add a reader, write a module with an object ``READER`` that has the attributes of :class:`Reader`, and enter it in
``_MODULES``. ``cpsc2018.py`` is a short example. :mod:`.folders` checks folders and record ids, and
:mod:`physio_dist.signals.montage` knows the names of leads and electrodes, so a reader passes on those of its file.

>>> class ExampleReader:
...     name = "example"
...     simulated = False
...
...     def records(self, source: str) -> list[str]:
...         folder = existing_folder(source, "example files (*.npy)")
...         return sorted(path.stem for path in folder.glob("*.npy"))
...
...     def read(self, source: str, record: str) -> Recording:
...         data = np.load(Path(source) / f"{inside(record)}.npy")  # float32 [channel, time] in microvolts
...         return Recording(record, {"ecg": Signal(data, 500.0, ECG_12)}, person=None, labels={})

A reader's module, and with it the format's library, is imported when its name is asked for and not before: a machine
that reads HDF5 needs no WFDB library.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from physio_dist.errors import UserError, nearest
from physio_dist.signals.recording import RecordError, Recording

# Name on the command line -> module of this package. A module is not called like the library that it imports.
_MODULES = {
    "code15": "code15",
    "cpsc2018": "cpsc2018",
    "dreamer": "dreamer",
    "edf": "edf_files",
    "simulate": "simulate",
    "wfdb": "wfdb_records",
}


class Reader(Protocol):
    """A format of raw recordings.

    Both methods are called in several processes, with the same source, and have to give the same results in each.
    """

    @property
    def name(self) -> str:
        """Name on the command line."""

    @property
    def simulated(self) -> bool:
        """True if the recordings are invented; shards, logs and reports made of them then say so."""

    def records(self, source: str) -> list[str]:
        """Sorted ids of all records in ``source``, the same on every call.

        Raises:
            UserError: the source does not exist, is empty or holds no record of this format.
        """

    def read(self, source: str, record: str) -> Recording:
        """Read one record, its signals in microvolts.

        Raises:
            RecordError: the record cannot be used. The message goes into ``rejects.jsonl`` and must not quote free text
                of the file, which may name a person.
        """


def names() -> list[str]:
    """Names of all readers."""
    return sorted(_MODULES)


def reader(name: str) -> Reader:
    """Import a reader.

    Raises:
        UserError: there is no such reader.
    """
    if name not in _MODULES:
        raise UserError(f"there is no reader {name!r}; {nearest(name, _MODULES)}")
    return cast(Reader, import_module(f"{__name__}.{_MODULES[name]}").READER)


def read_file(file: str) -> Recording:
    """Read one raw file: an EDF, or a WFDB record given by its header or any of its files.

    Raises:
        UserError: there is no such file, it is of another format, or it cannot be used.
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
        reason = (
            "it is no EDF file (*.edf), and no WFDB header (*.hea) is beside it" if path.exists() else "no such file"
        )
        raise UserError(f"{file}: {reason}")
    try:
        return reader(name).read(str(source), source.stem)
    except RecordError as error:
        raise UserError(f"{file}: {error}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
