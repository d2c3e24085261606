"""`report.html` from the files of a run directory: one page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from physio_dist.report import sections
from physio_dist.report.drawing import style
from physio_dist.report.parts import Section
from physio_dist.report.rundata import Run, load_run
from physio_dist.report.summary import summarise

# The order of the page. A new kind of run adds its sections here: each says for itself what it lacks.
SECTIONS: tuple[Callable[[Run], Section], ...] = (
    sections.losses,
    sections.windows,
    sections.per_lead,
    sections.speed,
    sections.optimisation,
    sections.dataset,
    sections.attempts,
    sections.configuration,
)


def render(read: Callable[[str], bytes | None]) -> str:
    """The page of a run, as HTML text for ``report.html``.

    ``read(name)`` returns the bytes of a file of the run directory, or None where there is none. Asked for are
    ``metrics.jsonl`` (needed), ``config.yaml``, ``examples.safetensors``, ``data.json`` and ``attempts.json``.
    Raises ``UserError`` where ``metrics.jsonl`` is missing or empty or a file cannot be understood, naming it.
    """
    run = load_run(read)
    # Not decided by file name: everything that comes from a run is escaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with style():
        drawn = [section(run) for section in SECTIONS]
    notes = []
    if run.metrics.unfinished:
        notes.append("The last line of metrics.jsonl was not finished yet and is left out.")
    template = environment.get_template("page.html.j2")
    return template.render(summary=summarise(run), sections=drawn, notes=notes)
