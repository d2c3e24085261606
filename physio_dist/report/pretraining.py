"""Page of a pretraining run: its summary, and its sections in the order of the page.

A section is a function from the run to its text, tables and figures; one whose data the run lacks says so in
``missing``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from physio_dist.report import components as ui
from physio_dist.report.pretraining_plots import (
    Series,
    cut_off_uv,
    loss_panel,
    sheet,
    small_panel,
    smoothing_window,
    squared_errors,
)
from physio_dist.report.run_data import Examples, Metrics, Restarts, Run

TERMS = (
    ("intra", "Temporal", "patches hidden in leads that are seen", ui.TEMPORAL),
    ("inter", "Lead-wise", "leads hidden whole", ui.LEADWISE),
)
UV_PER_UNIT = 100.0
# More windows teach a reader no more and would make the page heavy.
MOST_WINDOWS = 6
OPTIONS = (
    "model.preset", "model.dropout", "mask.intra_ratio", "mask.inter_ratio", "mask.span", "mask.mode",
    "mask.lead_dropout", "train.steps", "train.global_batch", "train.micro_batch", "train.precision", "train.lr",
    "zero.stage", "run.seed",
)  # fmt: skip


def summarise(run: Run) -> ui.Summary:
    """The summary of a run; whatever the run does not tell is left out or shown as a dash."""
    badge, badge_text = ui.badge_of(run.simulated())
    row = run.metrics.last_validation()
    facts = [*_progress(run), *_speed(run.metrics), *_setting(run)]
    if row is None:
        verdicts = ["No validation result was logged, so nothing can be said about held-out windows."]
        return ui.Summary(run.name, badge, badge_text, verdicts, facts, None)
    verdicts = [text for term in TERMS if (text := _verdict(run.metrics, row, term))]
    return ui.Summary(run.name, badge, badge_text, verdicts, facts, _final_table(run, row))


def relative(run: Run) -> bool:
    """Return True if the run's errors are relative to each lead's mean square."""
    return bool(run.option("train.loss") == "relative")


def error_unit(run: Run) -> str:
    """Unit of the run's errors, in words that follow a word like error."""
    return "relative to the lead's mean square" if relative(run) else "in (100 µV)²"


def ratio(value: float, reference: float) -> float:
    """``value / reference``; NaN where either is unknown or the reference is zero."""
    if not (math.isfinite(value) and math.isfinite(reference)) or reference <= 0:
        return math.nan
    return value / reference


def losses(run: Run) -> ui.Section:
    """Both mask terms, training and held-out, against predicting zero and interpolating in time."""
    section = ui.Section("Loss", "loss")
    metrics, restarts = run.metrics, run.restarts()
    images, absent = [], []
    for key, title, what, colour in TERMS:
        if not (metrics.has(f"loss_{key}") or metrics.has(f"val_{key}")):
            absent.append(f"No finite loss_{key} was logged: the {title.lower()} term is not drawn.")
            continue
        series = [series for series in _loss_series(run, key, colour) if np.isfinite(series.y).any()]
        ends = ", ".join(f"{one.label} {ui.number(one.end())}" for one in series)
        alt = f"{title} loss over {metrics.rows} logged steps; last values: {ends}."
        images.append(loss_panel(f"{title}: {what}", series, restarts.steps, alt))
    if not images:
        return ui.Section(section.title, section.anchor, missing="No mask term has a finite value in metrics.jsonl.")
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
    return ui.Section(section.title, section.anchor, figures=[ui.Figure(images, caption.strip())], notes=absent)


def optimisation(run: Run) -> ui.Section:
    """Learning rate and gradient norm."""
    panels = [
        ("Learning rate", "lr", "", True),
        ("Gradient norm before clipping", "grad_norm", "", False),
    ]
    restarts = run.restarts()
    images = _small(run, panels, restarts)
    if not images:
        return ui.Section("Optimisation", "optimisation", missing="No learning rate or gradient norm was logged.")
    caption = (
        "What the optimizer was given and what came back. A norm that climbs while the loss does not fall announces "
        f"a divergence. {_restart_note(restarts)}"
    )
    notes = _gaps(run, ("grad_norm",))
    return ui.Section("Optimisation", "optimisation", figures=[ui.Figure(images, caption.strip())], notes=notes)


def speed(run: Run) -> ui.Section:
    """Throughput, data wait, and where known utilisation; memory as a number, for it hardly changes."""
    metrics, restarts = run.metrics, run.restarts()
    panels = [
        ("Samples per second, all ranks", "samples_per_s", "", True),
        ("Waiting for data, share of step time", "data_wait_frac", "%", True),
        ("Model FLOPs utilisation", "mfu", "%", True),
    ]
    images = _small(run, panels, restarts)
    if not images:
        return ui.Section("Speed", "speed", missing="Neither throughput nor data wait was logged.")
    text = (
        f"Medians over all logged steps: {ui.number(metrics.median('samples_per_s'))} samples/s, "
        f"{ui.percent(metrics.median('data_wait_frac'))} of the step time spent waiting for data"
    )
    if metrics.has("step_s"):
        text += f", {ui.number(metrics.median('step_s'))} s a step"
    if metrics.has("peak_memory_mb"):
        text += f". Peak memory: {np.nanmax(metrics.column('peak_memory_mb')):,.0f} MB"
    text += "."
    caption = "Data wait is the slowest rank's share. Axes start at zero. " + _restart_note(restarts)
    return ui.Section("Speed", "speed", text=[text], figures=[ui.Figure(images, caption.strip())])


def windows(run: Run) -> ui.Section:
    """Held-out windows with what was hidden and what was reconstructed."""
    examples = run.examples
    if examples is None or not len(examples.target):
        return ui.Section("Held-out windows", "windows", missing="The run holds no examples of a validation.")
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
        figures.append(ui.Figure([sheet(examples, window, alt)], facts + cut + how, wide=True, title=title))
    return ui.Section("Held-out windows", "windows", text=[text], figures=figures)


def per_lead(run: Run) -> ui.Section:
    """Error per lead, from the example windows alone."""
    examples = run.examples
    if examples is None or not len(examples.target):
        return ui.Section("Leads", "leads", missing="The run holds no examples to compare leads on.")
    head, sums, hidden = ["Lead"], {}, {}
    for key, title, _, _ in TERMS:
        sums[key] = [values.sum(axis=0) for values in squared_errors(examples, key)]
        hidden[key] = (getattr(examples, key) & examples.valid[:, :, None]).sum(axis=(0, 2))
        head += [f"{title}, unexplained", "from patches"]
    rows = []
    for lead, name in enumerate(examples.channels):
        cells = [ui.Cell(name)]
        for key, _, _, colour in TERMS:
            wrong, power = sums[key]
            cells += _share_cells(float(wrong[lead]), float(power[lead]), int(hidden[key][lead]), colour)
        rows.append(cells)
    total = [ui.Cell("All leads")]
    for key, _, _, colour in TERMS:
        wrong, power = sums[key]
        total += _share_cells(float(wrong.sum()), float(power.sum()), int(hidden[key].sum()), colour)
    n = len(examples.target)
    caption = (
        f"Fraction of variance left unexplained in hidden patches: the model's mean squared error over that of "
        f"predicting zero. 0 is perfect, {ui.percent(1)} is no better than zero. "
        f"From {n} example window{'s' * (n > 1)} only: read differences between leads with care."
    )
    return ui.Section("Leads", "leads", tables=[ui.Table(head, [*rows, total], caption)])


def attempts(run: Run) -> ui.Section:
    """Each start of the run: where it went on from, on what, with which software."""
    if not run.attempts:
        return ui.Section("Attempts", "attempts", missing="The run keeps no record of its attempts.")
    head = ["Attempt", "From step", "World size", "ZeRO stage", "Precision", "Device", "Software"]
    rows = []
    for attempt in run.attempts:
        software = ", ".join(f"{name} {version}" for name, version in attempt.versions.items()) or "–"
        start = (attempt.attempt, attempt.from_step, attempt.world, attempt.zero_stage)
        cells = [ui.plain(value) for value in (*start, attempt.precision, attempt.device)]
        rows.append([ui.Cell(text) for text in (*cells, software)])
    return ui.Section("Attempts", "attempts", tables=[ui.Table(head, rows, numeric=False)])


def configuration(run: Run) -> ui.Section:
    """The options a reader asks for first, and the whole resolved file folded away."""
    return ui.configuration_section(run, OPTIONS)


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
        Series("zero, interp." if same else "zero", steps, zero, ui.SOFT, kind="reference"),
    ]
    if not same:
        series.append(Series("interpolation", steps, interp, ui.SOFT, kind="reference", dash=":"))
    return series


def _small(run: Run, panels: Sequence[tuple[str, str, str, bool]], restarts: Restarts) -> list[ui.Image]:
    metrics, images = run.metrics, []
    for title, name, unit, from_zero in panels:
        if not metrics.has(name):
            continue
        show = ui.percent if unit == "%" else ui.number
        alt = f"{title} over the steps: median {show(metrics.median(name))}, last {show(metrics.last(name))}."
        # The schedule is what it is: a mean would blunt the peak after the warm-up.
        kind = "exact" if name == "lr" else "raw"
        series = Series(title, metrics.column("step"), metrics.column(name), ui.INK, kind)
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
        facts.append(f"{title}: {what}, {ui.percent(ratio(wrong, power))} of their variance left unexplained.")
    invalid = [name for name, ok in zip(examples.channels, examples.valid[window], strict=True) if not ok]
    if invalid:
        facts.append(f"Not valid: {', '.join(invalid)}.")
    return " ".join(facts)


def _share_cells(wrong: float, power: float, patches: int, colour: str) -> list[ui.Cell]:
    if not patches:
        return [ui.Cell("–"), ui.Cell("0")]
    share = ratio(wrong, power)
    return [ui.Cell(ui.percent(share), bar=share, colour=colour, warn=share >= 1), ui.Cell(f"{patches}")]


def _value(metrics: Metrics, row: int, name: str) -> float:
    return float(metrics.column(name)[row])


def _verdict(metrics: Metrics, row: int, term: tuple[str, str, str, str]) -> str:
    key, title, what, _ = term
    model, zero = _value(metrics, row, f"val_{key}"), _value(metrics, row, f"val_zero_{key}")
    interp = _value(metrics, row, f"val_interp_{key}")
    share, against = ratio(model, zero), ratio(model, interp)
    if not math.isfinite(share):
        return ""
    text = f"{title} ({what}): the model's error is {ui.percent(share)} of that of predicting zero"
    if math.isfinite(against) and not math.isclose(interp, zero, rel_tol=1e-6):
        text += f" and {ui.percent(against)} of that of interpolating in time"
    beaten = [share >= 1 and "predicting zero", against >= 1 and "interpolation"]
    losers = list(dict.fromkeys(name for name in beaten if name))
    return text + (f" — no better than {' or '.join(losers)}." if losers else ".")


def _final_table(run: Run, row: int) -> ui.Table:
    metrics = run.metrics
    in_uv = not relative(run)
    head = ["Held-out error", "Model", *(["as RMS"] if in_uv else []), "Predict zero", "Interpolate"]
    head += ["Model / zero", "Model / interp."]
    rows = []
    for key, title, _, colour in TERMS:
        model, zero, interp = (_value(metrics, row, f"val_{by}{key}") for by in ("", "zero_", "interp_"))
        shares = [ratio(model, zero), ratio(model, interp)]
        rms = UV_PER_UNIT * math.sqrt(model) if model >= 0 else math.nan
        cells = [ui.Cell(title, colour=colour), ui.Cell(ui.number(model))]
        cells += [ui.Cell(f"{rms:.0f} µV" if math.isfinite(rms) else "–")] if in_uv else []
        cells += [ui.Cell(ui.number(zero)), ui.Cell(ui.number(interp))]
        cells += [ui.Cell(ui.percent(s), bar=s, colour=colour, warn=s >= 1) for s in shares]
        rows.append(cells)
    caption = (
        f"Mean squared error over hidden samples of held-out windows at step {metrics.column('step')[row]:,.0f}, "
        f"{error_unit(run)}. Below {ui.percent(1)} the model beats the predictor. A lead hidden whole offers nothing "
        "to interpolate from, so there both predictors are the same."
    )
    return ui.Table(head, rows, caption)


def _progress(run: Run) -> list[ui.Fact]:
    metrics = run.metrics
    planned = run.option("train.steps")
    step = metrics.last("step")
    of = f"of {planned:,} planned" if isinstance(planned, int) else ""
    facts = [ui.Fact("Steps", f"{step:,.0f}", of)]
    samples = metrics.last("samples")
    if math.isfinite(samples):
        facts.append(ui.Fact("Samples", f"{samples:,.0f}", "windows trained on"))
    epoch = metrics.last("epoch")
    if math.isfinite(epoch):
        facts.append(ui.Fact("Epoch", f"{epoch:.2f}".rstrip("0").rstrip("."), "at the last step"))
    span = metrics.last("time") - float(metrics.column("time")[0])
    if math.isfinite(span) and span > 0:
        again = len(run.attempts) - 1 if run.attempts else len(run.restarts().steps)
        more = f"{again} restart{'s' * (again != 1)}" if again > 0 else "no restart"
        facts.append(ui.Fact("Elapsed", ui.duration(span), f"first to last line, {more}"))
    return facts


def _speed(metrics: Metrics) -> list[ui.Fact]:
    facts = []
    if metrics.has("samples_per_s"):
        facts.append(ui.Fact("Throughput", f"{ui.number(metrics.median('samples_per_s'))} /s", "samples, median"))
    if metrics.has("data_wait_frac"):
        facts.append(ui.Fact("Data wait", ui.percent(metrics.median("data_wait_frac")), "of step time, median"))
    if metrics.has("mfu"):
        facts.append(ui.Fact("MFU", ui.percent(metrics.median("mfu")), "model FLOPs utilisation, median"))
    return facts


def _setting(run: Run) -> list[ui.Fact]:
    facts = []
    preset = run.option("model.preset")
    if preset is not None:
        facts.append(ui.Fact("Model", str(preset), f"precision {run.option('train.precision') or 'not told'}"))
    if run.attempts:
        last = run.attempts[-1]
        facts.append(ui.Fact("Devices", f"{ui.plain(last.world)} × {last.device or 'not told'}"))
    count = sum(sum(index.splits.values()) for index in run.indexes)
    people = sum(index.people or 0 for index in run.indexes)
    if count:
        facts.append(ui.Fact("Data set", f"{count:,}", f"windows of {people:,} people" if people else "windows"))
    return facts


# In the order of the page.
SECTIONS: tuple[Callable[[Run], ui.Section], ...] = (
    losses, windows, per_lead, speed, optimisation, ui.dataset, attempts, configuration,
)  # fmt: skip
