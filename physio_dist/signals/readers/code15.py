"""CODE-15%: HDF5 parts of tracings and a table of exams (Ribeiro et al., Zenodo 4916206).

Each part holds ``exam_id`` ``[N]`` and ``tracings`` ``[N, 4096, 12]`` in millivolts at 400 Hz, leads DI DII DIII AVR
AVL AVF V1-V6; tracings of about seven seconds are centred in zeros and the last row is all zero under exam 0.
``exams.csv`` is in another order, so exam_id alone says which row belongs to which tracing.
"""

from __future__ import annotations

import csv
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from physio_dist.errors import UserError
from physio_dist.runtime.arrays import Float32Array
from physio_dist.signals.readers.folders import existing_folder, inside, nothing_found
from physio_dist.signals.recording import RecordError, Recording, Signal

_WANTED = "CODE-15% parts (*.hdf5) and their table (exams*.csv)"
_RATE = 400.0
_LEADS = ("DI", "DII", "DIII", "AVR", "AVL", "AVF", "V1", "V2", "V3", "V4", "V5", "V6")
_DIAGNOSES = ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF")


class _Exam(NamedTuple):
    person: str
    age: int | None
    sex: str | None
    diagnoses: tuple[bool, ...]


class Code15Reader:
    """A folder with CODE-15% parts and table; see `Reader`. A record id is ``<part>/<exam_id>``."""

    name = "code15"
    simulated = False

    def records(self, source: str) -> list[str]:
        """All exams of all parts, sorted; the padding row under exam 0 is no exam. See `Reader.records`."""
        folder = existing_folder(source, _WANTED)
        parts = sorted(folder.glob("*.hdf5"))
        if not parts:
            raise nothing_found(folder, _WANTED)
        _exams(source, os.getpid())
        found = {f"{part.stem}/{exam}" for part in parts for exam in _part(str(part), os.getpid())[1]}
        if not found:
            raise UserError(f"{folder}: its HDF5 parts hold no exam but number 0, the padding")
        return sorted(found)

    def read(self, source: str, record: str) -> Recording:
        """One exam in microvolts without its padding; see `Reader.read`.

        Labels: the corpus's six diagnoses as bools under its own names, ``age``, ``sex`` ("F", "M").
        """
        relative = inside(record)
        path = Path(source) / f"{relative.parent}.hdf5"
        if not path.is_file() or not relative.name.isdigit():
            raise RecordError("the record id is not <part>/<exam_id> of a part that is there")
        try:
            tracings, rows = _part(str(path), os.getpid())
            exams = _exams(source, os.getpid())
        except UserError as error:
            raise RecordError(str(error)) from error
        exam_id = int(relative.name)
        if exam_id not in rows:
            raise RecordError("the part has no such exam")
        if rows[exam_id] < 0:
            raise RecordError("the part holds this exam more than once")
        exam = exams.get(exam_id)
        if exam is None:
            # Without its row the person is unknown, and a split by person would be guesswork.
            raise RecordError("the table of exams has no row, or contradicting rows, for this exam")
        try:
            tracing = np.asarray(tracings[rows[exam_id]], np.float32)
        except OSError as error:
            raise RecordError(f"the tracing cannot be read ({type(error).__name__})") from error
        labels: dict[str, Any] = dict(zip(_DIAGNOSES, exam.diagnoses, strict=True))
        labels.update(age=exam.age, sex=exam.sex)
        signal = Signal(np.ascontiguousarray(strip_padding(tracing).T) * np.float32(1e3), _RATE, _LEADS)
        return Recording(record, {"ecg": signal}, exam.person, labels)


def strip_padding(tracing: Float32Array) -> Float32Array:
    """``[time, lead]`` without the zeros that it is centred in.

    The same number of samples is taken from both ends, the smaller of the two runs of zeros: a tracing that happens
    to begin or end at zero keeps those samples.

    Raises:
        RecordError: all samples are zero.
    """
    used = np.flatnonzero((tracing != 0).any(axis=1))
    if not used.size:
        raise RecordError("the tracing is all zero")
    pad = int(min(used[0], len(tracing) - 1 - used[-1]))
    return tracing[pad : len(tracing) - pad]


# Both caches are keyed by process, because an HDF5 handle that a fork inherited must not be used.
@lru_cache(maxsize=32)
def _part(path: str, pid: int) -> tuple[Any, dict[int, int]]:
    """The tracings of a part, still on disk, and the row of each exam (-1 where it has several)."""
    try:
        file = h5py.File(path, "r")
        ids, tracings = np.asarray(file["exam_id"]).reshape(-1), file["tracings"]
    except (OSError, KeyError) as error:
        raise UserError(f"{path}: not a whole CODE-15% part ({type(error).__name__}); download it again") from error
    if tracings.ndim != 3 or tracings.shape[0] != len(ids) or tracings.shape[2] != len(_LEADS):
        raise UserError(f"{path}: tracings of shape {tracings.shape} do not fit {len(ids)} exams of 12 leads")
    rows: dict[int, int] = {}
    for row, exam in enumerate(ids.tolist()):
        if exam != 0:
            rows[exam] = -1 if exam in rows else row
    return tracings, rows


@lru_cache(maxsize=4)
def _exams(source: str, pid: int) -> dict[int, _Exam | None]:
    """exam_id -> exam over all tables of the folder; None where two rows of an exam contradict each other."""
    tables = sorted(Path(source).glob("exams*.csv"))
    if not tables:
        raise UserError(f"{source}: there are HDF5 parts but no exams*.csv, so nobody knows whose they are")
    exams: dict[int, _Exam | None] = {}
    for table in tables:
        with table.open(newline="", encoding="utf-8") as lines:
            rows = csv.DictReader(lines)
            lacking = {"exam_id", "patient_id", "age", "is_male", *_DIAGNOSES} - set(rows.fieldnames or ())
            if lacking:
                raise UserError(f"{table}: column {', '.join(sorted(lacking))} is missing")
            for row in rows:
                try:
                    exam_id, exam = int(row["exam_id"]), _exam(row)
                except (ValueError, TypeError, AttributeError):
                    raise UserError(f"{table}, line {rows.line_num}: not a row of this table") from None
                exams[exam_id] = exam if exams.get(exam_id, exam) == exam else None
    return exams


def _exam(row: dict[str, str]) -> _Exam:
    age = int(float(row["age"])) if row["age"] else None
    sex = {"true": "M", "1": "M", "false": "F", "0": "F"}.get(row["is_male"].lower())
    diagnoses = tuple(row[name].lower() in {"true", "1"} for name in _DIAGNOSES)
    return _Exam(str(int(row["patient_id"])), age, sex, diagnoses)


READER = Code15Reader()
