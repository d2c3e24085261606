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
    try:
        text = storage.read_bytes(file).decode("utf-8-sig")
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows, columns = list(table), list(table.fieldnames or ())
    except UnicodeDecodeError:
        raise UserError(f"labels={file} is not a UTF-8 text file") from None
    except csv.Error as error:
        raise UserError(f"labels={file} is not a CSV file: {error}") from None
    by = next((column for column in ("record", "file") if column in columns), None)
    if by is None:
        raise UserError(f"labels={file} has no column `record` or `file`; its columns: {', '.join(columns) or 'none'}")
    if person is not None and person not in columns:
        raise UserError(f"person={person}: {file} has no such column: {nearest(person, columns)}")
    if "simulated" in columns:
        raise UserError(f"labels={file}: `simulated` cannot be a label, it says which signals are made up; rename it")
    known = set(records)
    # A record may go by the last part of its name, as long as no other record ends alike.
    short: dict[str, str | None] = {}
    for record in records:
        last = record.rsplit("/", 1)[-1]
        short[last] = None if last in short else record
    labels: dict[str, dict[str, Any]] = {}
    people: dict[str, str] = {}
    for row in rows:
        name = _stem(row[by])
        found = name if name in known else short.get(name, "")
        if found is None:
            raise UserError(f"labels={file}: several records end in {name!r}; name them by their whole path")
        if not found:
            continue
        values = {k: label_value(v) for k, v in row.items() if k and k not in ("record", "file", person)}
        who = (row[person] or "").strip() if person is not None else ""
        if found in labels and (labels[found] != values or people.get(found, "") != who):
            raise UserError(f"labels={file}: two rows say different things about record {name!r}")
        labels[found] = values
        if who:
            people[found] = who
    if not labels:
        raise UserError(f"labels={file}: none of its {len(rows)} rows names one of the {len(records)} records")
    return labels, people


def _stem(text: str | None) -> str:
    """A record's name as a table gives it, without the endings of the files it lies in."""
    stem = (text or "").strip().removeprefix("./")
    for ending in (".hea", ".dat", ".mat", ".edf"):
        stem = stem.removesuffix(ending)
    return stem
