"""Sections of a sweep's page beyond scores: how far probabilities can be trusted, what heads leaned on, planes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from physio_dist.report import insight_plots as plots
from physio_dist.report.drawing import percent
from physio_dist.report.fusion_plots import label_of, metric
from physio_dist.report.heldout import HeldOut, Reliability, reliability
from physio_dist.report.insight import EMBEDDING, Leaned, Plane, Withheld
from physio_dist.report.parts import Figure, Section
from physio_dist.report.sweepdata import PREDICTIONS, Sweep

_BEFORE = "a sweep of this version writes it when it is done"


def trust(sweep: Sweep, held: HeldOut | None) -> Section:
    """Reliability curves of every row but the majority and the bounds."""
    title, anchor = "Calibration", "calibration"
    if held is None:
        return Section(title, anchor, missing=f"The run holds no {PREDICTIONS}, so no reliability curve can be drawn.")
    rows = [row for row in sweep.real_rows if row.name in held.pairs and row.name != "majority"]
    drawn = [(row.name, reliability(held.predictions, row.name), row.ece) for row in rows]
    if not drawn:
        return Section(title, anchor, missing="results.json has no row that answers from signals.")
    two = len(sweep.classes) == 2
    if two:
        x, y = f"probability of {sweep.classes[1]}", f"share of {sweep.classes[1]}"
    else:
        x, y = "probability of the predicted class", "share that is right"
    alt = f"Reliability curves of {len(drawn)} rows, {y} against {x}: {', '.join(label_of(row.name) for row in rows)}."
    caption = (
        f"Of the held-out windows with about such a probability (bins of a tenth), {y.replace('share', 'the share', 1)}"
        "; on the dashed line probabilities are what they say, below it they are too high. Dots grow with the number "
        "of windows, which the bars below count."
    )
    if any(math.isfinite(row.ece) for row in rows):
        caption += " The calibration error is that of the table: of the predicted class, in 15 bins."
    listing = "\n\n".join(_listing(label_of(name), bins) for name, bins, _ in drawn)
    figure = Figure([plots.reliability(drawn, x, y, alt)], caption, wide=True)
    return Section(title, anchor, figures=[figure], details=[("The same as numbers", listing)])


def _listing(name: str, bins: Reliability) -> str:
    lines = [name, f"{'bin':>11}{'windows':>9}{'probability':>13}{'share':>8}"]
    for i, count in enumerate(bins.count.tolist()):
        if count:
            low, high = i / len(bins.count), (i + 1) / len(bins.count)
            lines.append(f"{low:>5.1f} – {high:.1f}{count:>9,}{metric(bins.sure[i]):>13}{metric(bins.right[i]):>8}")
    return "\n".join(lines)


def leaning(sweep: Sweep, held: HeldOut | None) -> Section:
    """What the AUC of the fused row lost without each signal, channel and second."""
    del held
    title, anchor, found = "What the heads lean on", "leaned", sweep.leaned
    if found is None or not any(math.isfinite(one.lost) for one in found.signals):
        missing = f"results.json does not tell what the fused heads lean on; {_BEFORE}."
        return Section(title, anchor, missing=missing)
    figures = [_channels(found)]
    patches = {signal: [one for one in found.patches if one.signal == signal] for signal in _signals(found)}
    patches = {signal: some for signal, some in patches.items() if some}
    if patches:
        words = [f"{label_of(signal)} {_top(some)}" for signal, some in patches.items()]
        caption = (
            "ROC-AUC that the fused row lost without a patch, pooled over the others; band: 95 % interval over people. "
            "Where the label is told all along, no single second is missed."
        )
        alt = f"ROC-AUC lost without each second of the window, the most: {'; '.join(words)}."
        figures.append(Figure([plots.over_time(patches, alt)], caption, wide=True))
    lost = [f"without the {one.name.upper()} {_signed(one)}" for one in found.signals]
    text = [
        f"ROC-AUC of the fused row lost on {found.windows:,} held-out windows, of {metric(found.auc)}: "
        f"{', '.join(lost)}. Heads stay as they are; what is withheld says the same of every window."
    ]
    listing = [f"{'':12}{'AUC lost':>10}{'95 % interval':>20}{'moved':>8}"]
    for one in (*found.signals, *found.channels, *found.patches):
        name = one.name if math.isnan(one.start) else f"{one.signal} {one.start:g} s"
        span = f"{one.low:+.3f} to {one.high:+.3f}" if math.isfinite(one.low) else "–"
        listing.append(f"{name:12}{one.lost:>+10.3f}{span:>20}{one.moved:>8.3f}")
    details = [("The same as numbers (moved: mean change of the probabilities)", "\n".join(listing))]
    return Section(title, anchor, text=text, figures=figures, details=details)


def _channels(found: Leaned) -> Figure:
    known = [one for one in found.channels if math.isfinite(one.lost)]
    ordered = sorted(known, key=lambda one: -one.lost)
    shown = [*(one for one in found.signals if math.isfinite(one.lost)), *ordered[: plots.MOST_BARS]]
    names = [_whole(one) if number < len(found.signals) else one for number, one in enumerate(shown)]
    at = {one.name: place for one in known if (place := plots.on_scalp(one.name)) is not None and one.signal == "eeg"}
    images = []
    if len(at) > 2:
        electrodes = [one for one in known if one.signal == "eeg" and one.name in at]
        alt = f"Electrodes on a head by the ROC-AUC lost without each, the most: {_top(electrodes)}."
        images.append(plots.scalp("EEG: electrodes, seen from above", electrodes, at, alt))
    images.append(plots.bars("Signals, electrodes and leads", names, f"ROC-AUC lost without each: {_top(known)}."))
    caption = (
        "ROC-AUC that the fused row lost when the features of a signal, electrode or lead were replaced by their mean "
        "over training windows; lines: 95 % interval over people (bootstrap). Neighbours say much the same, so that "
        "one may be missed little where all of them matter; and an encoder has seen all channels, so features of one "
        "know of others."
    )
    if len(known) > plots.MOST_BARS:
        caption += f" The {plots.MOST_BARS} channels missed most, of {len(known)}."
    return Figure(images, caption)


def _whole(one: Withheld) -> Withheld:
    return Withheld(one.signal, f"all {one.name.upper()}", one.lost, one.low, one.high, one.moved)


def _signals(found: Leaned) -> list[str]:
    return list(dict.fromkeys(one.signal for one in found.patches))


def _signed(one: Withheld) -> str:
    interval = f" ({one.low:+.3f} to {one.high:+.3f})" if math.isfinite(one.low) else ""
    return f"{one.lost:+.3f}{interval}".replace("-", "\u2212")


def _top(entries: Sequence[Withheld]) -> str:
    best = sorted((one for one in entries if math.isfinite(one.lost)), key=lambda one: -one.lost)[:3]
    return ", ".join(f"{one.name if math.isnan(one.start) else f'{one.start:g} s'} {one.lost:+.3f}" for one in best)


def planes(sweep: Sweep, held: HeldOut | None) -> Section:
    """Frozen features on a plane, by person and by label."""
    del held
    title, anchor = "Frozen features", "features"
    if not sweep.planes:
        return Section(title, anchor, missing=f"The run holds no {EMBEDDING}; {_BEFORE}.")
    figures = []
    for signal, plane in sweep.planes.items():
        people = np.unique(plane.person)
        styles = plots.person_colours(len(people))
        by_person = [
            plots.Group("", plane.place[plane.person == one], *style) for one, style in zip(people, styles, strict=True)
        ]
        colours = [plots.CLASS_COLOURS[number % len(plots.CLASS_COLOURS)] for number in range(len(sweep.classes))]
        by_label = [
            plots.Group(name, plane.place[plane.label == number], colours[number])
            for number, name in enumerate(sweep.classes)
        ]
        own, alike = (_near(plane, name) for name in ("person", "label"))
        words = (f"{own} of the same person", f"{alike} of the same label, among other people")
        alt = f"{len(plane.label)} windows by their frozen {signal.upper()} features on a plane"
        images = [
            plots.plane_panel(f"{signal.upper()}, {by}", groups, words[i], i == 1, f"{alt}, {by}: {words[i]}.")
            for i, (by, groups) in enumerate((("by person", by_person), ("by label", by_label)))
        ]
        caption = (
            f"The same {len(plane.label):,} windows of {len(people):,} people twice, placed by their frozen features "
            "alone (t-SNE: who is near whom can be read, how far apart groups are cannot); no head, and no label. "
            f"Shares are over the {plane.neighbours} nearest windows in all dimensions, by chance in brackets."
        )
        figures.append(Figure(images, caption))
    text = [_verdict(sweep)] if _verdict(sweep) else []
    return Section(title, anchor, text=text, figures=figures)


def _near(plane: Plane, name: str) -> str:
    share, chance = plane.near[name]
    return f"{percent(share)} ({percent(chance)})"


def _verdict(sweep: Sweep) -> str:
    told = []
    for signal, plane in sweep.planes.items():
        share, chance = plane.near["person"]
        if math.isfinite(share) and chance > 0:
            label, by_chance = plane.near["label"]
            lead = label - by_chance
            more = ""
            if math.isfinite(lead):
                side = "above" if lead > 0 else "below"
                more = f", {100 * abs(lead):.0f} points {side} chance" if abs(lead) >= 0.005 else ", as by chance"
            told.append(
                f"of a window's nearest {signal.upper()} neighbours {percent(share)} are of the same person "
                f"({share / chance:.1f} times as many as by chance); of the nearest of other people {percent(label)} "
                f"have its label{more}"
            )
    if not told:
        return ""
    text = "; ".join(told)
    return (
        f"{text[0].upper()}{text[1:]}. What tells people apart is what a split leaks that has the same people on both "
        "sides."
    )
