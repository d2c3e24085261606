"""Drawings of a sweep's trials: parallel coordinates, learning curves, and one strip of trials a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from physio_dist.report.drawing import INK, ROW_COLOURS, SOFT, Image, embed, new_figure
from physio_dist.report.fusion_plots import PANEL_INCHES, WIDE_INCHES, label_of, metric
from physio_dist.report.rundata import Floats
from physio_dist.report.sweepdata import Trial, same_config

# Light to dark in one direction of lightness, so that it reads without colour too; never as light as the paper.
SCALE = LinearSegmentedColormap.from_list("auc", ["#eed36a", "#9cc878", "#4aa58a", "#2f7fa8", "#2b55a0"])
AXES = (
    "head", "pooling", "components", "depth", "width", "dropout", "modality_dropout", "label_smoothing",
    "class_weight", "lr", "weight_decay",
)  # fmt: skip
TITLES = {
    "modality_dropout": "modality\ndropout",
    "class_weight": "class\nweight",
    "label_smoothing": "label\nsmoothing",
    "lr": "learning\nrate",
    "weight_decay": "weight\ndecay",
    "components": "compo-\nnents",
    "depth": "hidden\nlayers",
}
LOGARITHMIC = ("lr", "weight_decay")
# Part of the gap between two values of a choice over which the lines through it are spread.
FAN = 0.62


@dataclass(frozen=True)
class Axis:
    """One axis of the parallel coordinates: heights 0..1 of the trials (NaN: no value) and its marks."""

    name: str
    place: Floats
    marks: list[tuple[float, str]]


def parallel(trials: Sequence[Trial], chosen: Sequence[tuple[str, dict[str, Any]]], alt: str) -> Image:
    """Every trial as a line through its configuration to its best AUC on validation people.

    ``chosen``: label and configuration of what was selected; a configuration no trial has ends before the last axis.
    """
    order = sorted(trials, key=lambda trial: trial.val_auc if math.isfinite(trial.val_auc) else -1.0)
    # What was chosen was tried, so it has a line already; one that was not gets a place without a result.
    tried = [next((i for i, t in enumerate(order) if same_config(t.config, config)), None) for _, config in chosen]
    more = [config for (_, config), place in zip(chosen, tried, strict=True) if place is None]
    after = iter(range(len(order), len(order) + len(more)))
    picked = [next(after) if place is None else place for place in tried]
    configs = [trial.config for trial in order] + more
    value = np.array([trial.val_auc for trial in order] + [math.nan] * len(more))
    axes_ = [_axis(name, configs) for name in AXES if any(name in config for config in configs)]
    finite = value[np.isfinite(value)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low, high = (low, high) if high > low else (low - 0.01, high + 0.01)
    axes_.append(_result_axis(value, low, high))
    width, height = WIDE_INCHES, 4.3
    figure = new_figure(width, height)
    axes = figure.add_axes((0.125, 0.05, 0.735, 0.8))
    axes.set_xlim(0, max(len(axes_) - 1, 1))
    axes.set_ylim(-0.03, 1.03)
    axes.axis("off")
    for x, axis in enumerate(axes_):
        _draw_axis(axes, x, axis, len(axes_))
    heights = np.stack([axis.place for axis in axes_])
    for number, trial in enumerate(order):
        style: dict[str, Any] = {"lw": 1.3, "alpha": 0.9, "zorder": 3}
        if trial.stopped:
            style = {"lw": 0.7, "alpha": 0.45, "zorder": 2}
        shade = (value[number] - low) / (high - low)
        colour: Any = SCALE(shade) if math.isfinite(shade) else "#c9c9c9"
        axes.plot(range(len(axes_)), heights[:, number], color=colour, **style)
    _mark_chosen(axes, heights[:, picked], chosen)
    _colour_bar(axes, len(axes_) - 1)
    return embed(figure, alt)


def learning_curves(title: str, trials: Sequence[Trial], alt: str) -> Image:
    """AUC on validation people over the epochs, a line a trial; stopped ones end in a cross."""
    figure = new_figure(PANEL_INCHES, 3.0)
    axes = figure.add_axes((0.13, 0.16, 0.84, 0.72))
    axes.set_title(title, pad=7, x=-0.13)
    best = max(trials, key=lambda trial: trial.val_auc if math.isfinite(trial.val_auc) else -1.0)
    for trial in trials:
        if not trial.history:
            continue
        epoch, value = (np.array(column) for column in zip(*trial.history, strict=True))
        if trial is best:
            axes.plot(epoch, value, color=INK, lw=2.0, zorder=4)
            end: dict[str, Any] = {"va": "bottom", "ha": "right", "weight": "bold", "fontsize": 8.5}
            axes.annotate("best", (epoch[-1], value[-1]), xytext=(0, 4), textcoords="offset points", **end)
        elif trial.stopped:
            axes.plot(epoch, value, color=ROW_COLOURS["eeg"], lw=0.7, alpha=0.4)
            axes.plot(epoch[-1:], value[-1:], "x", color=ROW_COLOURS["eeg"], ms=3.5, alpha=0.6)
        else:
            axes.plot(epoch, value, color=ROW_COLOURS["eeg"], lw=1.1, alpha=0.8, zorder=3)
            if epoch.size == 1:
                axes.plot(epoch, value, "o", color=ROW_COLOURS["eeg"], ms=3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("epoch", loc="right", labelpad=1)
    return embed(figure, alt)


def trial_strips(title: str, trials: Sequence[Trial], rows: Sequence[str], alt: str) -> Image:
    """Best AUC on validation people of each trial, one line a row; hollow where the trial was stopped."""
    figure = new_figure(PANEL_INCHES, 3.0)
    axes = figure.add_axes((0.3, 0.16, 0.67, 0.72))
    axes.set_title(title, pad=7, x=-0.375)
    for y, row in enumerate(rows):
        mine = [trial for trial in trials if trial.row == row and math.isfinite(trial.val_auc)]
        colour = ROW_COLOURS.get(row, SOFT)
        axes.text(-0.03, y, label_of(row), transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=9)
        for number, trial in enumerate(sorted(mine, key=lambda trial: trial.val_auc)):
            # Neighbours in value stand on different heights: they stay apart without any draw.
            shift = 0.26 * ((number * 0.618034) % 1.0 - 0.5) * 2
            face = "white" if trial.stopped else colour
            axes.plot([trial.val_auc], [y + shift], "o", mec=colour, mfc=face, mew=0.9, ms=4.5, alpha=0.85)
        if mine:
            most = max(trial.val_auc for trial in mine)
            axes.text(most, y - 0.33, metric(most), ha="center", va="bottom", fontsize=8.5, weight="bold")
    axes.set_ylim(len(rows) - 0.5, -0.62)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_xlabel("AUC on validation people", loc="right", labelpad=1)
    return embed(figure, alt)


def _axis(name: str, configs: Sequence[dict[str, Any]]) -> Axis:
    """Heights of the configurations on one option; a choice of few values is spread a little around each."""
    given = [config.get(name) for config in configs]
    numbers = np.array([_number(value) for value in given])
    finite = numbers[np.isfinite(numbers)]
    if name in LOGARITHMIC and finite.size and finite.min() > 0:
        ends = np.log10([finite.min(), finite.max()])
        reach = float(ends[1] - ends[0])
        if reach > 0:
            return Axis(name, (np.log10(numbers) - ends[0]) / reach, _log_marks(float(ends[0]), float(ends[1])))
    known = [value for value in given if value is not None]
    if finite.size == len(known):
        levels: list[Any] = sorted(set(known))
    else:
        levels = sorted({str(value) for value in known})
        given = [None if value is None else str(value) for value in given]
    if not levels:
        return Axis(name, np.full(len(configs), np.nan), [])
    gap = 1 / len(levels)
    middle = {level: (number + 0.5) * gap for number, level in enumerate(levels)}
    place = np.full(len(configs), np.nan)
    for level in levels:
        mine = [number for number, value in enumerate(given) if value == level]
        # In order of the result (that of the trials), so that good lines run together.
        spread = np.linspace(-0.5, 0.5, len(mine)) * FAN * gap if len(mine) > 1 else np.zeros(1)
        place[mine] = middle[level] + spread
    return Axis(name, place, [(middle[level], word(level)) for level in levels])


def _result_axis(value: Floats, low: float, high: float) -> Axis:
    ticks = [t for t in MaxNLocator(nbins=6, steps=[1, 2, 5, 10]).tick_values(low, high) if low <= t <= high]
    marks = [((t - low) / (high - low), f"{t:.3g}") for t in ticks]
    return Axis("validation\nAUC", (value - low) / (high - low), marks)


def _draw_axis(axes: Axes, x: int, axis: Axis, total: int) -> None:
    axes.plot([x, x], [0, 1], color="#9a9a9a", lw=0.8, zorder=1)
    title = TITLES.get(axis.name, axis.name)
    axes.text(x, 1.045, title, ha="center", va="bottom", fontsize=9.5, weight="bold", linespacing=1.05)
    last = x == total - 1
    for y, mark in axis.marks:
        box: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.82, "pad": 0.8}
        if last:
            axes.text(x + 0.16, y, mark, ha="left", va="center", fontsize=8.5, color=SOFT)
            axes.plot([x, x + 0.12], [y, y], color=SOFT, lw=0.7, clip_on=False)
        elif not x:
            axes.text(-0.08, y, mark, ha="right", va="center", fontsize=8.5)
        else:
            axes.text(x + 0.04, y, mark, ha="left", va="center", fontsize=8.5, zorder=6, bbox=box)


def _mark_chosen(axes: Axes, heights: Floats, chosen: Sequence[tuple[str, dict[str, Any]]]) -> None:
    last = heights.shape[0] - 1
    ends: list[tuple[float, str]] = []
    for number, (label, _) in enumerate(chosen):
        line: dict[str, Any] = {"color": INK, "lw": 1.9, "zorder": 5, "marker": "o", "ms": 4.5, "clip_on": False}
        axes.plot(range(last + 1), heights[:, number], color="white", lw=4.2, alpha=0.85, zorder=4.5, clip_on=False)
        axes.plot(range(last + 1), heights[:, number], **line)
        if math.isfinite(heights[last, number]):
            ends.append((float(heights[last, number]), label))
    top = 1.1
    for y, label in sorted(ends, reverse=True):
        place = min(y, top - 0.055)
        axes.plot([last + 0.05, last + 0.58, last + 0.66], [y, y, place], color=INK, lw=0.7, clip_on=False, zorder=6)
        axes.text(last + 0.69, place, label, ha="left", va="center", fontsize=8.5, weight="bold")
        top = place


def _colour_bar(axes: Axes, x: int) -> None:
    steps = np.linspace(0, 1, 61)
    for low, high in pairwise(steps.tolist()):
        axes.plot([x, x], [low, high], color=SCALE(low), lw=7, solid_capstyle="butt", zorder=4, clip_on=False)


def _log_marks(low: float, high: float) -> list[tuple[float, str]]:
    steps = (1, 3) if high - low < 2.6 else (1,)
    values = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
    inside = [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
    return [((math.log10(value) - low) / (high - low), word(value)) for value in inside]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def word(value: Any) -> str:
    """A value of an option as a mark: short, without underscores."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f"{value:.2g}".replace("e-0", "e-") if isinstance(value, float) else f"{value}"
    text = "".join(c for c in str(value) if c.isprintable()).replace("_", " ")
    return text if len(text) <= 18 else text[:17] + "…"
