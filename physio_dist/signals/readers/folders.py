"""Checks shared by the readers of folders, with errors that say what was expected."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path, PurePosixPath

from physio_dist.errors import UserError
from physio_dist.signals.recording import RecordError

_LOOKED_AT = 10_000


def existing_folder(source: str, wanted: str) -> Path:
    """``source`` as a path to a folder.

    Raises:
        UserError: it does not exist, is no folder, or is empty; ``wanted`` says what a good folder holds.
    """
    if "://" in source:
        raise UserError(f"{source}: raw recordings are read from a local folder; copy them there first")
    folder = Path(source)
    if not folder.exists():
        raise UserError(f"{source}: no such folder; expected {wanted}")
    if not folder.is_dir():
        raise UserError(f"{source}: not a folder; expected {wanted}")
    if next(folder.iterdir(), None) is None:
        raise UserError(f"{source}: the folder is empty; expected {wanted}")
    return folder


def nothing_found(folder: Path, wanted: str, hint: str = "") -> UserError:
    """The error for a folder without records: what was looked for, and what is there instead."""
    seen = Counter(
        path.suffix or "files without extension"
        for path in itertools.islice(folder.rglob("*"), _LOOKED_AT)
        if path.is_file()
    )
    contents = ", ".join(f"{count} {suffix}" for suffix, count in seen.most_common(5)) or "no file at all"
    return UserError(f"{folder}: no records found; looked for {wanted}; there is {contents}{hint}")


def inside(record: str) -> PurePosixPath:
    """``record`` as a path relative to its source.

    Raises:
        RecordError: the id is absolute or climbs out of the source's folder; ids come from files that others wrote.
    """
    path = PurePosixPath(record)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in record or "\0" in record:
        raise RecordError("the record id leads out of the source folder")
    return path
