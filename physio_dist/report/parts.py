"""What a section of the page is made of; the template draws these and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field

from physio_dist.report.drawing import Image


@dataclass(frozen=True)
class Figure:
    """One or more drawings under one caption; ``wide`` ones take the whole column, others stand side by side."""

    images: list[Image]
    caption: str
    wide: bool = False
    title: str = ""


@dataclass(frozen=True)
class Cell:
    """A table cell; ``bar`` (0..1) draws a bar of that share beside the text, ``warn`` marks a bad value.

    ``more`` stands small below the text.
    """

    text: str
    bar: float | None = None
    colour: str = ""
    warn: bool = False
    more: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a head; ``numeric`` right-aligns all columns but the first."""

    head: list[str]
    rows: list[list[Cell]]
    caption: str = ""
    numeric: bool = True


@dataclass(frozen=True)
class Section:
    """A part of the page on its own. ``missing`` says in one line what the run lacks for it, and replaces the rest."""

    title: str
    anchor: str
    missing: str = ""
    text: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fact:
    """One entry of the summary: what it is, its value, and what puts the value into proportion."""

    label: str
    value: str
    more: str = ""
