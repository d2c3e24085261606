"""Labels and people that come from a CSV file rather than from the recordings."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from physio_dist import storage
from physio_dist.errors import UserError, nearest
from physio_dist.signals.recording import label_value


def read_labels(
    file: str, person: str | None, records: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Join a CSV to records by its column ``record`` or ``file``.

    Returns:
        Labels of each record, and the person of each record where the column ``person`` is given.

    Raises:
        UserError: no such file or column, or no row that names one of the records.
    """
    rows, columns = _read_csv(file)
    by = next((column for column in ("record", "file") if column in columns), None)
    if by is None:
        raise UserError(f"labels={file} has no column `record` or `file`; its columns: {', '.join(columns) or 'none'}")
    if person is not None and person not in columns:
        raise UserError(f"person={person}: {file} has no such column: {nearest(person, columns)}")
    if "simulated" in columns:
        raise UserError(f"labels={file}: `simulated` cannot be a label, it says which signals are made up; rename it")
    by_name = _by_name(records)
    labels: dict[str, dict[str, Any]] = {}
    people: dict[str, str] = {}
    for row in rows:
        name = _stem(row[by])
        record = by_name.get(name, "")
        if record is None:
            raise UserError(f"labels={file}: several records end in {name!r}; name them by their whole path")
        if not record:
            continue
        values = {k: label_value(v) for k, v in row.items() if k and k not in ("record", "file", person)}
        person_id = (row[person] or "").strip() if person is not None else ""
        if record in labels and (labels[record] != values or people.get(record, "") != person_id):
            raise UserError(f"labels={file}: two rows say different things about record {name!r}")
        labels[record] = values
        if person_id:
            people[record] = person_id
    if not labels:
        raise UserError(f"labels={file}: none of its {len(rows)} rows names one of the {len(records)} records")
    return labels, people


def _read_csv(file: str) -> tuple[list[dict[str, str | None]], list[str]]:
    """The rows and the columns of a table."""
    try:
        text = storage.read_bytes(file).decode("utf-8-sig")
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return list(table), list(table.fieldnames or ())
    except UnicodeDecodeError:
        raise UserError(f"labels={file} is not a UTF-8 text file") from None
    except csv.Error as error:
        raise UserError(f"labels={file} is not a CSV file: {error}") from None


def _by_name(records: Sequence[str]) -> dict[str, str | None]:
    """Records by their name, and by its last part; None where several records end alike."""
    by_name: dict[str, str | None] = {}
    for record in records:
        last = record.rsplit("/", 1)[-1]
        by_name[last] = None if last in by_name else record
    return by_name | {record: record for record in records}


def _stem(text: str | None) -> str:
    """A record's name in a table, without file extensions."""
    stem = (text or "").strip().removeprefix("./")
    for ending in (".hea", ".dat", ".mat", ".edf"):
        stem = stem.removesuffix(ending)
    return stem
