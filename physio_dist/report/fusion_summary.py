"""The head of a sweep's page: what was told apart, how well, and against what."""

from __future__ import annotations

import math

import numpy as np

from physio_dist.report import protocol
from physio_dist.report.drawing import percent
from physio_dist.report.fusion_plots import label_of, metric, span
from physio_dist.report.heldout import HeldOut
from physio_dist.report.parts import Fact
from physio_dist.report.summary import Summary, badge_of, duration
from physio_dist.report.sweepdata import Row, Sweep
from physio_dist.stats.auc import Difference

CHANCE = 0.5
# Permuted labels that are told apart beyond this level speak of a leak.
LEAK_P = 0.001


def summarise_sweep(sweep: Sweep, held: HeldOut | None) -> Summary:
    """The summary of a sweep; whatever it does not tell is left out or shown as a dash."""
    badge, text = badge_of(sweep.simulated())
    if protocol.is_leaky(sweep):
        badge, text = " ".join(filter(None, ("LEAKY", badge))), " ".join(filter(None, (protocol.BADGE, text)))
    verdicts = [_headline(sweep), _others(sweep), *_gain(sweep, held), *_one_signal(sweep), _reached(sweep)]
    verdicts.append(_control(sweep))
    told = [verdict for verdict in verdicts if verdict]
    return Summary(sweep.name, badge, text, told, _facts(sweep, held), None, kicker="sweep of a fusion head")


def classes_in_words(sweep: Sweep) -> str:
    """What was told apart: ``arousal (high against low)``."""
    label = sweep.word("label") or sweep.word("task")
    named = sweep.classes if len(sweep.classes) <= 6 else [*sweep.classes[:5], f"{len(sweep.classes) - 5} more"]
    apart = " against ".join(named) if len(named) == 2 else ", ".join(named)
    return f"{label} ({apart})" if label and apart else label or apart or "the classes"


def with_interval(row: Row) -> str:
    """``0.873 (0.841–0.902)``."""
    inside = span(*row.interval)
    return metric(row.scores["auc"]) + (f" ({inside})" if inside else "")


def reached(row: Row, bound: Row | None) -> float:
    """How much of the way from chance to the best possible AUC; NaN where either is unknown or there is no way."""
    if bound is None or not bound.scores["auc"] > CHANCE:
        return math.nan
    return (row.scores["auc"] - CHANCE) / (bound.scores["auc"] - CHANCE)


def better_single(sweep: Sweep) -> Row | None:
    """The single modality with the higher AUC over all held-out people."""
    singles = [row for name in ("ecg", "eeg") if (row := sweep.row(name)) is not None]
    known = [row for row in singles if math.isfinite(row.scores["auc"])]
    return max(known, key=lambda row: row.scores["auc"]) if known else None


def signed(value: float) -> str:
    """A difference of scores with its sign, an en dash where there is none."""
    return f"{value:+.3f}".replace("-", "\u2212") if math.isfinite(value) else "–"


def _headline(sweep: Sweep) -> str:
    fused = sweep.row("fused")
    if fused is None or not math.isfinite(fused.scores["auc"]):
        return "The sweep has no AUC of the fused row, so nothing can be said about fusion."
    kind = "ROC-AUC" if len(sweep.classes) <= 2 else "mean ROC-AUC (each class against the others)"
    inside = span(*fused.interval)
    interval = f" (95 % interval over people {inside})" if inside else ""
    windows, people = sweep.count("windows"), sweep.count("people")
    on = f" on {windows:,} windows" if windows is not None else ""
    held = "" if protocol.shares_people(sweep) else "held-out "
    on += f" of {people:,} {held}{'person' if people == 1 else 'people'}" if people is not None else ""
    return f"Fused ECG + EEG tells {classes_in_words(sweep)} with {kind} {metric(fused.scores['auc'])}{interval}{on}."


def _others(sweep: Sweep) -> str:
    told = []
    for name, called in (("ecg", "ECG alone"), ("eeg", "EEG alone"), ("handmade", "hand-made features of both")):
        row = sweep.row(name)
        if row is not None and math.isfinite(row.scores["auc"]):
            told.append(f"{called} {with_interval(row)}")
    return f"Against it: {', '.join(told)}." if told else ""


def _gain(sweep: Sweep, held: HeldOut | None) -> list[str]:
    """Fused against the better single signal, the hand-made features and the untrained encoders: a sentence each."""
    fused, best = sweep.row("fused"), better_single(sweep)
    if fused is None or not math.isfinite(fused.scores["auc"]):
        return []
    told = []
    against = [] if best is None else [(best, f"the better single signal ({label_of(best.name)})")]
    for name, called in (("handmade", "hand-made features"), ("untrained", "untrained encoders of the same shape")):
        if (row := sweep.row(name)) is not None and math.isfinite(row.scores["auc"]):
            against.append((row, called))
    found = {} if held is None else held.differences
    for row, called in against:
        text = f"Fused minus {called}: {signed(fused.scores['auc'] - row.scores['auc'])}"
        one = found.get(("fused", row.name))
        if one is not None and math.isfinite(one.low):
            text += f", 95 % interval {signed(one.low)} to {signed(one.high)}, p = {p_word(one.p)}{_meaning(one)}"
        told.append(text + ".")
    return told


def _one_signal(sweep: Sweep) -> list[str]:
    """What is left of the fused row where it has one signal only, or one and noise."""
    told = []
    for what, names in (
        ("With one signal withheld at the test", {"fused_ecg_only": "ecg", "fused_eeg_only": "eeg"}),
        ("Control with noise in place of one signal", {"noise_ecg": "eeg", "noise_eeg": "ecg"}),
    ):
        parts = []
        for name, left in names.items():
            row, single = sweep.row(name), sweep.row(left)
            if row is not None and single is not None:
                against = f"{label_of(left)} {metric(single.scores['auc'])}"
                parts.append(f"{label_of(name)} {with_interval(row)} against {against}")
        if parts:
            told.append(f"{what}: {'; '.join(parts)}.")
    return told


def _meaning(one: Difference) -> str:
    if one.low > 0:
        return ""
    return ": worse on these people" if one.high < 0 else ": it includes zero, so these people do not show a difference"


def _reached(sweep: Sweep) -> str:
    told = []
    for name in ("fused", "ecg", "eeg"):
        row = sweep.row(name)
        bound = None if row is None else sweep.bound(row)
        if row is not None and bound is not None and math.isfinite(share := reached(row, bound)):
            told.append(f"{label_of(name)} {metric(bound.scores['auc'])} ({percent(share)})")
    what = "Best possible AUC, from the simulator's hidden drives, and the share of the way there from chance"
    return f"{what}: {', '.join(told)}." if told else ""


def _control(sweep: Sweep) -> str:
    if sweep.permuted is None or not sweep.permuted.auc.size:
        return ""
    auc = sweep.permuted.auc
    p = f", p = {p_word(sweep.permuted.p)}" if math.isfinite(sweep.permuted.p) else ""
    leak = sweep.permuted.p_leak
    above = f"; above chance with p = {p_word(leak)}, which is what a split that leaks does" if leak < LEAK_P else ""
    return (
        f"Control with labels permuted by recording within people ({auc.size} times): mean AUC "
        f"{metric(float(np.mean(auc)))}, highest {metric(float(auc.max()))}{p}{above}."
    )


def p_word(p: float) -> str:
    """A p value with two significant digits."""
    return f"{p:.2g}" if p >= 1e-4 else f"{p:.0e}"


def _facts(sweep: Sweep, held: HeldOut | None) -> list[Fact]:
    facts = []
    windows, people = sweep.count("windows"), sweep.count("people")
    if windows is not None:
        facts.append(Fact("Held-out windows", f"{windows:,}", "each predicted once"))
    if people is not None and protocol.shares_people(sweep):
        facts.append(Fact("People tested", f"{people:,}", "they are in training too"))
    elif people is not None:
        facts.append(Fact("Held-out people", f"{people:,}", "never in training or selection of their fold"))
    if sweep.classes:
        more = ", ".join(sweep.classes)
        if held is not None:
            count = np.bincount(held.predictions.label, minlength=len(sweep.classes))
            more = ", ".join(f"{name} {n:,}" for name, n in zip(sweep.classes, count, strict=True))
        facts.append(Fact("Classes", f"{len(sweep.classes)}", more))
    facts.append(Fact("Protocol", sweep.word("protocol") or "–", protocol.in_words(sweep)))
    if sweep.trials:
        stopped = sum(trial.stopped for trial in sweep.trials)
        facts.append(Fact("Trials", f"{len(sweep.trials):,}", f"{stopped:,} stopped early"))
        seconds = sum(trial.seconds for trial in sweep.trials if math.isfinite(trial.seconds))
        if seconds > 0:
            facts.append(Fact("Search", duration(seconds), "all trials' times added up"))
    return facts
