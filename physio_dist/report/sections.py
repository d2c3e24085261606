"""The sections of a pretraining run's page: each a function from the run to its text, tables and figures.

A section knows no other; one whose data the run lacks says so in ``missing`` and draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from physio_dist.report import setting
from physio_dist.report.curves import Series, loss_panel, small_panel, smoothing_window
from physio_dist.report.drawing import INK, SOFT, Image, number, percent
from physio_dist.report.parts import Cell, Figure, Section, Table
from physio_dist.report.rundata import Examples, Restarts, Run, find_restarts
from physio_dist.report.setting import plain
from physio_dist.report.sheets import cut_off_uv, sheet, squared_errors
from physio_dist.report.summary import TERMS, error_unit, ratio

# More windows teach a reader no more and would make the page heavy.
MOST_WINDOWS = 6
OPTIONS = (
    "model.preset",
    "model.dropout",
    "mask.intra_ratio",
    "mask.inter_ratio",
    "mask.span",
    "mask.mode",
    "mask.lead_dropout",
    "train.steps",
    "train.global_batch",
    "train.micro_batch",
    "train.precision",
    "train.lr",
    "zero.stage",
    "run.seed",
)


def losses(run: Run) -> Section:
    """Both mask terms, training and held-out, against predicting zero and interpolating in time."""
    section = Section("Loss", "loss")
    metrics, restarts = run.metrics, find_restarts(run)
    images, absent = [], []
    for key, title, what, colour in TERMS:
        if not (metrics.has(f"loss_{key}") or metrics.has(f"val_{key}")):
            absent.append(f"No finite loss_{key} was logged: the {title.lower()} term is not drawn.")
            continue
        series = [series for series in _loss_series(run, key, colour) if np.isfinite(series.y).any()]
        ends = ", ".join(f"{one.label} {number(one.end())}" for one in series)
        alt = f"{title} loss over {metrics.rows} logged steps; last values: {ends}."
        images.append(loss_panel(f"{title}: {what}", series, restarts.steps, alt))
    if not images:
        return Section(section.title, section.anchor, missing="No mask term has a finite value in metrics.jsonl.")
    window = smoothing_window(metrics.rows)
    caption = f"Error of each mask term, {error_unit(run)}; lower is better. Thin line: training batches as logged."
    if window > 1:
        caption += f" Solid line: mean over {window} logged steps, centred, fewer near the ends."
    if metrics.last_validation() is not None:
        caption += (
            " Circles: held-out windows. Dashed: predicting zero on the same windows; dotted: interpolating in time. "
            "A model that has learnt something lies below both. Training runs with dropout and changing masks, so "
            "it may lie above the held-out error."
        )
    caption += " An axis is logarithmic where its values span a wide range. " + _restart_note(restarts)
    absent += _gaps(run, ("loss", "loss_intra", "loss_inter"))
    return Section(section.title, section.anchor, figures=[Figure(images, caption.strip())], notes=absent)


def optimisation(run: Run) -> Section:
    """Learning rate and gradient norm."""
    panels = [
        ("Learning rate", "lr", "", True),
        ("Gradient norm before clipping", "grad_norm", "", False),
    ]
    restarts = find_restarts(run)
    images = _small(run, panels, restarts)
    if not images:
        return Section("Optimisation", "optimisation", missing="No learning rate or gradient norm was logged.")
    caption = (
        "What the optimizer was given and what came back. A norm that climbs while the loss does not fall announces "
        f"a divergence. {_restart_note(restarts)}"
    )
    notes = _gaps(run, ("grad_norm",))
    return Section("Optimisation", "optimisation", figures=[Figure(images, caption.strip())], notes=notes)


def speed(run: Run) -> Section:
    """Throughput, data wait, and where known utilisation; memory as a number, for it hardly changes."""
    metrics, restarts = run.metrics, find_restarts(run)
    panels = [
        ("Samples per second, all ranks", "samples_per_s", "", True),
        ("Waiting for data, share of step time", "data_wait_frac", "%", True),
        ("Model FLOPs utilisation", "mfu", "%", True),
    ]
    images = _small(run, panels, restarts)
    if not images:
        return Section("Speed", "speed", missing="Neither throughput nor data wait was logged.")
    text = (
        f"Medians over all logged steps: {number(metrics.median('samples_per_s'))} samples/s, "
        f"{percent(metrics.median('data_wait_frac'))} of the step time spent waiting for data"
    )
    if metrics.has("step_s"):
        text += f", {number(metrics.median('step_s'))} s a step"
    if metrics.has("peak_memory_mb"):
        text += f". Peak memory: {np.nanmax(metrics.column('peak_memory_mb')):,.0f} MB"
    text += "."
    caption = "Data wait is the slowest rank's share. Axes start at zero. " + _restart_note(restarts)
    return Section("Speed", "speed", text=[text], figures=[Figure(images, caption.strip())])


def windows(run: Run) -> Section:
    """Held-out windows with what was hidden and what was reconstructed."""
    examples = run.examples
    if examples is None or not len(examples.target):
        return Section("Held-out windows", "windows", missing="The run holds no examples of a validation.")
    count = min(len(examples.target), MOST_WINDOWS)
    some = f"{count} of {len(examples.target)}" if count < len(examples.target) else str(count)
    plural = "s" * (count > 1)
    text = (
        f"{some} held-out window{plural} as the model of step {examples.step} fills in what was hidden from it, at "
        f"{examples.rate:g} Hz; a patch lasts {examples.patch_samples / examples.rate:g} s."
    )
    if examples.simulated:
        text += " These signals are SIMULATED."
    figures = []
    for window in range(count):
        facts = _window_facts(examples, window)
        alt = f"{len(examples.channels)} leads, one above the other. {facts}"
        title = f"Window {window + 1} ({examples.keys[window]})."
        how = (
            ""
            if window
            else " Black was seen by the model, grey was hidden from it; colour is what it put there: blue for "
            "patches hidden in time, orange for leads hidden whole. Vertical lines are the borders of patches; all "
            "leads of a window share one scale."
        )
        limit = cut_off_uv(examples, window)
        cut = "" if limit is None else f" Waves beyond {limit / 1000:.2g} mV are cut off in the drawing."
        figures.append(Figure([sheet(examples, window, alt)], facts + cut + how, wide=True, title=title))
    return Section("Held-out windows", "windows", text=[text], figures=figures)


def per_lead(run: Run) -> Section:
    """Which leads the model reconstructs well, from the example windows alone."""
    examples = run.examples
    if examples is None or not len(examples.target):
        return Section("Leads", "leads", missing="The run holds no examples to compare leads on.")
    head, sums, hidden = ["Lead"], {}, {}
    for key, title, _, _ in TERMS:
        sums[key] = [values.sum(axis=0) for values in squared_errors(examples, key)]
        hidden[key] = (getattr(examples, key) & examples.valid[:, :, None]).sum(axis=(0, 2))
        head += [f"{title}, unexplained", "from patches"]
    rows = []
    for lead, name in enumerate(examples.channels):
        cells = [Cell(name)]
        for key, _, _, colour in TERMS:
            wrong, power = sums[key]
            cells += _share_cells(float(wrong[lead]), float(power[lead]), int(hidden[key][lead]), colour)
        rows.append(cells)
    total = [Cell("All leads")]
    for key, _, _, colour in TERMS:
        wrong, power = sums[key]
        total += _share_cells(float(wrong.sum()), float(power.sum()), int(hidden[key].sum()), colour)
    n = len(examples.target)
    caption = (
        f"Fraction of variance left unexplained in hidden patches: the model's mean squared error over that of "
        f"predicting zero. 0 is perfect, {percent(1)} is no better than zero. "
        f"From {n} example window{'s' * (n > 1)} only: read differences between leads with care."
    )
    return Section("Leads", "leads", tables=[Table(head, [*rows, total], caption)])


def attempts(run: Run) -> Section:
    """Each start of the run: where it went on from, on what, with which software."""
    if not run.attempts:
        return Section("Attempts", "attempts", missing="The run keeps no record of its attempts.")
    fields = ("attempt", "from_step", "world", "zero_stage", "precision", "device")
    head = ["Attempt", "From step", "World size", "ZeRO stage", "Precision", "Device", "Software"]
    rows = []
    for attempt in run.attempts:
        versions = attempt.get("versions")
        software = ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "–"
        rows.append([*(Cell(plain(attempt.get(name))) for name in fields), Cell(software)])
    return Section("Attempts", "attempts", tables=[Table(head, rows, numeric=False)])


def configuration(run: Run) -> Section:
    """The options a reader asks for first, and the whole resolved file folded away."""
    return setting.configuration(run, OPTIONS)


def _loss_series(run: Run, key: str, colour: str) -> list[Series]:
    metrics = run.metrics
    steps = metrics.column("step")
    zero, interp = metrics.column(f"val_zero_{key}"), metrics.column(f"val_interp_{key}")
    both = np.isfinite(zero) & np.isfinite(interp)
    # Two lines on top of each other would look like one that was forgotten.
    same = bool(both.any() and np.allclose(zero[both], interp[both], rtol=1e-6))
    series = [
        Series("training", steps, metrics.column(f"loss_{key}"), colour),
        Series("held out", steps, metrics.column(f"val_{key}"), colour, kind="marked"),
        Series("zero, interp." if same else "zero", steps, zero, SOFT, kind="reference"),
    ]
    if not same:
        series.append(Series("interpolation", steps, interp, SOFT, kind="reference", dash=":"))
    return series


def _small(run: Run, panels: Sequence[tuple[str, str, str, bool]], restarts: Restarts) -> list[Image]:
    metrics, images = run.metrics, []
    for title, name, unit, from_zero in panels:
        if not metrics.has(name):
            continue
        show = percent if unit == "%" else number
        alt = f"{title} over the steps: median {show(metrics.median(name))}, last {show(metrics.last(name))}."
        # The schedule is what it is: a mean would blunt the peak after the warm-up.
        kind = "exact" if name == "lr" else "raw"
        series = Series(title, metrics.column("step"), metrics.column(name), INK, kind)
        images.append(small_panel(title, series, restarts.steps, alt, from_zero=from_zero, unit=unit))
    return images


def _restart_note(restarts: Restarts) -> str:
    if not restarts.steps:
        return ""
    if restarts.from_attempts:
        return "Dotted lines with a triangle: the run was started again from this step."
    return "Dotted lines with a triangle: a long pause between two logged steps, as a restart leaves."


def _gaps(run: Run, names: Sequence[str]) -> list[str]:
    """One line a field on steps that logged it without a finite value."""
    notes = []
    for name in names:
        missing = int((~np.isfinite(run.metrics.column(name))).sum())
        if run.metrics.has(name) and missing:
            notes.append(f"{missing} of {run.metrics.rows} logged steps have no finite {name}; they are gaps above.")
    return notes


def _window_facts(examples: Examples, window: int) -> str:
    facts = []
    for key, title, _, _ in TERMS:
        hidden = getattr(examples, key)[window] & examples.valid[window][:, None]
        if not hidden.any():
            facts.append(f"{title}: nothing hidden.")
            continue
        leads = ", ".join(name for name, any_ in zip(examples.channels, hidden.any(axis=1), strict=True) if any_)
        wrong, power = (float(values[window].sum()) for values in squared_errors(examples, key))
        count = int(hidden.sum())
        what = f"{count} patch{'es' * (count > 1)} hidden" if key == "intra" else f"hidden {leads}"
        facts.append(f"{title}: {what}, {percent(ratio(wrong, power))} of their variance left unexplained.")
    invalid = [name for name, ok in zip(examples.channels, examples.valid[window], strict=True) if not ok]
    if invalid:
        facts.append(f"Not valid: {', '.join(invalid)}.")
    return " ".join(facts)


def _share_cells(wrong: float, power: float, patches: int, colour: str) -> list[Cell]:
    if not patches:
        return [Cell("–"), Cell("0")]
    share = ratio(wrong, power)
    return [Cell(percent(share), bar=share, colour=colour, warn=share >= 1), Cell(f"{patches}")]
