"""Summary of a sweep's page, and its protocol in words."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from physio_dist.report import components as ui
from physio_dist.report.sweep_data import Sweep
from physio_dist.report.sweep_plots import label_of
from physio_dist.runs.sweep_results import ResultRow
from physio_dist.stats.bootstrap import Difference

CHANCE = 0.5
# Permuted labels with a p value below this level point to a leak.
LEAK_P = 0.001
LEAKY, BY_CLIP = "leaky_window", "clip_disjoint"
_WARNING = "LEAKY SPLIT: windows of the same people and recordings trained and tested. "
LEAKY_BADGE = (
    "The split is leaky: windows of the same recordings trained and tested. No figure here holds for anybody new."
)
_METRICS = {"auc": "ROC\u2011AUC", "f1": "F1", "macro_f1": "Macro F1"}


def summarise(sweep: Sweep) -> ui.Summary:
    """The summary of a sweep; whatever it does not tell is left out or shown as a dash."""
    badge, text = ui.badge_of(sweep.simulated())
    if is_leaky(sweep):
        badge, text = " ".join(filter(None, ("LEAKY", badge))), " ".join(filter(None, (LEAKY_BADGE, text)))
    verdicts = [_headline(sweep), _others(sweep), *_gain(sweep), *_one_signal(sweep), _reached(sweep)]
    verdicts.append(_control(sweep))
    findings = [verdict for verdict in verdicts if verdict]
    return ui.Summary(sweep.name, badge, text, findings, _facts(sweep), None, kicker="sweep of a fusion head")


def classes_in_words(sweep: Sweep) -> str:
    """Label and its classes: ``arousal (high against low)``."""
    label = sweep.results.label or sweep.results.task
    named = sweep.classes if len(sweep.classes) <= 6 else [*sweep.classes[:5], f"{len(sweep.classes) - 5} more"]
    apart = " against ".join(named) if len(named) == 2 else ", ".join(named)
    return f"{label} ({apart})" if label and apart else label or apart or "the classes"


def with_interval(row: ResultRow) -> str:
    """``0.873 (0.841–0.902)``."""
    inside = ui.span(row.auc_ci)
    return ui.metric(row.auc) + (f" ({inside})" if inside else "")


def reached(row: ResultRow, bound: ResultRow | None) -> float:
    """Share of the way from chance to the best possible AUC; NaN where either is unknown or there is no way."""
    if bound is None or not bound.auc > CHANCE:
        return math.nan
    return (row.auc - CHANCE) / (bound.auc - CHANCE)


def better_single(sweep: Sweep) -> ResultRow | None:
    """The single modality with the higher AUC over all held-out people."""
    singles = [row for name in ("ecg", "eeg") if (row := sweep.row(name)) is not None]
    scored = [row for row in singles if math.isfinite(row.auc)]
    return max(scored, key=lambda row: row.auc) if scored else None


def _headline(sweep: Sweep) -> str:
    fused = sweep.row("fused")
    if fused is None or not math.isfinite(fused.auc):
        return "The sweep has no AUC of the fused row, so nothing can be said about fusion."
    kind = "ROC-AUC" if len(sweep.classes) <= 2 else "mean ROC-AUC (each class against the others)"
    inside = ui.span(fused.auc_ci)
    interval = f" (95 % interval over people {inside})" if inside else ""
    windows, people = sweep.results.windows, sweep.results.people
    on = f" on {windows:,} windows" if windows is not None else ""
    held = "" if shares_people(sweep) else "held-out "
    on += f" of {people:,} {held}{'person' if people == 1 else 'people'}" if people is not None else ""
    return f"Fused ECG + EEG tells {classes_in_words(sweep)} with {kind} {ui.metric(fused.auc)}{interval}{on}."


def _others(sweep: Sweep) -> str:
    scores = []
    for name, called in (("ecg", "ECG alone"), ("eeg", "EEG alone"), ("handmade", "hand-made features of both")):
        row = sweep.row(name)
        if row is not None and math.isfinite(row.auc):
            scores.append(f"{called} {with_interval(row)}")
    return f"Against it: {', '.join(scores)}." if scores else ""


def _gain(sweep: Sweep) -> list[str]:
    """Fused against the better single signal, the hand-made features and the untrained encoders: a sentence each."""
    fused, best = sweep.row("fused"), better_single(sweep)
    if fused is None or not math.isfinite(fused.auc):
        return []
    sentences = []
    against = [] if best is None else [(best, f"the better single signal ({label_of(best.name)})")]
    for name, called in (("handmade", "hand-made features"), ("untrained", "untrained encoders of the same shape")):
        if (row := sweep.row(name)) is not None and math.isfinite(row.auc):
            against.append((row, called))
    differences = {} if sweep.held is None else sweep.held.differences
    for row, called in against:
        text = f"Fused minus {called}: {ui.signed(fused.auc - row.auc)}"
        change = differences.get(("fused", row.name))
        if change is not None and math.isfinite(change.low):
            text += f", 95 % interval {ui.signed(change.low)} to {ui.signed(change.high)}, p = {ui.p_word(change.p)}"
            text += _meaning(change)
        sentences.append(text + ".")
    return sentences


def _one_signal(sweep: Sweep) -> list[str]:
    """AUC of the fused heads with one signal only, or one and noise."""
    sentences = []
    for title, names in (
        ("With one signal withheld at the test", {"fused_ecg_only": "ecg", "fused_eeg_only": "eeg"}),
        ("Control with noise in place of one signal", {"noise_ecg": "eeg", "noise_eeg": "ecg"}),
    ):
        parts = []
        for name, left in names.items():
            row, single = sweep.row(name), sweep.row(left)
            if row is not None and single is not None:
                against = f"{label_of(left)} {ui.metric(single.auc)}"
                parts.append(f"{label_of(name)} {with_interval(row)} against {against}")
        if parts:
            sentences.append(f"{title}: {'; '.join(parts)}.")
    return sentences


def _meaning(change: Difference) -> str:
    if change.low > 0:
        return ""
    return (
        ": worse on these people" if change.high < 0 else ": it includes zero, so these people do not show a difference"
    )


def _reached(sweep: Sweep) -> str:
    bounds = []
    for name in ("fused", "ecg", "eeg"):
        row = sweep.row(name)
        bound = None if row is None else sweep.bound(row)
        if row is not None and bound is not None and math.isfinite(share := reached(row, bound)):
            bounds.append(f"{label_of(name)} {ui.metric(bound.auc)} ({ui.percent(share)})")
    what = "Best possible AUC, from the simulator's hidden drives, and the share of the way there from chance"
    return f"{what}: {', '.join(bounds)}." if bounds else ""


def _control(sweep: Sweep) -> str:
    auc, permuted = sweep.permuted_auc, sweep.results.permuted
    if permuted is None or not auc.size:
        return ""
    p = f", p = {ui.p_word(permuted.p)}" if math.isfinite(permuted.p) else ""
    leak = f"; above chance with p = {ui.p_word(permuted.p_leak)}, which is what a split that leaks does"
    return (
        f"Control with labels permuted by recording within people ({auc.size} times): mean AUC "
        f"{ui.metric(float(auc.mean()))}, highest {ui.metric(float(auc.max()))}{p}{leak * (permuted.p_leak < LEAK_P)}."
    )


def _facts(sweep: Sweep) -> list[ui.Fact]:
    facts = []
    windows, people = sweep.results.windows, sweep.results.people
    if windows is not None:
        facts.append(ui.Fact("Held-out windows", f"{windows:,}", "each predicted once"))
    if people is not None and shares_people(sweep):
        facts.append(ui.Fact("People tested", f"{people:,}", "they are in training too"))
    elif people is not None:
        facts.append(ui.Fact("Held-out people", f"{people:,}", "never in training or selection of their fold"))
    if sweep.classes:
        more = ", ".join(sweep.classes)
        if sweep.predictions is not None:
            count = np.bincount(sweep.predictions.label, minlength=len(sweep.classes))
            more = ", ".join(f"{name} {n:,}" for name, n in zip(sweep.classes, count, strict=True))
        facts.append(ui.Fact("Classes", f"{len(sweep.classes)}", more))
    facts.append(ui.Fact("Protocol", sweep.results.protocol or "–", protocol_in_words(sweep)))
    if sweep.trials:
        stopped = sum(trial.stopped for trial in sweep.trials)
        facts.append(ui.Fact("Trials", f"{len(sweep.trials):,}", f"{stopped:,} stopped early"))
        seconds = sum(trial.seconds for trial in sweep.trials if math.isfinite(trial.seconds))
        if seconds > 0:
            facts.append(ui.Fact("Search", ui.duration(seconds), "all trials' times added up"))
    return facts


def protocol_in_words(sweep: Sweep) -> str:
    """Protocol of the folds in words."""
    protocol, folds = sweep.results.protocol, len(sweep.results.folds)
    number = f"{folds} " if folds else ""
    if protocol == "loso":
        return f"leave one person out, {number}folds" if number else "leave one person out"
    descriptions = {
        "grouped_kfold": f"{number}folds of whole people; each person is held out once",
        "holdout": "one fixed group of people, held out from everything",
        BY_CLIP: f"{number}folds of whole clips; the same people train and are tested, with other clips",
        "person_and_clip": f"{number}folds of people and clips, neither of which trains; each window is tested once",
        LEAKY: f"{number}folds of single windows at random: LEAKY, the same people and recordings train and test",
    }
    return descriptions.get(protocol, protocol or "not told")


def shares_people(sweep: Sweep) -> bool:
    """Return True if people of the test set may also be in training."""
    return sweep.results.protocol in (LEAKY, BY_CLIP)


def is_leaky(sweep: Sweep) -> bool:
    """Return True if windows were divided at random."""
    return sweep.results.protocol == LEAKY


def mark_leaky(section: ui.Section) -> ui.Section:
    """A section of a leaky sweep: every table and figure says so, wherever it may be copied to."""
    return replace(
        section,
        tables=[replace(table, caption=_WARNING + table.caption) for table in section.tables],
        figures=[replace(figure, caption=_WARNING + figure.caption) for figure in section.figures],
    )


def published(sweep: Sweep) -> ui.Table | None:
    """Published figure beside that of the fused row; None without one."""
    paper = sweep.results.published
    if paper is None:
        return None
    auc, fused = paper.metric == "auc", sweep.row("fused")
    ours = math.nan if fused is None else fused.auc if auc else fused.macro_f1
    rows = [
        [ui.Cell(paper.source), ui.Cell(f"{ui.metric(paper.value)} ({ui.percent(paper.value)})")],
        [ui.Cell("fused, this sweep"), ui.Cell(ui.metric(ours) + ("" if auc else " (mean over classes)"))],
    ]
    caption = f"As reported, not reproduced here. Unknown of it: {paper.unknown}."
    return ui.Table(["Published", _METRICS.get(paper.metric, paper.metric)], rows, caption)
