"""Search section of a sweep's page: configurations that were tried, their learning curves, and the selection."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from physio_dist.report import components as ui
from physio_dist.report.sweep_data import ROWS, Sweep
from physio_dist.report.sweep_plots import colour_of, label_of
from physio_dist.runs.sweep_results import TRIALS, FoldResult, ResultRow, TrialResult
from physio_dist.runs.typed_json import printable
from physio_dist.runtime.arrays import Float64Array

TITLE, ANCHOR = "Sweep", "sweep"
# More folds than this are listed folded away.
MOST_FOLDS = 12
# More labels than this would run into each other beside the drawing.
MOST_LABELS = 14
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


def search(sweep: Sweep) -> ui.Section:
    """Parallel coordinates of the fused row's trials, learning curves, the other rows' trials, what was chosen."""
    if not sweep.trials:
        return ui.Section(TITLE, ANCHOR, missing=f"The run holds no {TRIALS}, so its configurations are not drawn.")
    rows = [name for name in reversed(ROWS) if any(trial.row == name for trial in sweep.trials)]
    rows += sorted({trial.row for trial in sweep.trials} - set(rows))
    figures = []
    fused = [trial for trial in sweep.trials if trial.row == "fused"]
    if any(math.isfinite(trial.val_auc) for trial in fused):
        figures.append(_coordinates(sweep, fused))
    figures += _progress(sweep, fused, rows)
    tables = [_trial_table(sweep, rows)]
    details = []
    row = sweep.row("fused")
    if row is not None and any(fold.config for fold in row.per_fold):
        if len(row.per_fold) <= MOST_FOLDS:
            tables.append(_chosen_table(row.per_fold))
        else:
            details.append(("What each fold chose for the fused row", _chosen_listing(row.per_fold)))
    selection = sweep.results.selection
    text = [] if selection is None else [f"How it was selected: {selection.rule.rstrip('.')}."]
    notes = [f"The last line of {TRIALS} was not finished and is left out."] if sweep.unfinished else []
    if sweep.option("tune.search") == "optuna":
        notes.append("What Optuna proposed was tried in one fold only: the AUC of such a trial is no mean over folds.")
    lost = sum(not math.isfinite(trial.val_auc) for trial in sweep.trials)
    if lost:
        notes.append(f"{lost} of {len(sweep.trials)} trials came to no validation AUC and are not drawn.")
    return ui.Section(TITLE, ANCHOR, text=text, figures=figures, tables=tables, notes=notes, details=details)


def chosen_of(row: ResultRow | None) -> list[tuple[str, dict[str, Any]]]:
    """Every configuration some fold chose, with a label that says which folds, in order of the folds."""
    by_config: dict[str, tuple[list[str], dict[str, Any]]] = {}
    folds = [] if row is None else [fold for fold in row.per_fold if fold.config]
    for fold in folds:
        assert fold.config is not None
        by_config.setdefault(json.dumps(fold.config, sort_keys=True), ([], fold.config))[0].append(fold.fold)
    made = []
    for number, (names, config) in enumerate(by_config.values()):
        if len(folds) == 1:
            label = "chosen"
        elif len(names) == len(folds):
            label = "all folds"
        elif len(names) <= 2:
            label = f"fold{'s' * (len(names) > 1)} {', '.join(names)}"
        else:
            label = f"{len(names)} folds"
        made.append((label if number < MOST_LABELS else "", config))
    return made


def _coordinates(sweep: Sweep, fused: Sequence[TrialResult]) -> ui.Figure:
    scored = [trial for trial in fused if math.isfinite(trial.val_auc)]
    selections = chosen_of(sweep.row("fused"))
    best = max(scored, key=lambda trial: trial.val_auc)
    worst = min(trial.val_auc for trial in scored)
    alt = (
        f"Parallel coordinates of {len(scored)} configurations; validation AUC from {ui.metric(worst)} to "
        f"{ui.metric(best.val_auc)}; the best: {_in_words(best.config)}."
    )
    caption = (
        f"Each line is one of the {len(scored)} configurations tried for the fused row, through its choices to the "
        "best AUC it reached on validation people (mean over folds and inner splits), which also gives its colour: "
        "dark is good. Thin and faint: stopped early. Lines through the same choice are spread a little, better ones "
        "higher; learning rate and weight decay are logarithmic; without hidden layers the width has no effect."
    )
    if selections:
        caption += (
            " Black: what was chosen and then tested on held-out people. Each fold chooses on its own validation "
            "people, so its choice need not be the best on average."
        )
    return ui.Figure([parallel(scored, selections, alt)], caption, wide=True, title="Fused.")


def _progress(sweep: Sweep, fused: Sequence[TrialResult], rows: Sequence[str]) -> list[ui.Figure]:
    images, parts = [], []
    curves = [trial for trial in fused if any(math.isfinite(value) for _, value in trial.history)]
    if curves:
        stopped = sum(trial.stopped for trial in curves)
        alt = f"Validation AUC over the epochs of {len(curves)} fused trials, {stopped} of them stopped early."
        images.append(learning_curves("Fused: validation AUC over the epochs", curves, alt))
        parts.append(
            f"Left: AUC on validation people after each epoch, a line for each of the {len(curves)} trials of the "
            "fused row; a cross ends one that was stopped early, black is the best."
        )
    scored = [trial for trial in sweep.trials if math.isfinite(trial.val_auc)]
    if scored:
        best = {row: max((t.val_auc for t in scored if t.row == row), default=math.nan) for row in rows}
        alt = "Best validation AUC: " + ", ".join(f"{label_of(row)} {ui.metric(best[row])}" for row in rows) + "."
        images.append(trial_strips("Best AUC of every trial", scored, rows, alt))
        side = "Right: each" if curves else "Each"
        parts.append(
            f"{side} dot is a trial's best AUC on validation people, hollow where it was stopped early, the row's best "
            "in figures. These are the numbers selection looked at: they flatter, unlike those on held-out people."
        )
    return [ui.Figure(images, " ".join(parts))] if images else []


def _trial_table(sweep: Sweep, rows: Sequence[str]) -> ui.Table:
    head = ["Row", "Trials", "Stopped early", "Epochs", "Best validation AUC", "Held\u2011out AUC", "Time"]
    lines = []
    for name in rows:
        trials = [trial for trial in sweep.trials if trial.row == name]
        values = [trial.val_auc for trial in trials if math.isfinite(trial.val_auc)]
        seconds = [trial.seconds for trial in trials if math.isfinite(trial.seconds)]
        row = sweep.row(name)
        texts = [
            f"{len(trials):,}",
            f"{sum(trial.stopped for trial in trials):,}",
            f"{sum(trial.epochs for trial in trials):,}",
            ui.metric(max(values, default=math.nan)),
            ui.metric(math.nan if row is None else row.auc),
            ui.duration(sum(seconds)) if seconds else "–",
        ]
        lines.append([ui.Cell(label_of(name)), *(ui.Cell(text) for text in texts)])
    total = sum(trial.seconds for trial in sweep.trials if math.isfinite(trial.seconds))
    caption = (
        f"{len(sweep.trials):,} trials, {sum(trial.stopped for trial in sweep.trials):,} stopped early, "
        f"{ui.duration(total)} if they had run one after the other."
    )
    return ui.Table(head, lines, caption)


def _chosen_table(folds: Sequence[FoldResult]) -> ui.Table:
    names = [name for name in AXES if any(fold.config and name in fold.config for fold in folds)]
    titles = [TITLES.get(name, name).replace("\n", " ").capitalize() for name in names]
    head = ["Fold", "People", "Windows", "Held\u2011out AUC", *titles, "Epoch"]
    lines = []
    for fold in folds:
        config = fold.config or {}
        texts = [_or_dash(fold.people), _or_dash(fold.windows), ui.metric(fold.auc)]
        texts += [word(config[name]) if name in config else "–" for name in names]
        lines.append([ui.Cell(fold.fold), *(ui.Cell(text) for text in [*texts, _or_dash(fold.epoch)])])
    caption = "What each fold chose for the fused row on its own validation people, and the result on those held out."
    return ui.Table(head, lines, caption)


def _chosen_listing(folds: Sequence[FoldResult]) -> str:
    return "\n".join(
        f"fold {fold.fold}: held-out AUC {ui.metric(fold.auc)}, epoch {_or_dash(fold.epoch)}, "
        f"{_in_words(fold.config or {})}"
        for fold in folds
    )


def _in_words(config: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {word(value)}" for name, value in config.items())


def _or_dash(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


@dataclass(frozen=True)
class Axis:
    """One axis of the parallel coordinates: heights 0..1 of the trials (NaN: no value) and its marks."""

    name: str
    place: Float64Array
    marks: list[tuple[float, str]]


def parallel(trials: Sequence[TrialResult], chosen: Sequence[tuple[str, dict[str, Any]]], alt: str) -> ui.Image:
    """Every trial as a line through its configuration to its best AUC on validation people.

    ``chosen``: label and configuration of what was selected; a configuration no trial has ends before the last axis.
    """
    order = sorted(trials, key=lambda trial: trial.val_auc if math.isfinite(trial.val_auc) else -1.0)
    # What was chosen was tried, so it has a line already; one that was not gets a place without a result.
    indices = [next((i for i, t in enumerate(order) if t.config == config), None) for _, config in chosen]
    more = [config for (_, config), place in zip(chosen, indices, strict=True) if place is None]
    after = iter(range(len(order), len(order) + len(more)))
    selected = [next(after) if place is None else place for place in indices]
    configs = [trial.config for trial in order] + more
    value = np.array([trial.val_auc for trial in order] + [math.nan] * len(more))
    axes_ = [_axis(name, configs) for name in AXES if any(name in config for config in configs)]
    finite = value[np.isfinite(value)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    low, high = (low, high) if high > low else (low - 0.01, high + 0.01)
    axes_.append(_result_axis(value, low, high))
    width, height = ui.WIDE_INCHES, 4.3
    figure = ui.new_figure(width, height)
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
    _mark_chosen(axes, heights[:, selected], chosen)
    _colour_bar(axes, len(axes_) - 1)
    return ui.embed(figure, alt)


def learning_curves(title: str, trials: Sequence[TrialResult], alt: str) -> ui.Image:
    """AUC on validation people over the epochs, a line a trial; stopped ones end in a cross."""
    figure = ui.new_figure(ui.PANEL_INCHES, 3.0)
    axes = figure.add_axes((0.13, 0.16, 0.84, 0.72))
    axes.set_title(title, pad=7, x=-0.13)
    best = max(trials, key=lambda trial: trial.val_auc if math.isfinite(trial.val_auc) else -1.0)
    for trial in trials:
        if not trial.history:
            continue
        epoch, value = (np.array(column) for column in zip(*trial.history, strict=True))
        if trial is best:
            axes.plot(epoch, value, color=ui.INK, lw=2.0, zorder=4)
            end: dict[str, Any] = {"va": "bottom", "ha": "right", "weight": "bold", "fontsize": 8.5}
            axes.annotate("best", (epoch[-1], value[-1]), xytext=(0, 4), textcoords="offset points", **end)
        elif trial.stopped:
            axes.plot(epoch, value, color=colour_of("eeg"), lw=0.7, alpha=0.4)
            axes.plot(epoch[-1:], value[-1:], "x", color=colour_of("eeg"), ms=3.5, alpha=0.6)
        else:
            axes.plot(epoch, value, color=colour_of("eeg"), lw=1.1, alpha=0.8, zorder=3)
            if epoch.size == 1:
                axes.plot(epoch, value, "o", color=colour_of("eeg"), ms=3)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("epoch", loc="right", labelpad=1)
    return ui.embed(figure, alt)


def trial_strips(title: str, trials: Sequence[TrialResult], rows: Sequence[str], alt: str) -> ui.Image:
    """Best AUC on validation people of each trial, one line a row; hollow where the trial was stopped."""
    figure = ui.new_figure(ui.PANEL_INCHES, 3.0)
    axes = figure.add_axes((0.3, 0.16, 0.67, 0.72))
    axes.set_title(title, pad=7, x=-0.375)
    for y, row in enumerate(rows):
        scored = [trial for trial in trials if trial.row == row and math.isfinite(trial.val_auc)]
        colour = colour_of(row)
        axes.text(-0.03, y, label_of(row), transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=9)
        for number, trial in enumerate(sorted(scored, key=lambda trial: trial.val_auc)):
            # Neighbours in value stand on different heights: they stay apart without any draw.
            shift = 0.26 * ((number * 0.618034) % 1.0 - 0.5) * 2
            face = "white" if trial.stopped else colour
            axes.plot([trial.val_auc], [y + shift], "o", mec=colour, mfc=face, mew=0.9, ms=4.5, alpha=0.85)
        if scored:
            most = max(trial.val_auc for trial in scored)
            axes.text(most, y - 0.33, ui.metric(most), ha="center", va="bottom", fontsize=8.5, weight="bold")
    axes.set_ylim(len(rows) - 0.5, -0.62)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    axes.set_xlabel("AUC on validation people", loc="right", labelpad=1)
    return ui.embed(figure, alt)


def _axis(name: str, configs: Sequence[dict[str, Any]]) -> Axis:
    """Heights of the configurations on one option; a choice of few values is spread a little around each."""
    options = [config.get(name) for config in configs]
    numbers = np.array([_number(value) for value in options])
    finite = numbers[np.isfinite(numbers)]
    if name in LOGARITHMIC and finite.size and finite.min() > 0:
        ends = np.log10([finite.min(), finite.max()])
        reach = float(ends[1] - ends[0])
        if reach > 0:
            return Axis(name, (np.log10(numbers) - ends[0]) / reach, _log_marks(float(ends[0]), float(ends[1])))
    present = [value for value in options if value is not None]
    if finite.size == len(present):
        levels: list[Any] = sorted(set(present))
    else:
        levels = sorted({str(value) for value in present})
        options = [None if value is None else str(value) for value in options]
    if not levels:
        return Axis(name, np.full(len(configs), np.nan), [])
    gap = 1 / len(levels)
    middle = {level: (number + 0.5) * gap for number, level in enumerate(levels)}
    place = np.full(len(configs), np.nan)
    for level in levels:
        members = [number for number, value in enumerate(options) if value == level]
        # In order of the result (that of the trials), so that good lines run together.
        spread = np.linspace(-0.5, 0.5, len(members)) * FAN * gap if len(members) > 1 else np.zeros(1)
        place[members] = middle[level] + spread
    return Axis(name, place, [(middle[level], word(level)) for level in levels])


def _result_axis(value: Float64Array, low: float, high: float) -> Axis:
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
            axes.text(x + 0.16, y, mark, ha="left", va="center", fontsize=8.5, color=ui.SOFT)
            axes.plot([x, x + 0.12], [y, y], color=ui.SOFT, lw=0.7, clip_on=False)
        elif not x:
            axes.text(-0.08, y, mark, ha="right", va="center", fontsize=8.5)
        else:
            axes.text(x + 0.04, y, mark, ha="left", va="center", fontsize=8.5, zorder=6, bbox=box)


def _mark_chosen(axes: Axes, heights: Float64Array, chosen: Sequence[tuple[str, dict[str, Any]]]) -> None:
    last = heights.shape[0] - 1
    ends: list[tuple[float, str]] = []
    for number, (label, _) in enumerate(chosen):
        line: dict[str, Any] = {"color": ui.INK, "lw": 1.9, "zorder": 5, "marker": "o", "ms": 4.5, "clip_on": False}
        axes.plot(range(last + 1), heights[:, number], color="white", lw=4.2, alpha=0.85, zorder=4.5, clip_on=False)
        axes.plot(range(last + 1), heights[:, number], **line)
        if math.isfinite(heights[last, number]):
            ends.append((float(heights[last, number]), label))
    top = 1.1
    for y, label in sorted(ends, reverse=True):
        place = min(y, top - 0.055)
        axes.plot([last + 0.05, last + 0.58, last + 0.66], [y, y, place], color=ui.INK, lw=0.7, clip_on=False, zorder=6)
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
    text = printable(value).replace("_", " ")
    return text if len(text) <= 18 else text[:17] + "…"
