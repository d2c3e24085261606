"""Labels and people that come from a CSV file rather than from the recordings."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from typing import Any

from physio_dist import storage
from physio_dist.errors import UserError, nearest


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
        rows = list(csv.DictReader(storage.read_bytes(file).decode("utf-8-sig").splitlines()))
    except UnicodeDecodeError:
        raise UserError(f"labels={file} is not a UTF-8 text file") from None
    columns = list(rows[0]) if rows else []
    by = next((column for column in ("record", "file") if column in columns), None)
    if by is None:
        raise UserError(f"labels={file} has no column `record` or `file`; its columns: {', '.join(columns) or 'none'}")
    if person is not None and person not in columns:
        raise UserError(f"person={person}: {file} has no such column: {nearest(person, columns)}")
    short = {record.rsplit("/", 1)[-1]: record for record in records}
    known = set(records)
    labels: dict[str, dict[str, Any]] = {}
    people: dict[str, str] = {}
    for row in rows:
        stem = row[by].strip()
        for ending in (".hea", ".dat", ".mat", ".edf"):
            stem = stem.removesuffix(ending)
        record = stem if stem in known else short.get(stem)
        if record is None:
            continue
        labels[record] = {k: _typed(v) for k, v in row.items() if k is not None and k not in (by, person)}
        if person is not None and row[person].strip():
            people[record] = row[person].strip()
    if not labels:
        raise UserError(f"labels={file}: none of its {len(rows)} rows names one of the {len(records)} records")
    return labels, people


def _typed(text: str | None) -> str | int | float | bool | None:
    text = (text or "").strip()
    if not text:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        # JSON has no word for NaN or infinity.
        return value if math.isfinite(value) else None
    return text
