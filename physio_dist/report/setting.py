"""What a run was given: the shard sets it read and its options. Sections that every kind of page has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from physio_dist.report.parts import Cell, Section, Table
from physio_dist.report.rundata import Given, without_credentials


def dataset(run: Given) -> Section:
    """The shard sets the run read."""
    if not run.indexes:
        return Section("Data", "data", missing="The run holds no data.json, so its data set is not described.")
    tables = []
    for index in run.indexes:
        rows = [
            ("Index", without_credentials(plain(index.get("url")))),
            ("Fingerprint", index.get("fingerprint")),
        ]
        splits = index.get("splits")
        if isinstance(splits, dict):
            rows.append(("Windows", ", ".join(f"{name} {plain(count)}" for name, count in splits.items())))
        rows += [("People", index.get("people")), ("Rate", _with(index.get("rate"), "Hz"))]
        # Of a paired set by signal, where it tells.
        rows += [("Channels", index.get("signals") or index.get("channels")), ("Sources", index.get("sources"))]
        if (flag := index.get("simulated")) is not None:
            rows.append(("Signals", "SIMULATED" if flag else "recorded"))
        shown = [[Cell(label), Cell(plain(value))] for label, value in rows if value not in (None, "", [])]
        tables.append(Table([], shown, numeric=False))
    return Section("Data", "data", tables=tables)


def configuration(run: Given, options: Sequence[str]) -> Section:
    """The ``options`` a reader asks for first, and the whole resolved file folded away."""
    if run.config_text is None:
        return Section("Configuration", "configuration", missing="The run holds no config.yaml.")
    rows = [[Cell(path), Cell(plain(run.option(path)))] for path in options if run.option(path) is not None]
    tables = [Table([], rows, numeric=False)] if rows else []
    details = [("config.yaml, everything resolved", run.config_text)]
    return Section("Configuration", "configuration", tables=tables, details=details)


def plain(value: Any) -> str:
    """A JSON value as a person writes it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return ", ".join(plain(entry) for entry in value)
    if isinstance(value, dict):
        return "; ".join(f"{name}: {plain(entry)}" for name, entry in value.items())
    return str(value)


def _with(value: Any, unit: str) -> str | None:
    return None if value is None else f"{plain(value)} {unit}"
