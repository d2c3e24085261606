"""Analysis sections of a sweep's page: calibration, occlusion of the heads' inputs, embedding of the features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.patches import Circle
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from physio_dist.report import components as ui
from physio_dist.report.sweep_data import Reliability, Sweep, reliability
from physio_dist.report.sweep_plots import colour_of, label_of
from physio_dist.runs.sweep_results import (
    EMBEDDING,
    PREDICTIONS,
    ChannelOcclusion,
    Occlusion,
    OcclusionResults,
    PatchOcclusion,
)
from physio_dist.runtime.arrays import Float64Array

# Okabe and Ito's palette without its yellow, which is hard to see on white.
CLASS_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#1c1c1c")
PEOPLE_MARKERS = "os^D"
# More channels than this are not drawn as bars.
MOST_BARS = 24
_TURNS = 8
_BEFORE = "a sweep of this version writes it when it is done"


def calibration(sweep: Sweep) -> ui.Section:
    """Reliability curves of every row but the majority and the bounds."""
    held = sweep.held
    title, anchor = "Calibration", "calibration"
    if held is None:
        return ui.Section(
            title, anchor, missing=f"The run holds no {PREDICTIONS}, so no reliability curve can be drawn."
        )
    rows = [row for row in sweep.real_rows if row.name in held.pairs and row.name != "majority"]
    curves = [(row.name, reliability(held.predictions, row.name), row.ece) for row in rows]
    if not curves:
        return ui.Section(title, anchor, missing="results.json has no row that answers from signals.")
    two = len(sweep.classes) == 2
    if two:
        x, y = f"probability of {sweep.classes[1]}", f"share of {sweep.classes[1]}"
    else:
        x, y = "probability of the predicted class", "share that is right"
    alt = f"Reliability curves of {len(curves)} rows, {y} against {x}: {', '.join(label_of(row.name) for row in rows)}."
    caption = (
        f"Of the held-out windows with about such a probability (bins of a tenth), {y.replace('share', 'the share', 1)}"
        "; on the dashed line probabilities are what they say, below it they are too high. Dots grow with the number "
        "of windows, which the bars below count."
    )
    if any(math.isfinite(row.ece) for row in rows):
        caption += " The calibration error is that of the table: of the predicted class, in 15 bins."
    listing = "\n\n".join(_listing(label_of(name), bins) for name, bins, _ in curves)
    figure = ui.Figure([reliability_panels(curves, x, y, alt)], caption, wide=True)
    return ui.Section(title, anchor, figures=[figure], details=[("The same as numbers", listing)])


def _listing(name: str, bins: Reliability) -> str:
    lines = [name, f"{'bin':>11}{'windows':>9}{'probability':>13}{'share':>8}"]
    for i, count in enumerate(bins.count.tolist()):
        if count:
            low, high = i / len(bins.count), (i + 1) / len(bins.count)
            probability, frequency = ui.metric(bins.probability[i]), ui.metric(bins.frequency[i])
            lines.append(f"{low:>5.1f} – {high:.1f}{count:>9,}{probability:>13}{frequency:>8}")
    return "\n".join(lines)


def occlusion(sweep: Sweep) -> ui.Section:
    """AUC of the fused row lost without each signal, channel and second."""
    title, anchor, results = "Occlusion", "occlusion", sweep.results.occlusion
    if results is None or not any(math.isfinite(effect.auc_drop) for effect in results.signals):
        missing = f"results.json holds no occlusion analysis; {_BEFORE}."
        return ui.Section(title, anchor, missing=missing)
    figures = [_channels(results)]
    patches: dict[str, list[PatchOcclusion]] = {}
    for patch in results.patches:
        patches.setdefault(patch.signal, []).append(patch)
    if patches:
        words = [f"{label_of(signal)} {_top(some)}" for signal, some in patches.items()]
        caption = (
            "ROC-AUC that the fused row lost without a patch, pooled over the others; band: 95 % interval over people. "
            "Where the label is told all along, no single second is missed."
        )
        alt = f"ROC-AUC lost without each second of the window, the most: {'; '.join(words)}."
        figures.append(ui.Figure([over_time(patches, alt)], caption, wide=True))
    lost = [f"without the {effect.signal.upper()} {_signed(effect)}" for effect in results.signals]
    text = [
        f"ROC-AUC of the fused row lost on {results.windows:,} held-out windows, of {ui.metric(results.auc)}: "
        f"{', '.join(lost)}. Heads stay as they are; what is withheld says the same of every window."
    ]
    listing = [f"{'':12}{'AUC lost':>10}{'95 % interval':>20}{'shift':>8}"]
    for effect in (*results.signals, *results.channels, *results.patches):
        name = f"{effect.signal} {effect.label}" if isinstance(effect, PatchOcclusion) else effect.label
        interval = _interval(effect) or "–"
        listing.append(f"{name:12}{effect.auc_drop:>+10.3f}{interval:>20}{effect.prob_shift:>8.3f}")
    details = [("The same as numbers (shift: mean change of the probabilities)", "\n".join(listing))]
    return ui.Section(title, anchor, text=text, figures=figures, details=details)


def _channels(results: OcclusionResults) -> ui.Figure:
    channels = [effect for effect in results.channels if math.isfinite(effect.auc_drop)]
    ordered = sorted(channels, key=lambda effect: -effect.auc_drop)
    bars = [(f"all {effect.signal.upper()}", effect) for effect in results.signals if math.isfinite(effect.auc_drop)]
    bars += [(effect.channel, effect) for effect in ordered[:MOST_BARS]]
    places = {
        effect.channel: place
        for effect in channels
        if (place := on_scalp(effect.channel)) is not None and effect.signal == "eeg"
    }
    images = []
    if len(places) > 2:
        electrodes = [effect for effect in channels if effect.signal == "eeg" and effect.channel in places]
        alt = f"Electrodes on a head by the ROC-AUC lost without each, the most: {_top(electrodes)}."
        images.append(scalp_map("EEG: electrodes, seen from above", electrodes, places, alt))
    images.append(
        occlusion_bars("Signals, electrodes and leads", bars, f"ROC-AUC lost without each: {_top(channels)}.")
    )
    caption = (
        "ROC-AUC that the fused row lost when the features of a signal, electrode or lead were replaced by their mean "
        "over training windows; lines: 95 % interval over people (bootstrap). Neighbours say much the same, so that "
        "one may be missed little where all of them matter; and an encoder has seen all channels, so features of one "
        "know of others."
    )
    if len(channels) > MOST_BARS:
        caption += f" The {MOST_BARS} channels missed most, of {len(channels)}."
    return ui.Figure(images, caption)


def _interval(effect: Occlusion) -> str:
    return "" if effect.ci is None else f"{effect.ci[0]:+.3f} to {effect.ci[1]:+.3f}"


def _signed(effect: Occlusion) -> str:
    interval = f" ({_interval(effect)})" if _interval(effect) else ""
    return f"{effect.auc_drop:+.3f}{interval}".replace("-", "\u2212")


def _top(entries: Sequence[Occlusion]) -> str:
    largest = sorted(
        (effect for effect in entries if math.isfinite(effect.auc_drop)), key=lambda effect: -effect.auc_drop
    )[:3]
    return ", ".join(f"{effect.label} {effect.auc_drop:+.3f}" for effect in largest)


def features(sweep: Sweep) -> ui.Section:
    """Frozen features on a plane, by person and by label."""
    title, anchor = "Frozen features", "features"
    if not sweep.planes:
        return ui.Section(title, anchor, missing=f"The run holds no {EMBEDDING}; {_BEFORE}.")
    figures, neighbours = [], sweep.results.embedding.neighbours if sweep.results.embedding else 0
    for signal, plane in sweep.planes.items():
        people = np.unique(plane.person)
        styles = person_colours(len(people))
        by_person = [
            Group("", plane.place[plane.person == one], *style) for one, style in zip(people, styles, strict=True)
        ]
        colours = [CLASS_COLOURS[number % len(CLASS_COLOURS)] for number in range(len(sweep.classes))]
        by_label = [
            Group(name, plane.place[plane.label == number], colours[number])
            for number, name in enumerate(sweep.classes)
        ]
        shares = plane.shares
        own = f"{ui.percent(shares.person)} ({ui.percent(shares.person_chance)})"
        alike = f"{ui.percent(shares.label)} ({ui.percent(shares.label_chance)})"
        words = (f"{own} of the same person", f"{alike} of the same label, among other people")
        alt = f"{len(plane.label)} windows by their frozen {signal.upper()} features on a plane"
        images = [
            plane_panel(f"{signal.upper()}, {by}", groups, words[i], i == 1, f"{alt}, {by}: {words[i]}.")
            for i, (by, groups) in enumerate((("by person", by_person), ("by label", by_label)))
        ]
        caption = (
            f"The same {len(plane.label):,} windows of {len(people):,} people twice, placed by their frozen features "
            "alone (t-SNE: who is near whom can be read, how far apart groups are cannot); no head, and no label. "
            f"Shares are over the {neighbours} nearest windows in all dimensions, by chance in brackets."
        )
        figures.append(ui.Figure(images, caption))
    text = [_verdict(sweep)] if _verdict(sweep) else []
    return ui.Section(title, anchor, text=text, figures=figures)


def _verdict(sweep: Sweep) -> str:
    sentences = []
    for signal, plane in sweep.planes.items():
        shares = plane.shares
        if not (math.isfinite(shares.person) and shares.person_chance > 0):
            continue
        above = shares.label - shares.label_chance
        more = ""
        if math.isfinite(above):
            points = f"{100 * abs(above):.0f} points {'above' if above > 0 else 'below'} chance"
            more = f", {points}" if abs(above) >= 0.005 else ", as by chance"
        sentences.append(
            f"of a window's nearest {signal.upper()} neighbours {ui.percent(shares.person)} are of the same person "
            f"({shares.person / shares.person_chance:.1f} times as many as by chance); of the nearest of other people "
            f"{ui.percent(shares.label)} have its label{more}"
        )
    if not sentences:
        return ""
    text = "; ".join(sentences)
    return (
        f"{text[0].upper()}{text[1:]}. What tells people apart is what a split leaks that has the same people on both "
        "sides."
    )


def reliability_panels(
    rows: Sequence[tuple[str, Reliability, float]], x_label: str, y_label: str, alt: str
) -> ui.Image:
    """A small panel a row: how often right against how sure, dots as large as their share of windows; counts below.

    ``rows``: name, bins, and the expected calibration error (NaN where unknown).
    """
    across = min(len(rows), 5)
    down = math.ceil(len(rows) / across)
    left, gap, side, strip = 0.55, 0.28, 1.46, 0.34
    slot = side + strip + 0.95
    height = down * slot + 0.05
    figure = ui.new_figure(ui.WIDE_INCHES, height)
    for number, (name, bins, error) in enumerate(rows):
        x = left + (number % across) * (side + gap)
        y = height - (number // across) * slot - 0.42 - side
        first = number % across == 0
        axes = ui.axes_at(figure, x, y, side, side)
        title = f"{label_of(name, short=True)}"
        axes.set_title(title, pad=12, fontsize=9.5)
        if math.isfinite(error):
            axes.text(
                0, 1.02, f"calibration error {ui.metric(error)}", transform=axes.transAxes, fontsize=7.5, color=ui.SOFT
            )
        axes.plot([0, 1], [0, 1], color=ui.SOFT, lw=0.9, ls=(0, (4, 3)), zorder=1)
        filled = bins.count > 0
        size = 3.0 + 9.0 * np.sqrt(bins.count[filled] / max(int(bins.count.max()), 1))
        axes.plot(bins.probability[filled], bins.frequency[filled], color=colour_of(name), lw=1.2, zorder=3)
        for x_value, y_value, each in zip(bins.probability[filled], bins.frequency[filled], size, strict=True):
            axes.plot([x_value], [y_value], "o", color=colour_of(name), ms=each, mec="white", mew=0.6, zorder=4)
        counts = ui.axes_at(figure, x, y - strip - 0.06, side, strip)
        edges = np.linspace(0, 1, len(bins.count) + 1)
        counts.bar(edges[:-1], bins.count, width=np.diff(edges), align="edge", color=colour_of(name), alpha=0.45,
                   ec="white", lw=0.6)  # fmt: skip
        for one in (axes, counts):
            one.set_xlim(-0.02, 1.02)
            one.xaxis.set_major_locator(MultipleLocator(0.5))
            one.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_ylim(-0.07, 1.07)
        axes.yaxis.set_major_locator(MultipleLocator(0.5))
        axes.tick_params(labelbottom=False, labelleft=first)
        counts.set_yticks([])
        counts.grid(False)
        if first:
            axes.set_ylabel(y_label, labelpad=3, fontsize=8.5)
            counts.set_xlabel(x_label, loc="left", labelpad=1, fontsize=8.5)
    return ui.embed(figure, alt)


@dataclass(frozen=True)
class Group:
    """Points of one colour and marker."""

    name: str
    place: Float64Array
    colour: Any
    marker: str = "o"


def plane_panel(title: str, groups: Sequence[Group], subtitle: str, named: bool, alt: str) -> ui.Image:
    """Windows on a plane; ``words`` stand below the title, the groups' names at the right where ``named``."""
    side = 3.15
    width = ui.PANEL_INCHES
    figure = ui.new_figure(width, side + 0.75)
    axes = ui.axes_at(figure, 0.12, 0.1, side, side)
    axes.set_title(title, pad=22)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=8.5, color=ui.SOFT, va="bottom")
    # In turns: a group that is drawn whole would hide those before it.
    for turn in range(_TURNS):
        for group in groups:
            x, y = group.place[turn::_TURNS].T
            axes.plot(x, y, group.marker, color=group.colour, ms=3.1, mew=0, alpha=0.75)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=ui.GRID)
    for number, group in enumerate(groups if named else ()):
        y = 0.97 - 0.065 * number
        marks: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        axes.plot([1.04], [y], group.marker, color=group.colour, ms=5, mew=0, **marks)
        name = group.name if len(group.name) <= 15 else group.name[:14] + "…"
        axes.text(1.07, y, name, fontsize=8.5, va="center", transform=axes.transAxes)
    return ui.embed(figure, alt)


def person_colours(people: int) -> list[tuple[Any, str]]:
    """A colour and a marker each; neighbours in the list differ much."""
    hues = math.ceil(people / len(PEOPLE_MARKERS)) if people > 12 else people
    styles = []
    for number in range(people):
        hue = (number % hues) / hues
        styles.append((tuple(hsv_to_rgb((hue, 0.85, 0.8))), PEOPLE_MARKERS[number // hues % len(PEOPLE_MARKERS)]))
    return styles


def occlusion_bars(title: str, entries: Sequence[tuple[str, Occlusion]], alt: str) -> ui.Image:
    """Bars of the AUC lost without each named part, with intervals, in the given order; coloured by signal."""
    height = 0.21 * len(entries) + 1.0
    figure = ui.new_figure(ui.PANEL_INCHES, height)
    left, right = 1.0, 0.55
    axes = ui.axes_at(figure, left, 0.5, ui.PANEL_INCHES - left - right, height - 0.85)
    axes.set_title(title, pad=6, x=-left / (ui.PANEL_INCHES - left - right) + 0.02)
    axes.set_ylim(len(entries) - 0.4, -0.6)
    axes.axvline(0, color=ui.SOFT, lw=0.9, zorder=2)
    for y, (name, effect) in enumerate(entries):
        colour = colour_of(effect.signal)
        axes.barh([y], [effect.auc_drop], height=0.62, color=colour, alpha=0.55, zorder=1)
        if effect.ci is not None:
            axes.plot(effect.ci, [y, y], color=colour, lw=1.4, zorder=3)
        style: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "fontsize": 8.5}
        axes.text(-0.02, y, name, ha="right", **style)
        axes.text(1.02, y, f"{effect.auc_drop:+.3f}".replace("-", "\u2212"), ha="left", **style)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axes.set_xlabel("ROC-AUC lost", loc="right", labelpad=2)
    return ui.embed(figure, alt)


def scalp_map(
    title: str, entries: Sequence[ChannelOcclusion], positions: Mapping[str, tuple[float, float]], alt: str
) -> ui.Image:
    """Electrodes on a head seen from above, nose up; the deeper the colour, the more the AUC lost without it."""
    side = 3.3
    figure = ui.new_figure(ui.PANEL_INCHES, side + 0.6)
    axes = ui.axes_at(figure, 0.1, 0.1, side, side)
    axes.set_title(title, pad=6)
    axes.set_xlim(-1.2, 1.2)
    axes.set_ylim(-1.15, 1.25)
    axes.set_axis_off()
    for x in (-1.03, 1.03):
        axes.add_patch(Circle((x, 0), 0.09, fc="white", ec="#9a9a9a", lw=1.1, zorder=1))
    axes.add_patch(Circle((0, 0), 1.0, fc="white", ec="#9a9a9a", lw=1.1, zorder=2))
    axes.plot([-0.12, 0, 0.12], [0.993, 1.13, 0.993], color="#9a9a9a", lw=1.1)
    most = max([effect.auc_drop for effect in entries if math.isfinite(effect.auc_drop)], default=0.0)
    small = len(entries) > 32
    for effect in entries:
        x, y = positions[effect.channel]
        share = max(effect.auc_drop, 0.0) / most if most > 0 and math.isfinite(effect.auc_drop) else 0.0
        axes.add_patch(Circle((x, y), 0.075 if small else 0.112, fc=(ui.SHADE, share), ec="#9a9a9a", lw=0.8, zorder=3))
        axes.text(x, y, effect.channel, ha="center", va="center", fontsize=5.5 if small else 7.5, zorder=4,
                  color="white" if share > 0.6 else ui.INK)  # fmt: skip
    _scale(axes, most)
    return ui.embed(figure, alt)


def _scale(axes: Axes, most: float) -> None:
    """Key of the colours, at the right."""
    for number, share in enumerate((1.0, 0.75, 0.5, 0.25, 0.0)):
        y = 0.9 - 0.07 * number
        axes.plot([1.06], [y], "o", ms=8, mfc=(ui.SHADE, share), mec="#9a9a9a", mew=0.8, transform=axes.transAxes,
                  clip_on=False)  # fmt: skip
        words = f"{share * most:.3f}" if share else "0 or less"
        axes.text(1.1, y, words, fontsize=8, va="center", transform=axes.transAxes, clip_on=False)
    axes.text(1.04, 0.97, "AUC lost", fontsize=8.5, color=ui.SOFT, va="center", transform=axes.transAxes, clip_on=False)


def over_time(entries: Mapping[str, Sequence[PatchOcclusion]], alt: str) -> ui.Image:
    """AUC lost without each second of the window, a line a signal with its interval."""
    figure = ui.new_figure(ui.WIDE_INCHES, 2.5)
    axes = ui.axes_at(figure, 0.7, 0.5, ui.WIDE_INCHES - 0.9, 1.7)
    axes.axhline(0, color=ui.SOFT, lw=0.9, ls=(0, (4, 3)), zorder=1)
    for number, (signal, patches) in enumerate(entries.items()):
        colour = colour_of(signal)
        axes.text(0.005 + 0.06 * number, 1.05, label_of(signal, short=True), color=colour, weight="bold",
                  transform=axes.transAxes)  # fmt: skip
        middle = np.array([patch.start_s + patch.seconds / 2 for patch in patches])
        lost = np.array([patch.auc_drop for patch in patches])
        low, high = np.array([patch.ci or (math.nan, math.nan) for patch in patches]).T
        axes.fill_between(middle, low, high, color=colour, alpha=0.13, lw=0)
        axes.plot(middle, lost, "o-", color=colour, lw=1.6, ms=4, zorder=3)
    last = max(patch.start_s + patch.seconds for patches in entries.values() for patch in patches)
    axes.set_xlim(0, last)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axes.set_ylabel("ROC-AUC lost", loc="top", labelpad=4)
    axes.set_xlabel("seconds from the window's start", loc="right", labelpad=2)
    return ui.embed(figure, alt)


# Rows of the 10-10 system from front to back: where the row crosses the midline, and where the outermost electrodes of
# the 10-20 system's ring stand, in degrees from the nose. The vertex is the centre, 1 is nasion and inion.
_ROWS = {
    "Fp": (0.8, 0.0), "AF": (0.6, 36.0), "F": (0.4, 54.0), "FC": (0.2, 72.0), "FT": (0.2, 72.0), "C": (0.0, 90.0),
    "T": (0.0, 90.0), "CP": (-0.2, 108.0), "TP": (-0.2, 108.0), "P": (-0.4, 126.0), "PO": (-0.6, 144.0),
    "O": (-0.8, 180.0), "N": (1.0, 0.0), "I": (-1.0, 0.0),
}  # fmt: skip
_RING = 0.8
# The share of the way from the midline to the ring.
_WAY = {"1": 0.25, "3": 0.5, "5": 0.75, "7": 1.0, "9": 1.25}


def on_scalp(name: str) -> tuple[float, float] | None:
    """Position of an electrode of the 10-10 system on the drawn head; None for other names.

    Electrodes of a row lie evenly on the arc through the midline and the ring on both sides; distances from the vertex
    are angles, as in a map with the vertex as its pole.
    """
    row, site = name.rstrip("0123456789z"), name.removeprefix(name.rstrip("0123456789z"))
    if row not in _ROWS or not site:
        return None
    middle, degrees = _ROWS[row]
    if site == "z":
        return 0.0, middle
    number = int(site) if site != "z" else 0
    right = number % 2 == 0
    if row in ("Fp", "O"):
        turn = math.radians(18.0 if row == "Fp" else 162.0)
        x, y = _RING * math.sin(turn), _RING * math.cos(turn)
        return ((x if right else -x), y) if number in (1, 2) else None
    way = _WAY.get(str(number - 1 if right else number))
    if way is None or row in ("N", "I"):
        return None
    ends = [_sphere(abs(middle), 0.0 if middle >= 0 else 180.0), _sphere(_RING, degrees)]
    angle = math.acos(float(np.clip(ends[0] @ ends[1], -1, 1)))
    point = (math.sin((1 - way) * angle) * ends[0] + math.sin(way * angle) * ends[1]) / math.sin(angle)
    radius = math.acos(float(np.clip(point[2], -1, 1))) / (math.pi / 2)
    flat = math.hypot(point[0], point[1])
    x, y = radius * point[0] / flat, radius * point[1] / flat
    return (float(x) if right else -float(x)), float(y)


def _sphere(radius: float, degrees: float) -> Float64Array:
    """A point of the unit sphere by its distance from the vertex (1: a quarter of a circle) and degrees from the nose,
    to the right."""
    down, turn = radius * math.pi / 2, math.radians(degrees)
    return np.array([math.sin(down) * math.sin(turn), math.sin(down) * math.cos(turn), math.cos(down)])
