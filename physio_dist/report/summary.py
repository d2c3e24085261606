"""The head of the page: what a reader takes away in ten seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from physio_dist.report.drawing import LEADWISE, TEMPORAL, number, percent
from physio_dist.report.parts import Cell, Fact, Table
from physio_dist.report.rundata import Metrics, Run, find_restarts

TERMS = (
    ("intra", "Temporal", "patches hidden in leads that are seen", TEMPORAL),
    ("inter", "Lead-wise", "leads hidden whole", LEADWISE),
)
UV_PER_UNIT = 100.0


@dataclass(frozen=True)
class Summary:
    """Name, badge (empty for recorded signals), verdicts in words, facts, and the table of final errors."""

    name: str
    badge: str
    badge_text: str
    verdicts: list[str]
    facts: list[Fact]
    table: Table | None
    kicker: str = "pretraining run"


def summarise(run: Run) -> Summary:
    """The summary of a run; whatever the run does not tell is left out or shown as a dash."""
    badge, badge_text = badge_of(run.simulated())
    row = run.metrics.last_validation()
    facts = [*_progress(run), *_speed(run.metrics), *_setting(run)]
    if row is None:
        verdicts = ["No validation result was logged, so nothing can be said about held-out windows."]
        return Summary(run.name, badge, badge_text, verdicts, facts, None)
    verdicts = [text for term in TERMS if (text := _verdict(run.metrics, row, term))]
    return Summary(run.name, badge, badge_text, verdicts, facts, _final_table(run, row))


def relative(run: Run) -> bool:
    """Whether the run's errors are relative to each lead's mean square."""
    return bool(run.option("train.loss") == "relative")


def error_unit(run: Run) -> str:
    """What the run's errors are measured in, to be put after a word like error."""
    return "relative to the lead's mean square" if relative(run) else "in (100 µV)²"


def ratio(value: float, reference: float) -> float:
    """``value / reference``; NaN where either is unknown or the reference is zero."""
    if not (math.isfinite(value) and math.isfinite(reference)) or reference <= 0:
        return math.nan
    return value / reference


def badge_of(told: list[bool]) -> tuple[str, str]:
    """Badge and sentence on where the signals come from, given every statement the run makes on it."""
    if not told:
        return "", "The run does not tell whether its signals are recorded or simulated."
    if not any(told):
        return "", ""
    if all(told):
        why = "The signals come from a generator, not from people: these numbers say nothing about patients."
        return "SIMULATED", why
    share = f"{sum(told)} of {len(told)} data sets come from a generator, not from people."
    return "PARTLY SIMULATED", share


def _value(metrics: Metrics, row: int, name: str) -> float:
    return float(metrics.column(name)[row])


def _verdict(metrics: Metrics, row: int, term: tuple[str, str, str, str]) -> str:
    key, title, what, _ = term
    model, zero = _value(metrics, row, f"val_{key}"), _value(metrics, row, f"val_zero_{key}")
    interp = _value(metrics, row, f"val_interp_{key}")
    share, against = ratio(model, zero), ratio(model, interp)
    if not math.isfinite(share):
        return ""
    text = f"{title} ({what}): the model's error is {percent(share)} of that of predicting zero"
    if math.isfinite(against) and not math.isclose(interp, zero, rel_tol=1e-6):
        text += f" and {percent(against)} of that of interpolating in time"
    beaten = [share >= 1 and "predicting zero", against >= 1 and "interpolation"]
    losers = list(dict.fromkeys(name for name in beaten if name))
    return text + (f" — no better than {' or '.join(losers)}." if losers else ".")


def _final_table(run: Run, row: int) -> Table:
    metrics = run.metrics
    in_uv = not relative(run)
    head = ["Held-out error", "Model", *(["as RMS"] if in_uv else []), "Predict zero", "Interpolate"]
    head += ["Model / zero", "Model / interp."]
    rows = []
    for key, title, _, colour in TERMS:
        model, zero, interp = (_value(metrics, row, f"val_{by}{key}") for by in ("", "zero_", "interp_"))
        shares = [ratio(model, zero), ratio(model, interp)]
        rms = UV_PER_UNIT * math.sqrt(model) if model >= 0 else math.nan
        cells = [Cell(title, colour=colour), Cell(number(model))]
        cells += [Cell(f"{rms:.0f} µV" if math.isfinite(rms) else "–")] if in_uv else []
        cells += [Cell(number(zero)), Cell(number(interp))]
        cells += [Cell(percent(s), bar=s, colour=colour, warn=s >= 1) for s in shares]
        rows.append(cells)
    caption = (
        f"Mean squared error over hidden samples of held-out windows at step {metrics.column('step')[row]:,.0f}, "
        f"{error_unit(run)}. Below {percent(1)} the model beats the predictor. A lead hidden whole offers nothing to "
        "interpolate from, so there both predictors are the same."
    )
    return Table(head, rows, caption)


def _progress(run: Run) -> list[Fact]:
    metrics = run.metrics
    planned = run.option("train.steps")
    step = metrics.last("step")
    of = f"of {planned:,} planned" if isinstance(planned, int) else ""
    facts = [Fact("Steps", f"{step:,.0f}", of)]
    samples = metrics.last("samples")
    if math.isfinite(samples):
        facts.append(Fact("Samples", f"{samples:,.0f}", "windows trained on"))
    epoch = metrics.last("epoch")
    if math.isfinite(epoch):
        facts.append(Fact("Epoch", f"{epoch:.2f}".rstrip("0").rstrip("."), "at the last step"))
    span = metrics.last("time") - float(metrics.column("time")[0])
    if math.isfinite(span) and span > 0:
        again = len(run.attempts) - 1 if run.attempts else len(find_restarts(run).steps)
        more = f"{again} restart{'s' * (again != 1)}" if again > 0 else "no restart"
        facts.append(Fact("Elapsed", duration(span), f"first to last line, {more}"))
    return facts


def _speed(metrics: Metrics) -> list[Fact]:
    facts = []
    if metrics.has("samples_per_s"):
        facts.append(Fact("Throughput", f"{number(metrics.median('samples_per_s'))} /s", "samples, median"))
    if metrics.has("data_wait_frac"):
        facts.append(Fact("Data wait", percent(metrics.median("data_wait_frac")), "of step time, median"))
    if metrics.has("mfu"):
        facts.append(Fact("MFU", percent(metrics.median("mfu")), "model FLOPs utilisation, median"))
    return facts


def _setting(run: Run) -> list[Fact]:
    facts = []
    preset = run.option("model.preset")
    if preset is not None:
        facts.append(Fact("Model", str(preset), f"precision {run.option('train.precision') or 'not told'}"))
    if run.attempts:
        last = run.attempts[-1]
        world = last.get("world")
        facts.append(Fact("Devices", f"{world if world is not None else '–'} × {last.get('device', 'not told')}"))
    windows, people = 0, 0
    for index in run.indexes:
        splits = index.get("splits")
        windows += sum(v for v in splits.values() if isinstance(v, int)) if isinstance(splits, dict) else 0
        people += index["people"] if isinstance(index.get("people"), int) else 0
    if windows:
        more = f"windows of {people:,} people" if people else "windows"
        facts.append(Fact("Data set", f"{windows:,}", more))
    return facts


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as a person says them."""
    hours, rest = divmod(round(seconds), 3600)
    minutes, left = divmod(rest, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {left:02d} s" if minutes else f"{left} s"
