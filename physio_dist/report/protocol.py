"""Who was tested and how far that can be trusted; what others report of the same task."""

from __future__ import annotations

import math
from dataclasses import replace

from physio_dist.report.drawing import percent
from physio_dist.report.fusion_plots import metric
from physio_dist.report.parts import Cell, Section, Table
from physio_dist.report.rundata import printable
from physio_dist.report.sweepdata import Sweep

LEAKY, BY_CLIP = "leaky_window", "clip_disjoint"
_WARNING = "LEAKY SPLIT: windows of the same people and recordings trained and tested. "
BADGE = "The split is leaky: windows of the same recordings trained and tested. No figure here holds for anybody new."
_METRICS = {"auc": "ROC\u2011AUC", "f1": "F1", "macro_f1": "Macro F1"}


def in_words(sweep: Sweep) -> str:
    """How people were held out."""
    protocol, folds = sweep.word("protocol"), sweep.count("folds")
    number = "" if folds is None else f"{folds} "
    if protocol == "loso":
        return f"leave one person out, {number}folds" if number else "leave one person out"
    known = {
        "grouped_kfold": f"{number}folds of whole people; each person is held out once",
        "holdout": "one fixed group of people, held out from everything",
        BY_CLIP: f"{number}folds of whole clips; the same people train and are tested, with other clips",
        "person_and_clip": f"{number}folds of people and clips, neither of which trains; each window is tested once",
        LEAKY: f"{number}folds of single windows at random: LEAKY, the same people and recordings train and test",
    }
    return known.get(protocol, protocol or "not told")


def shares_people(sweep: Sweep) -> bool:
    """Whether somebody who is tested may also have trained."""
    return sweep.word("protocol") in (LEAKY, BY_CLIP)


def is_leaky(sweep: Sweep) -> bool:
    """Whether the windows were divided at random."""
    return sweep.word("protocol") == LEAKY


def labelled(section: Section) -> Section:
    """A section of a leaky sweep: every table and figure says so, wherever it may be copied to."""
    return replace(
        section,
        tables=[replace(table, caption=_WARNING + table.caption) for table in section.tables],
        figures=[replace(figure, caption=_WARNING + figure.caption) for figure in section.figures],
    )


def published(sweep: Sweep) -> Table | None:
    """What the paper reports, beside the fused row; None where results.json tells of none."""
    told = sweep.results.get("published")
    if not isinstance(told, dict) or not isinstance(value := told.get("value"), int | float):
        return None
    name, source = str(told.get("metric")), printable(str(told.get("source", "published")))
    mine = sweep.row("fused")
    ours = math.nan if mine is None else mine.scores["auc" if name == "auc" else "macro_f1"]
    rows = [
        [Cell(source), Cell(f"{metric(float(value))} ({percent(float(value))})")],
        [Cell("fused, this sweep"), Cell(metric(ours) + ("" if name == "auc" else " (mean over classes)"))],
    ]
    caption = f"As reported, not reproduced here. Unknown of it: {printable(str(told.get('unknown', '')))}."
    return Table(["Published", _METRICS.get(name, printable(name))], rows, caption)
