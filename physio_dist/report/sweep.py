"""The sections of a sweep's page: each a function from the sweep to its text, tables and figures.

A section knows no other; one whose data the sweep lacks says so in ``missing`` and draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from physio_dist.report import components as ui
from physio_dist.report import sweep_analysis, sweep_search
from physio_dist.report import sweep_plots as plots
from physio_dist.report.run_data import without_credentials
from physio_dist.report.sweep_data import METRICS, ROWS, HeldOut, Sweep, mean_roc, precision_recall, present, roc
from physio_dist.report.sweep_plots import colour_of, label_of
from physio_dist.report.sweep_summary import CHANCE, better_single, published, reached
from physio_dist.runs.sweep_results import BOUND, PREDICTIONS, ResultRow
from physio_dist.runtime.arrays import Float64Array, Int64Array
from physio_dist.stats.auc import pooled_auc
from physio_dist.stats.bootstrap import compared_rows
from physio_dist.stats.permutation import PERMUTATIONS

# More classes than this share one panel, as a mean.
MOST_PANELS = 4
# Of the areas that results.json tells from those of the drawn curves, before it is said.
AREA_TOLERANCE = 0.002
SIGNALS: tuple[str, ...] = ("ecg", "eeg", "fused")
COLUMNS = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced acc.",
    "macro_f1": "Macro F1",
    "auc": "ROC\u2011AUC",
    "interval": "95 % interval",
    "pr_auc": "PR\u2011AUC",
}
OPTIONS = (
    "tune.task", "tune.label", "tune.neutral", "tune.baseline", "tune.clip", "tune.protocol", "tune.folds",
    "tune.val_folds", "tune.trials", "tune.search", "tune.scheduler", "tune.max_epochs", "tune.permutations",
    "tune.calibrate", "tune.noise_control", "tune.finetune", "run.seed",
)  # fmt: skip


def baselines(sweep: Sweep) -> ui.Section:
    """Every row with all its scores, against chance and, on simulated data, against the best possible."""
    rows = sweep.real_rows
    lines = [
        plots.Interval(
            row.name,
            row.auc,
            row.auc_ci,
            [fold.auc for fold in row.per_fold] if len(row.per_fold) > 1 else [],
            _bound_auc(sweep, row),
        )
        for row in rows
    ]
    figures = []
    if any(math.isfinite(line.value) for line in lines):
        figures = [ui.Figure([plots.forest(lines, CHANCE, _forest_alt(rows))], _forest_caption(sweep), wide=True)]
    tables = [table for table in (_score_table(sweep, rows), published(sweep)) if table is not None]
    if (table := _gain_table(sweep)) is not None:
        tables.append(table)
    absent = [label_of(name) for name in ROWS if sweep.row(name) is None]
    notes = [f"results.json has no row for: {', '.join(absent)}."] if absent else []
    blind = sweep.row("majority")
    if blind is not None and len(blind.per_fold) > 1 and abs(blind.auc - CHANCE) > AREA_TOLERANCE:
        notes.append(
            "The majority class has another AUC than 0.5 because folds differ a little in their training people's "
            "class shares: pooled over folds, even that orders windows."
        )
    return ui.Section("Results", "results", figures=figures, tables=tables, notes=notes)


def curves(sweep: Sweep) -> ui.Section:
    """ROC curves of all rows, one panel a class; of two classes also precision over recall."""
    held = sweep.held
    if held is None:
        return _without_predictions("Curves", "curves", "no curve can be drawn")
    predictions, k = held.predictions, len(sweep.classes)
    rows = [row for row in sweep.results.rows if row.name in held.pairs and row.name != "majority"]
    classes = present(predictions, k)
    if not rows or not classes:
        return ui.Section("Curves", "curves", missing="Nothing to draw: the held-out windows are all of one class.")
    images = []
    if k == 2:
        name = sweep.classes[1]
        drawn = [plots.Curve(row.name, *roc(predictions, row.name, 1), row.auc) for row in rows]
        images.append(plots.roc_panel(f"ROC, positive: {name}", drawn, _curve_alt("ROC curves", drawn)))
        drawn = [plots.Curve(r.name, *precision_recall(predictions, r.name, 1), r.pr_auc) for r in rows]
        base = float((predictions.label == 1).mean())
        title, alt = f"Precision over recall, positive: {name}", _curve_alt("Precision-recall curves", drawn)
        images.append(plots.recall_panel(title, drawn, base, alt))
        how = f"{name} is the positive class. "
    elif k <= MOST_PANELS:
        for c in classes:
            areas = {row.name: pooled_auc([held.pairs[row.name][c]]) for row in rows}
            drawn = [plots.Curve(name, *roc(predictions, name, c), area) for name, area in areas.items()]
            alt = _curve_alt(f"ROC curves of {sweep.classes[c]}", drawn)
            images.append(plots.roc_panel(f"ROC, {sweep.classes[c]} against the others", drawn, alt))
        how = "Each class against all others. "
    else:
        drawn = [plots.Curve(r.name, *mean_roc(predictions, r.name, classes), r.auc) for r in rows]
        images.append(plots.roc_panel(f"ROC, mean over {len(classes)} classes", drawn, _curve_alt("ROC", drawn)))
        how = f"Mean over {len(classes)} classes, each against all others, at the same rate of false positives. "
    caption = f"{how}{_pooled(sweep, held)} Best first at the right; dashed grey: chance."
    if any(row.name.startswith(BOUND) for row in rows):
        caption += " Dotted, named best: what the simulator's hidden drives of these signals allow."
    notes = [f"No curve for {label_of(name)}: its probabilities are not all numbers." for name in predictions.broken]
    for row in rows:
        area = pooled_auc(held.pairs[row.name])
        if abs(area - row.auc) > AREA_TOLERANCE:
            notes.append(f"{label_of(row.name)}: the predictions give {ui.metric(area)}, results.json says "
                         f"{ui.metric(row.auc)}.")  # fmt: skip
    return ui.Section("Curves", "curves", figures=[ui.Figure(images, caption)], notes=notes)


def confusion(sweep: Sweep) -> ui.Section:
    """Confusion matrices of the hand-made, the single and the fused rows."""
    rows = [row for name in ROWS[2:] if (row := sweep.row(name)) is not None]
    tables: list[tuple[str, Int64Array]] = [(row.name, np.array(row.confusion)) for row in rows if row.confusion]
    if not tables:
        return ui.Section("Confusion", "confusion", missing="results.json holds no confusion matrix.")
    classes = sweep.classes or [str(number) for number in range(len(tables[0][1]))]
    right = [f"{label_of(name)} {ui.percent(float(np.trace(t) / max(t.sum(), 1)))} right" for name, t in tables]
    alt = f"Confusion matrices of {len(classes)} classes: {', '.join(right)}."
    caption = (
        "Rows are true classes, columns predicted ones; each row adds up to 100 %, below it the number of windows. "
        f"The predicted class is the most probable one. {_size(sweep)}"
    )
    figure = ui.Figure([plots.confusions(tables, classes, alt)], caption.strip(), wide=True)
    return ui.Section("Confusion", "confusion", figures=[figure])


def people(sweep: Sweep) -> ui.Section:
    """On how many people fusion beats the better single modality."""
    held = sweep.held
    if held is None:
        return _without_predictions("People", "people", "nothing can be said about each person")
    scores = held.people
    if "fused" not in held.pairs or not {"ecg", "eeg"} & set(held.pairs):
        missing = f"{PREDICTIONS} lacks the fused or both single rows, so people cannot be compared."
        return ui.Section("People", "people", missing=missing)
    text, images = [], []
    blind = sweep.row("majority")
    majority = math.nan if blind is None else blind.accuracy
    for kind, table in (("ROC-AUC", scores.auc), ("Accuracy", scores.accuracy)):
        rows = {name: table[name] for name in SIGNALS if name in table}
        finite = np.isfinite(rows["fused"]) & np.isfinite(plots.best_single(rows))
        if not finite.any():
            text.append(f"{kind} is not defined for any person: nobody has windows of two classes.")
            continue
        defined = {name: values[finite] for name, values in rows.items()}
        names = [name for name, ok in zip(scores.names, finite.tolist(), strict=True) if ok]
        words = _count_gains(sweep, defined, kind)
        left = int((~finite).sum())
        text.append(words + (f" {left} have windows of one class only and are left out." if left else ""))
        chance = CHANCE if kind == "ROC-AUC" else majority
        title = f"{kind} of each held-out person"
        images.append(plots.people_panel(title, names, defined, chance, f"{title}. {words}"))
    caption = (
        "Each column is a held-out person, named by the first digits of a pseudonym, sorted by what fusion gains over "
        "the better of that person's two single signals. Black line: the gain; dotted grey: the loss. The better "
        "signal is picked for each person with hindsight, so this is a hard bar. Dashed: chance, for accuracy the "
        f"majority class over all held-out windows. {_windows_each(scores.windows)}"
    )
    if len(sweep.classes) > 2:
        caption += " A person's ROC-AUC is the mean over the classes that person has."
    wide = len(scores.names) > plots.FEW_PEOPLE
    details = [("The same as numbers", _people_listing(held))]
    return ui.Section("People", "people", text=text, figures=[ui.Figure(images, caption, wide=wide)], details=details)


def control(sweep: Sweep) -> ui.Section:
    """AUCs under permuted labels with the observed one."""
    title, anchor = "Permuted labels", "permuted"
    auc, permuted, fused = sweep.permuted_auc, sweep.results.permuted, sweep.row("fused")
    if permuted is None or not auc.size:
        missing = "Labels were not permuted in this sweep (tune.permutations), so this control for leakage is missing."
        return ui.Section(title, anchor, missing=missing)
    observed = math.nan if fused is None else fused.auc
    mean, most = float(auc.mean()), float(auc.max())
    numbers = f"mean {ui.metric(mean)}, range {ui.metric(float(auc.min()))} to {ui.metric(most)}"
    alt = f"ROC-AUC of the fused row under {auc.size} permutations: {numbers}; observed {ui.metric(observed)}."
    caption = (
        f"The evaluation repeated {auc.size} times with labels permuted by recording within each person: {numbers}. "
        "A leak between training and held-out windows would lift these AUCs above chance."
    )
    if math.isfinite(p := permuted.p):
        caption += (
            f" p = {ui.p_word(p)}; with {auc.size} permutations it cannot fall below {ui.p_word(1 / (auc.size + 1))}."
        )
    if math.isfinite(leak := permuted.p_leak):
        caption += f" That their mean is above chance has p = {ui.p_word(leak)}."
    caption += f" {_size(sweep)}"
    image = plots.permuted_strip(auc, observed, alt)
    return ui.Section(title, anchor, figures=[ui.Figure([image], caption.strip(), wide=True)])


def dataset(sweep: Sweep) -> ui.Section:
    """The shard sets and the frozen encoders."""
    section = ui.dataset(sweep)
    if not sweep.results.encoders:
        return section
    tables = list(section.tables)
    for signal, encoder in sweep.results.encoders.items():
        rows = [[ui.Cell("Encoder"), ui.Cell(f"{signal.upper()}, frozen")]]
        by_fold = encoder.get("by_fold")
        facts = {f"fold {fold}": each for fold, each in by_fold.items()} if isinstance(by_fold, dict) else encoder
        for name, value in facts.items():
            rows.append([ui.Cell(str(name).replace("_", " ")), ui.Cell(without_credentials(ui.plain(value)))])
        tables.append(ui.Table([], rows, numeric=False))
    notes = [section.missing] if section.missing else []
    return ui.Section(section.title, section.anchor, tables=tables, notes=notes)


def configuration(sweep: Sweep) -> ui.Section:
    """The options a reader asks for first, and the whole resolved file folded away."""
    return ui.configuration_section(sweep, OPTIONS)


def _without_predictions(title: str, anchor: str, so: str) -> ui.Section:
    return ui.Section(title, anchor, missing=f"The run holds no {PREDICTIONS}, so {so}.")


def _bound_auc(sweep: Sweep, row: ResultRow) -> float:
    bound = sweep.bound(row)
    return math.nan if bound is None else bound.auc


def _size(sweep: Sweep) -> str:
    windows, people_ = sweep.results.windows, sweep.results.people
    if windows is None or people_ is None:
        return ""
    return f"{windows:,} held-out windows of {people_:,} {'person' if people_ == 1 else 'people'}."


def _pooled(sweep: Sweep, held: HeldOut) -> str:
    n, folds = held.predictions.label.size, len(np.unique(held.predictions.fold))
    text = f"{n:,} windows of {len(held.people.names):,} held-out people"
    return text + (f", pooled over {folds} folds, each predicted by its own models." if folds > 1 else ".")


def _windows_each(windows: np.ndarray) -> str:
    low, high = int(windows.min()), int(windows.max())
    return f"{low:,} windows each." if low == high else f"{low:,} to {high:,} windows each."


def _forest_alt(rows: list[ResultRow]) -> str:
    values = [f"{label_of(row.name)} {ui.metric(row.auc)}" for row in rows]
    return f"ROC-AUC with 95 % intervals: {', '.join(values)}."


def _forest_caption(sweep: Sweep) -> str:
    text = "Dot: ROC-AUC over the pooled windows of all held-out people; line: 95 % interval over people (bootstrap)."
    if any(len(row.per_fold) > 1 for row in sweep.real_rows):
        text += " Faint ticks: single folds."
    if any(math.isfinite(_bound_auc(sweep, row)) for row in sweep.real_rows):
        text += " Open diamond: best possible with these signals, for somebody who could read the simulator's drives."
    if len(sweep.classes) > 2:
        text += " Mean over classes, each against the others."
    return f"{text} {_size(sweep)}".strip()


def _score_table(sweep: Sweep, rows: list[ResultRow]) -> ui.Table:
    bounded = any(math.isfinite(_bound_auc(sweep, row)) for row in rows)
    calibrated = any(math.isfinite(row.ece) for row in rows)
    error = ["Calibration error"] if calibrated else []
    head = ["Input", *COLUMNS.values(), *error, *(["Best possible AUC", "Way reached"] if bounded else [])]
    lines = []
    for row in rows:
        cells = [ui.Cell(label_of(row.name), colour=colour_of(row.name))]
        for name in METRICS:
            spread = getattr(row.spread, name)
            more = f"± {ui.metric(spread)}" if math.isfinite(spread) and len(row.per_fold) > 1 else ""
            cells.append(ui.Cell(ui.metric(getattr(row, name)), more=more))
            if name == "auc":
                cells.append(ui.Cell(ui.span(row.auc_ci) or "–"))
        if calibrated:
            before = f"before {ui.metric(row.ece_before)}" if math.isfinite(row.ece_before) else ""
            cells.append(ui.Cell(ui.metric(row.ece), more=before))
        if bounded:
            share = reached(row, sweep.bound(row))
            cells.append(ui.Cell(ui.metric(_bound_auc(sweep, row))))
            bar = max(share, 0.0) if math.isfinite(share) else None
            cells.append(ui.Cell(ui.percent(share), bar=bar, colour="" if bar is None else colour_of(row.name)))
        lines.append(cells)
    sentences = {
        f"Over the pooled windows of all held-out people. {_size(sweep)}": True,
        "The interval is that of the ROC-AUC, over people.": any(row.auc_ci for row in rows),
        "±: standard deviation over folds.": any(len(row.per_fold) > 1 for row in rows),
        "Calibration error: how far probabilities are from how often they are right (15 bins).": calibrated,
        "Before: without the temperatures, which were fitted on validation people.": any(
            math.isfinite(row.ece_before) for row in rows
        ),
        "Shown: the fused heads with the other signal withheld at the test.": any(
            row.name.endswith("_only") for row in rows
        ),
        "Best possible: reached by somebody who could read the simulator's hidden drives of the same signals. Way "
        "reached: how much of the way from chance (0.5) to that.": bounded,
    }
    return ui.Table(head, lines, " ".join(text.strip() for text, said in sentences.items() if said))


def _gain_table(sweep: Sweep) -> ui.Table | None:
    """Differences between the fused row and the others on the same resampled people."""
    named, held = [row.name for row in sweep.real_rows], sweep.held
    differences = {} if held is None else held.differences
    differences = {pair: change for pair in compared_rows(named) if (change := differences.get(pair)) is not None}
    if held is None or not differences:
        return None
    lines = []
    for (name, minus), change in differences.items():
        auc, other_auc = held.people.auc[name], held.people.auc[minus]
        finite = np.isfinite(auc) & np.isfinite(other_auc)
        share = f"{int((auc > other_auc)[finite].sum())} of {int(finite.sum())}" if finite.any() else "–"
        interval = f"{ui.signed(change.low)} to {ui.signed(change.high)}" if math.isfinite(change.low) else "–"
        p = ui.p_word(change.p) if math.isfinite(change.p) else "–"
        label = label_of(minus) if name == "fused" else f"{label_of(name)} minus {label_of(minus)}"
        colour = colour_of(minus if name == "fused" else name)
        lines.append(
            [ui.Cell(label, colour=colour), *(ui.Cell(text) for text in (ui.signed(change.value), interval, p, share))]
        )
    caption = (
        "By how much the fused row's ROC-AUC exceeds each other's. The interval is a bootstrap over people in which "
        "both rows are measured on the same drawn people; above zero it shows a gain. p: two-sided, by exchanging both "
        f"rows' answers for a random half of the people, {PERMUTATIONS:,} times; not corrected for how many are "
        "compared. Last: people whose own AUC is higher."
    )
    if any(name != "fused" for name, _ in differences):
        caption += " Below the fused row: what rows with one signal and nothing, or noise, add to that signal alone."
    return ui.Table(["Fused minus", "ROC-AUC", "95 % interval", "p", "People better"], lines, caption)


def _curve_alt(what: str, drawn: list[plots.Curve]) -> str:
    areas = ", ".join(f"{label_of(curve.name)} {ui.metric(curve.value)}" for curve in drawn)
    return f"{what} over held-out windows; areas: {areas}."


def _count_gains(sweep: Sweep, rows: dict[str, Float64Array], kind: str) -> str:
    gain = rows["fused"] - plots.best_single(rows)
    up, same, n = int((gain > 0).sum()), int((gain == 0).sum()), gain.size
    text = f"{kind}: fused is above the better of a person's single signals for {up} of {n} people"
    text += f", equal for {same}" if same else ""
    best = better_single(sweep)
    if best is not None and best.name in rows:
        over = int((rows["fused"] > rows[best.name]).sum())
        text += f"; above {label_of(best.name)}, the better one over all, for {over}"
    return text + "."


def _people_listing(held: HeldOut) -> str:
    scores = held.people
    names = [name for name in ("untrained", "handmade", "ecg", "eeg", "fused") if name in held.pairs]
    heads = [f"{kind} {plots.label_of(name, short=True)}" for kind in ("AUC", "acc") for name in names]
    lines = ["  ".join(["person".ljust(len(scores.names[0])), "fold", "windows", *(f"{head:>13}" for head in heads)])]
    for i, person in enumerate(scores.names):
        values = [scores.auc[name][i] for name in names] + [scores.accuracy[name][i] for name in names]
        cells = [person, f"{scores.fold[i]:>4}", f"{scores.windows[i]:>7,}", *(f"{ui.metric(v):>13}" for v in values)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


# In the order of the page.
SECTIONS: tuple[Callable[[Sweep], ui.Section], ...] = (
    baselines, curves, confusion, sweep_analysis.calibration, people, sweep_analysis.occlusion, sweep_analysis.features,
    sweep_search.search, control, dataset, configuration,
)  # fmt: skip
