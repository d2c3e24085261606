"""The section on a sweep's search: which configurations were tried, how far they came, what was selected."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from physio_dist.report import sweep_plots as plots
from physio_dist.report.fusion_plots import label_of, metric
from physio_dist.report.heldout import HeldOut
from physio_dist.report.parts import Cell, Figure, Section, Table
from physio_dist.report.setting import plain
from physio_dist.report.summary import duration
from physio_dist.report.sweepdata import ROWS, TRIALS, FoldResult, Row, Sweep, Trial

TITLE, ANCHOR = "Sweep", "sweep"
# More folds than this are listed folded away.
MOST_FOLDS = 12
# More labels than this would run into each other beside the drawing.
MOST_LABELS = 14


def search(sweep: Sweep, held: HeldOut | None) -> Section:
    """Parallel coordinates of the fused row's trials, learning curves, the other rows' trials, what was chosen."""
    del held
    if not sweep.trials:
        return Section(TITLE, ANCHOR, missing=f"The run holds no {TRIALS}, so its configurations are not drawn.")
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
    if row is not None and any(fold.config for fold in row.folds):
        if len(row.folds) <= MOST_FOLDS:
            tables.append(_chosen_table(row.folds))
        else:
            details.append(("What each fold chose for the fused row", _chosen_listing(row.folds)))
    how = sweep.results.get("selection")
    how = how.get("rule") if isinstance(how, dict) else how
    text = [f"How it was selected: {plain(how).rstrip('.')}."] if how else []
    notes = [f"The last line of {TRIALS} was not finished and is left out."] if sweep.unfinished else []
    if sweep.option("tune.search") == "optuna":
        notes.append("What Optuna proposed was tried in one fold only: the AUC of such a trial is no mean over folds.")
    lost = sum(not math.isfinite(trial.val_auc) for trial in sweep.trials)
    if lost:
        notes.append(f"{lost} of {len(sweep.trials)} trials came to no validation AUC and are not drawn.")
    return Section(TITLE, ANCHOR, text=text, figures=figures, tables=tables, notes=notes, details=details)


def chosen_of(row: Row | None) -> list[tuple[str, dict[str, Any]]]:
    """Every configuration some fold chose, with a label that says which folds, in order of the folds."""
    by_config: dict[str, tuple[list[str], dict[str, Any]]] = {}
    folds = [] if row is None else [fold for fold in row.folds if fold.config]
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


def _coordinates(sweep: Sweep, fused: Sequence[Trial]) -> Figure:
    known = [trial for trial in fused if math.isfinite(trial.val_auc)]
    chosen = chosen_of(sweep.row("fused"))
    best = max(known, key=lambda trial: trial.val_auc)
    worst = min(trial.val_auc for trial in known)
    alt = (
        f"Parallel coordinates of {len(known)} configurations; validation AUC from {metric(worst)} to "
        f"{metric(best.val_auc)}; the best: {_in_words(best.config)}."
    )
    caption = (
        f"Each line is one of the {len(known)} configurations tried for the fused row, through its choices to the "
        "best AUC it reached on validation people (mean over folds and inner splits), which also gives its colour: "
        "dark is good. Thin and faint: stopped early. Lines through the same choice are spread a little, better ones "
        "higher; learning rate and weight decay are logarithmic; without hidden layers the width has no effect."
    )
    if chosen:
        caption += (
            " Black: what was chosen and then tested on held-out people. Each fold chooses on its own validation "
            "people, so its choice need not be the best on average."
        )
    return Figure([plots.parallel(known, chosen, alt)], caption, wide=True, title="Fused.")


def _progress(sweep: Sweep, fused: Sequence[Trial], rows: Sequence[str]) -> list[Figure]:
    images, parts = [], []
    drawn = [trial for trial in fused if any(math.isfinite(value) for _, value in trial.history)]
    if drawn:
        stopped = sum(trial.stopped for trial in drawn)
        alt = f"Validation AUC over the epochs of {len(drawn)} fused trials, {stopped} of them stopped early."
        images.append(plots.learning_curves("Fused: validation AUC over the epochs", drawn, alt))
        parts.append(
            f"Left: AUC on validation people after each epoch, a line for each of the {len(drawn)} trials of the fused "
            "row; a cross ends one that was stopped early, black is the best."
        )
    known = [trial for trial in sweep.trials if math.isfinite(trial.val_auc)]
    if known:
        best = {row: max((t.val_auc for t in known if t.row == row), default=math.nan) for row in rows}
        alt = "Best validation AUC: " + ", ".join(f"{label_of(row)} {metric(best[row])}" for row in rows) + "."
        images.append(plots.trial_strips("Best AUC of every trial", known, rows, alt))
        side = "Right: each" if drawn else "Each"
        parts.append(
            f"{side} dot is a trial's best AUC on validation people, hollow where it was stopped early, the row's best "
            "in figures. These are the numbers selection looked at: they flatter, unlike those on held-out people."
        )
    return [Figure(images, " ".join(parts))] if images else []


def _trial_table(sweep: Sweep, rows: Sequence[str]) -> Table:
    head = ["Row", "Trials", "Stopped early", "Epochs", "Best validation AUC", "Held\u2011out AUC", "Time"]
    lines = []
    for name in rows:
        mine = [trial for trial in sweep.trials if trial.row == name]
        values = [trial.val_auc for trial in mine if math.isfinite(trial.val_auc)]
        seconds = [trial.seconds for trial in mine if math.isfinite(trial.seconds)]
        row = sweep.row(name)
        texts = [
            f"{len(mine):,}",
            f"{sum(trial.stopped for trial in mine):,}",
            f"{sum(trial.epochs for trial in mine):,}",
            metric(max(values, default=math.nan)),
            metric(math.nan if row is None else row.scores["auc"]),
            duration(sum(seconds)) if seconds else "–",
        ]
        lines.append([Cell(label_of(name)), *(Cell(text) for text in texts)])
    total = sum(trial.seconds for trial in sweep.trials if math.isfinite(trial.seconds))
    caption = (
        f"{len(sweep.trials):,} trials, {sum(trial.stopped for trial in sweep.trials):,} stopped early, "
        f"{duration(total)} if they had run one after the other."
    )
    return Table(head, lines, caption)


def _chosen_table(folds: Sequence[FoldResult]) -> Table:
    names = [name for name in plots.AXES if any(fold.config and name in fold.config for fold in folds)]
    titles = [plots.TITLES.get(name, name).replace("\n", " ").capitalize() for name in names]
    head = ["Fold", "People", "Windows", "Held\u2011out AUC", *titles, "Epoch"]
    lines = []
    for fold in folds:
        config = fold.config or {}
        texts = [_count(fold.people), _count(fold.windows), metric(fold.scores["auc"])]
        texts += [plots.word(config[name]) if name in config else "–" for name in names]
        lines.append([Cell(fold.fold), *(Cell(text) for text in [*texts, _count(fold.epoch)])])
    caption = "What each fold chose for the fused row on its own validation people, and the result on those held out."
    return Table(head, lines, caption)


def _chosen_listing(folds: Sequence[FoldResult]) -> str:
    return "\n".join(
        f"fold {fold.fold}: held-out AUC {metric(fold.scores['auc'])}, epoch {_count(fold.epoch)}, "
        f"{_in_words(fold.config or {})}"
        for fold in folds
    )


def _in_words(config: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {plots.word(value)}" for name, value in config.items())


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
