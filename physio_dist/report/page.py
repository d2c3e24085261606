"""`report.html` from the files of a run directory: one page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from physio_dist.errors import UserError
from physio_dist.report import fusion_sections, insight_sections, protocol, sections, setting, sweep_section
from physio_dist.report.drawing import style
from physio_dist.report.fusion_summary import summarise_sweep
from physio_dist.report.heldout import HeldOut
from physio_dist.report.parts import Section
from physio_dist.report.rundata import Reader, Run, load_run
from physio_dist.report.summary import Summary, summarise
from physio_dist.report.sweepdata import RESULTS, Sweep, load_sweep

# The order of the page of a pretraining run. Each section says for itself what it lacks.
SECTIONS: tuple[Callable[[Run], Section], ...] = (
    sections.losses,
    sections.windows,
    sections.per_lead,
    sections.speed,
    sections.optimisation,
    setting.dataset,
    sections.attempts,
    sections.configuration,
)
# The same of a sweep.
SWEEP_SECTIONS: tuple[Callable[[Sweep, HeldOut | None], Section], ...] = (
    fusion_sections.baselines,
    fusion_sections.curves,
    fusion_sections.confusion,
    insight_sections.trust,
    fusion_sections.people,
    insight_sections.leaning,
    insight_sections.planes,
    sweep_section.search,
    fusion_sections.control,
    fusion_sections.dataset,
    fusion_sections.configuration,
)


@dataclass(frozen=True)
class _Chapter:
    """One run on the page; ``prefix`` tells its anchors from those of other runs."""

    summary: Summary
    sections: Sequence[Section]
    notes: Sequence[str]
    prefix: str = ""


def render(read: Reader, *more: Reader) -> str:
    """The page of a run, or of several one below the other, as HTML text for ``report.html``.

    ``read(name)`` returns the bytes of a file of the run directory, or None where there is none. A directory with
    ``metrics.jsonl`` is a pretraining run (``config.yaml``, ``examples.safetensors``, ``data.json`` and
    ``attempts.json`` are asked for too); one with ``results.json`` alone is a sweep (``predictions.safetensors``,
    ``embedding.safetensors``, ``trials.jsonl``, ``config.yaml``, ``data.json``). Raises ``UserError`` where both are
    missing, where there is no logged step, or where a file cannot be understood, and ``DataError`` where files
    contradict each other; both name the file.
    """
    first, *rest = (_chapter(one) for one in (read, *more))
    chapters = [first, *(replace(chapter, prefix=f"run{n}-") for n, chapter in enumerate(rest, 2))]
    # Not decided by file name: everything that comes from a run is escaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(chapters=chapters)


def _chapter(read: Reader) -> _Chapter:
    known: dict[str, bytes | None] = {}

    def once(name: str) -> bytes | None:
        if name not in known:
            known[name] = read(name)
        return known[name]

    if once("metrics.jsonl") is not None:
        return _pretraining(load_run(once))
    if once(RESULTS) is not None:
        return _sweep(load_sweep(once))
    raise UserError(
        f"neither metrics.jsonl (of a pretraining run) nor {RESULTS} (of a sweep) is in the run directory: give the "
        "directory (run.dir/run.name) of a run that has logged at least one step, or of a sweep that is done"
    )


def _pretraining(run: Run) -> _Chapter:
    with style():
        drawn = [section(run) for section in SECTIONS]
    notes = []
    if run.metrics.unfinished:
        notes.append("The last line of metrics.jsonl was not finished yet and is left out.")
    return _Chapter(summarise(run), drawn, notes)


def _sweep(sweep: Sweep) -> _Chapter:
    held = None if sweep.predictions is None else HeldOut.of(sweep.predictions)
    with style():
        drawn = [section(sweep, held) for section in SWEEP_SECTIONS]
    if protocol.is_leaky(sweep):
        drawn = [protocol.labelled(section) for section in drawn]
    told = sweep.results.get("notes")
    notes = [str(note) for note in told] if isinstance(told, list) else []
    return _Chapter(summarise_sweep(sweep, held), drawn, notes)
