"""Drawings of a sweep's results: intervals, curves, confusion matrices, people, permuted labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from physio_dist.report.components import (
    GRID,
    INK,
    PANEL_INCHES,
    SHADE,
    SOFT,
    WIDE_INCHES,
    Image,
    axes_at,
    embed,
    metric,
    new_figure,
    span,
)
from physio_dist.runs.sweep_results import BOUND
from physio_dist.runtime.arrays import Float64Array, Int64Array

# Row of results.json -> colour, label, and label where there is little room.
ROWS = {
    "majority": ("#9a9a9a", "Majority class", "majority"),
    "untrained": ("#CC79A7", "Untrained encoders", "untrained"),
    "handmade": ("#009E73", "Hand-made features", "hand-made"),
    "ecg": ("#D55E00", "ECG alone", "ECG"),
    "eeg": ("#0072B2", "EEG alone", "EEG"),
    "fused": ("#1c1c1c", "Fused ECG + EEG", "fused"),
    "fused_ecg_only": ("#E69F00", "Fused, ECG shown", "fused, ECG"),
    "fused_eeg_only": ("#56B4E9", "Fused, EEG shown", "fused, EEG"),
    "noise_ecg": ("#6f8fa6", "EEG + noise for ECG", "EEG+noise"),
    "noise_eeg": ("#a68a6f", "ECG + noise for EEG", "ECG+noise"),
    "finetuned": ("#8c564b", "Fine-tuned encoders", "fine-tuned"),
}
# From this share on white figures read better than black ones on it.
DARK_FROM = 0.72
# More people than this stand in one wide drawing each; up to it two drawings stand side by side.
FEW_PEOPLE = 14
MOST_NAMES = 110
MARKERS = {"ecg": "s", "eeg": "^", "fused": "o"}


@dataclass(frozen=True)
class Interval:
    """A line of the forest plot: a value with its interval, the folds' own values, and the best possible (or NaN)."""

    name: str
    value: float
    ci: tuple[float, float] | None
    folds: list[float]
    bound: float


@dataclass(frozen=True)
class Curve:
    """A curve over rates in 0..1, and what its label says; ``name`` as in results.json."""

    name: str
    x: Float64Array
    y: Float64Array
    value: float


def label_of(name: str, short: bool = False) -> str:
    """Label of a row of results.json on the page."""
    row = name.removeprefix(BOUND)
    label = ROWS[row][2 if short else 1] if row in ROWS else row
    return label if row == name else f"best: {label}" if short else f"Best possible: {label}"


def colour_of(name: str) -> str:
    """Colour of a row; a bound has that of the row it bounds."""
    row = name.removeprefix(BOUND)
    return ROWS[row][0] if row in ROWS else SOFT


def forest(lines: Sequence[Interval], chance: float, alt: str) -> Image:
    """One line a row: dot and interval, faint ticks for the folds, an open diamond for the best possible."""
    height = 0.36 * len(lines) + 0.85
    figure = new_figure(WIDE_INCHES, height)
    left, right = 1.75, 2.0
    axes = axes_at(figure, left, 0.5, WIDE_INCHES - left - right, height - 0.85)
    drawn = [x for line in lines for x in (line.value, *(line.ci or ()), line.bound, *line.folds)]
    values = np.array([*drawn, chance])
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(values.max())
    room = 0.04 * (high - low) or 0.05
    axes.set_xlim(low - room, high + room)
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.axvline(chance, color=SOFT, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axes.text(chance, 1.0, "chance", transform=axes.get_xaxis_transform(), ha="center", va="bottom",
              fontsize=8.5, color=SOFT)  # fmt: skip
    for y, line in enumerate(lines):
        colour, fused = colour_of(line.name), line.name == "fused"
        weight: dict[str, Any] = {"weight": "bold"} if fused else {}
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center"}
        axes.text(-0.015, y, label_of(line.name), ha="right", **place, **weight)
        axes.text(1.03, y, metric(line.value), ha="left", **place, **weight)
        axes.text(1.11, y, span(line.ci), ha="left", color=SOFT, **place)
        ticks: dict[str, Any] = {"marker": "|", "ls": "", "ms": 7, "mew": 1.0, "alpha": 0.4}
        axes.plot(line.folds, [y] * len(line.folds), color=colour, zorder=2, **ticks)
        if line.ci is not None:
            axes.plot(line.ci, [y, y], color=colour, lw=2.6 if fused else 1.8, zorder=3)
        axes.plot([line.value], [y], "o", color=colour, ms=8 if fused else 6.5, mec="white", mew=0.8, zorder=5)
        axes.plot([line.bound], [y], "D", mfc="white", mec=colour, mew=1.3, ms=6, zorder=4)
    for place_x, words in ((1.03, "AUC"), (1.11, "95 % interval")):
        axes.text(place_x, 1.0, words, transform=axes.transAxes, ha="left", va="bottom", fontsize=8.5, color=SOFT)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10]))
    axes.set_xlabel("ROC-AUC over all held-out people", loc="right", labelpad=2)
    return embed(figure, alt)


def roc_panel(title: str, curves: Sequence[Curve], alt: str) -> Image:
    """ROC curves with their areas named at the right, best first."""
    figure, axes = _square(title, "false positive rate", "true positive rate")
    axes.plot([0, 1], [0, 1], color=SOFT, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axes.text(0.64, 0.6, "chance", rotation=45, rotation_mode="anchor", ha="left", va="top", fontsize=8.5, color=SOFT)
    _curves(axes, curves, "AUC")
    return embed(figure, alt)


def recall_panel(title: str, curves: Sequence[Curve], base: float, alt: str) -> Image:
    """Precision over recall with the areas named at the right; ``base`` is the share of positive windows."""
    figure, axes = _square(title, "recall", "precision")
    axes.axhline(base, color=SOFT, lw=0.9, ls=(0, (4, 3)), zorder=1)
    axes.text(0.99, base - 0.015, f"chance {metric(base)}", ha="right", va="top", fontsize=8.5, color=SOFT)
    _curves(axes, curves, "PR-AUC")
    return embed(figure, alt)


def confusions(tables: Sequence[tuple[str, Int64Array]], classes: Sequence[str], alt: str) -> Image:
    """Confusion matrices side by side: share of each true class in colour, counts below the shares."""
    k = len(classes)
    across = min(len(tables), 4 if k <= 3 else 2)
    down = math.ceil(len(tables) / across)
    names = [_clip(name, 14) for name in classes]
    long = 0.085 * max(len(name) for name in names)
    # Only the first of a line has names at its left.
    left, gap = 0.5 + min(long, 1.15), 0.35
    side = min((WIDE_INCHES - left - 0.1 - (across - 1) * gap) / across, 3.3)
    turned = long > 0.95 * side / k
    below = 0.35 + (0.6 * min(long, 1.2) + 0.1 if turned else 0.2)
    slot = side + 0.4 + below
    height = down * slot
    figure = new_figure(WIDE_INCHES, height)
    for number, (row, table) in enumerate(tables):
        x, y = left + (number % across) * (side + gap), height - (number // across) * slot - 0.32 - side
        axes = axes_at(figure, x, y, side, side)
        axes.set_title(label_of(row), pad=5)
        _matrix(axes, table, size=float(np.clip(15.0 * side / k, 5.0, 11.0)))
        axes.set_xticks(range(k), names, rotation=35 if turned else 0, ha="right" if turned else "center")
        axes.set_yticks(range(k), names if number % across == 0 else [""] * k)
        axes.tick_params(length=0, pad=2)
        axes.set_xlabel("predicted", labelpad=1)
        if number % across == 0:
            axes.set_ylabel("true", labelpad=3)
    return embed(figure, alt)


def people_panel(title: str, names: Sequence[str], rows: Mapping[str, Float64Array], chance: float, alt: str) -> Image:
    """A column a person, by the gain of the fused row over the better single one; ``rows``: name -> ``[person]``."""
    fused, better = rows["fused"], best_single(rows)
    gain = fused - better
    order = np.lexsort((fused, gain))
    n = len(names)
    wide = n > FEW_PEOPLE
    width, height = (WIDE_INCHES, 3.6) if wide else (PANEL_INCHES, 3.7)
    figure = new_figure(width, height)
    axes = axes_at(figure, 0.6, 0.8, width - 0.7, height - 1.55)
    axes.set_title(title, pad=38, x=-0.5 / (width - 0.7))
    size = float(np.clip(58 * (width - 0.7) / n * 0.3, 2.4, 6.5))
    axes.grid(False)
    axes.grid(axis="y")
    axes.axhline(chance, color=SOFT, lw=0.9, ls=(0, (4, 3)), zorder=1)
    for x, person in enumerate(order.tolist()):
        up = gain[person] > 0
        style: dict[str, Any] = {"color": INK, "lw": 1.6} if up else {"color": "#9a9a9a", "lw": 1.0, "ls": ":"}
        axes.plot([x, x], [better[person], fused[person]], zorder=2, **style)
        for row in ("ecg", "eeg"):
            if row in rows:
                face: dict[str, Any] = {"mfc": "white", "mec": colour_of(row), "mew": 1.1, "ls": ""}
                axes.plot([x], [rows[row][person]], MARKERS[row], ms=size, zorder=3, **face)
        axes.plot([x], [fused[person]], "o", ms=size + 0.7, mfc=INK if up else "white", mec=INK, mew=1.2, zorder=4)
    _people_axis(axes, [names[person] for person in order.tolist()], width - 0.7)
    low = float(np.nanmin([float(np.nanmin(np.stack(list(rows.values())))), chance]))
    axes.set_ylim(low - 0.05 * (1 - low), 1.0 + 0.05 * (1 - low))
    _divide(axes, int((gain <= 0).sum()), n)
    _key(axes, rows, width - 0.7, height - 1.55)
    return embed(figure, alt)


def permuted_strip(values: Float64Array, observed: float, alt: str) -> Image:
    """AUCs under permuted labels, one dot each where few, as a histogram where many; the observed one beside them."""
    figure = new_figure(WIDE_INCHES, 2.0)
    axes = axes_at(figure, 0.3, 0.52, WIDE_INCHES - 0.6, 1.1)
    finite = np.array([*values.tolist(), 0.5, *([observed] if math.isfinite(observed) else [])])
    low, high = float(finite.min()), float(finite.max())
    room = 0.08 * (high - low) or 0.05
    axes.set_xlim(low - room, high + room)
    top = _heap(axes, values, low - room, high + room)
    axes.axvline(0.5, color=SOFT, lw=0.9, ls=(0, (4, 3)), zorder=1)
    _beside(axes, 0.5, top, "chance", 1, {"fontsize": 8.5, "color": SOFT})
    if math.isfinite(observed):
        axes.axvline(observed, color=INK, lw=2.2, zorder=4)
        side = -1 if observed > (low + high) / 2 else 1
        _beside(axes, observed, top, f"observed {metric(observed)}", side, {"fontsize": 9.5, "weight": "bold"})
    axes.set_yticks([])
    axes.set_ylim(0, top * 1.04)
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10]))
    axes.set_xlabel("ROC-AUC of the fused row", loc="right", labelpad=2)
    return embed(figure, alt)


def best_single(rows: Mapping[str, Float64Array]) -> Float64Array:
    """The higher of the single modalities for each person, NaN where neither has a value."""
    singles = [rows[name] for name in ("ecg", "eeg") if name in rows]
    best = singles[0] if len(singles) == 1 else np.fmax(singles[0], singles[1])
    return np.asarray(best, np.float64)


def _square(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    side = 2.75
    figure = new_figure(PANEL_INCHES, side + 0.95)
    axes = axes_at(figure, 0.66, 0.55, side, side)
    axes.set_title(title, pad=8, x=-0.6 / side)
    axes.set_xlim(-0.012, 1.012)
    axes.set_ylim(-0.012, 1.012)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MultipleLocator(0.25))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel(x_label, loc="right", labelpad=2)
    axes.set_ylabel(y_label, loc="top", labelpad=5)
    return figure, axes


def _curves(axes: Axes, curves: Sequence[Curve], what: str) -> None:
    for curve in curves:
        bound, fused = curve.name.startswith(BOUND), curve.name == "fused"
        style: dict[str, Any] = {"lw": 1.1, "ls": (0, (2, 1.4))} if bound else {"lw": 2.4 if fused else 1.4}
        axes.plot(curve.x, curve.y, color=colour_of(curve.name), zorder=5 if fused else 3, **style)
    ordered = sorted(curves, key=lambda curve: -curve.value if math.isfinite(curve.value) else 1.0)
    marks: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
    axes.text(1.05, 1.0, what, fontsize=8.5, color=SOFT, va="center", transform=axes.transAxes)
    for number, curve in enumerate(ordered):
        y = 0.93 - 0.068 * number
        bound = curve.name.startswith(BOUND)
        dash: Any = (0, (2, 1.4)) if bound else "-"
        axes.plot([1.05, 1.105], [y, y], color=colour_of(curve.name), lw=1.4 if bound else 2.4, ls=dash, **marks)
        weight = "bold" if curve.name == "fused" else "normal"
        words = f"{metric(curve.value)} {label_of(curve.name, short=True)}"
        axes.text(1.125, y, words, fontsize=8.5, va="center", weight=weight, transform=axes.transAxes)


def _matrix(axes: Axes, table: Int64Array, size: float) -> None:
    k = len(table)
    total = table.sum(axis=1, keepdims=True)
    share = np.divide(table, total, out=np.full(table.shape, np.nan), where=total > 0)
    axes.set_xlim(-0.5, k - 0.5)
    axes.set_ylim(k - 0.5, -0.5)
    axes.grid(False)
    for true in range(k):
        for predicted in range(k):
            part = float(share[true, predicted])
            finite = math.isfinite(part)
            corner = (predicted - 0.5, true - 0.5)
            colour: Any = (SHADE, part) if finite else "#f4f4f4"
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", lw=1.5))
            words = f"{100 * part:.0f} %\n{table[true, predicted]:,}" if finite else "–"
            dark = finite and part > DARK_FROM
            axes.text(predicted, true, words, ha="center", va="center", fontsize=size, linespacing=1.15,
                      color="white" if dark else INK, weight="bold" if true == predicted else "normal")  # fmt: skip
    for spine in axes.spines.values():
        spine.set_visible(False)


def _people_axis(axes: Axes, names: Sequence[str], inches: float) -> None:
    n = len(names)
    axes.set_xlim(-0.7, n - 0.3)
    if n > MOST_NAMES:
        axes.set_xticks([])
        axes.set_xlabel(f"{n} people, by what fusion gains", loc="right", labelpad=4)
        return
    size = float(np.clip(72 * inches / n * 0.8, 4.5, 8.5))
    axes.set_xticks(range(n), list(names), rotation=90, fontsize=size, family="monospace")
    axes.tick_params(axis="x", length=0, pad=2)


def _divide(axes: Axes, losses: int, n: int) -> None:
    """Line before the people on whom fusion helps, and the number on each side."""
    place: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "bottom", "fontsize": 8.5}
    if 0 < losses < n:
        axes.axvline(losses - 0.5, color=SOFT, lw=0.8, zorder=1)
    if losses:
        axes.text(-0.7, 1.02, f"fused not better: {losses}", ha="left", color=SOFT, **place)
    if losses < n:
        axes.text(n - 0.3, 1.02, f"fused better: {n - losses} of {n}", ha="right", weight="bold", **place)


def _key(axes: Axes, rows: Mapping[str, Float64Array], inches: float, height: float) -> None:
    """The marks and what they stand for, in one line under the title."""
    x, y = 0.0, 1 + 0.33 / height
    for name in ("ecg", "eeg", "fused"):
        if name not in rows:
            continue
        mark: dict[str, Any] = {"mec": colour_of(name), "mfc": INK if name == "fused" else "white"}
        mark |= {"transform": axes.transAxes, "clip_on": False, "ls": "", "mew": 1.2, "ms": 6}
        axes.plot([x + 0.05 / inches], [y], MARKERS[name], **mark)
        words = "fused (filled: better)" if name == "fused" else f"{label_of(name, short=True)} alone"
        axes.text(x + 0.16 / inches, y, words, transform=axes.transAxes, va="center", fontsize=8.5)
        x += (0.3 + 0.075 * len(words)) / inches


def _heap(axes: Axes, values: Float64Array, low: float, high: float) -> float:
    """Dots stacked in bins, or bars where there are many; returns the height of the highest heap."""
    bins = 90 if values.size <= 60 else 40
    edges = np.linspace(low, high, bins + 1)
    number = np.clip(np.digitize(values, edges) - 1, 0, bins - 1)
    height = np.bincount(number, minlength=bins)
    if values.size > 60:
        axes.bar(edges[:-1], height, width=np.diff(edges), align="edge", color=SHADE, alpha=0.6, ec="white", lw=0.5)
        return max(1.0, float(height.max())) * 1.35
    stacked: dict[int, int] = {}
    top = max(5.0, float(height.max()) + 1.5)
    for place in sorted(number.tolist()):
        stacked[place] = stacked.get(place, 0) + 1
        middle = (edges[place] + edges[place + 1]) / 2
        axes.plot([middle], [stacked[place] - 0.4], "o", color=SHADE, ms=6, mec="white", mew=0.6, clip_on=False)
    axes.axhline(0, color=GRID)
    return top


def _beside(axes: Axes, x: float, y: float, words: str, side: int, style: Mapping[str, Any]) -> None:
    """Words a little to the right (``side`` 1) or left (-1) of an upright line, hanging from ``y``."""
    align = "left" if side > 0 else "right"
    place: dict[str, Any] = {"textcoords": "offset points", "ha": align, "va": "top"}
    axes.annotate(words, (x, y), xytext=(5 * side, 0), **place, **style)


def _clip(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
