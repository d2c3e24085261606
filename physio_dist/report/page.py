"""`report.html` from the files of a run directory: one page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from physio_dist.errors import UserError
from physio_dist.report import pretraining, sweep, sweep_summary
from physio_dist.report.components import Section, Summary, style
from physio_dist.report.run_data import Reader, Run, load_run
from physio_dist.report.sweep_data import Sweep, load_sweep
from physio_dist.runs.run_dir import METRICS
from physio_dist.runs.sweep_results import RESULTS


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
    read = cache(read)
    if read(METRICS) is not None:
        return _pretraining(load_run(read))
    if read(RESULTS) is not None:
        return _sweep(load_sweep(read))
    raise UserError(
        f"neither {METRICS} (of a pretraining run) nor {RESULTS} (of a sweep) is in the run directory: give the "
        "directory (run.dir/run.name) of a run that has logged at least one step, or of a sweep that is done"
    )


def _pretraining(run: Run) -> _Chapter:
    with style():
        sections = [section(run) for section in pretraining.SECTIONS]
    notes = []
    if run.metrics.unfinished:
        notes.append(f"The last line of {METRICS} was not finished yet and is left out.")
    return _Chapter(pretraining.summarise(run), sections, notes)


def _sweep(loaded: Sweep) -> _Chapter:
    with style():
        sections = [section(loaded) for section in sweep.SECTIONS]
    if sweep_summary.is_leaky(loaded):
        sections = [sweep_summary.mark_leaky(section) for section in sections]
    return _Chapter(sweep_summary.summarise(loaded), sections, loaded.results.notes)
