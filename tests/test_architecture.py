"""The imports against the rules of docs/architecture.md."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "physio_dist"
FILES = sorted(PACKAGE.rglob("*.py"))
SHARED = {"errors", "config", "options", "storage", "lifeline", "exits", ""}
MAY_KNOW = {
    "signals": {"signals", "errors"},
    "shards": {"shards", "signals", "storage", "config", "errors", "lifeline", ""},
    "models": {"models", "storage", "errors"},
    "training": {
        "training", "models", "shards", "signals", "storage", "config", "cluster_options", "errors", "lifeline", "",
    },
    "downstream": {
        "downstream", "models", "shards", "signals", "storage", "config", "options", "task_options", "errors",
        "lifeline", "pairs", "",
    },
    "report": {"report", "pairs", "errors"},
    "pairs": set(),
    "storage": {"faults", "urls"},
    "faults": {"errors", "urls"},
    "urls": set(),
    "config": {"errors", "options", "cluster_options", "search_options", "task_options"},
    "cluster_options": {"errors", "options"},
    "search_options": {"errors", "options"},
    "task_options": {"errors", "options"},
    "options": {"errors", "storage"},
    "cluster": {"errors", "config", "storage", "exits"},
    "jobs": {"storage", "errors"},
    "spread": {"cluster", "shards", "storage", "errors", "exits", ""},
    "sweep": {"downstream", "training", "shards", "storage", "config", "task_options", "errors"},
    "board": set(),
    "callbacks": {"board"},
    "rollcall": {"errors", ""},
    "gauges": {"board", "config"},
    "errors": set(),
    "lifeline": set(),
    "exits": {"errors"},
}
HOMES = {
    "deepspeed": {"training/engine.py", "training/rank.py"},
    "ray": {
        f"{name}.py"
        for name in ("callbacks", "cluster", "foldwise", "gauges", "launch", "rollcall", "search", "spread", "tune")
    },
    "sklearn": {f"downstream/{name}.py" for name in ("embedding", "handmade", "metrics", "splits", "study")}
    | {"report/heldout.py"},
    "wfdb": {"signals/readers/wfdb_records.py", "downstream/handmade.py"},
    "h5py": {"signals/readers/code15.py", "signals/readers/mat_people.py"},
    "edfio": {"signals/readers/edf_files.py"},
    "s3fs": set(),
    "fsspec": {"storage.py"},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
            if node.module == "physio_dist":
                found |= {f"physio_dist.{alias.name}" for alias in node.names}
                found.discard("physio_dist")
                if any(alias.name == "__version__" for alias in node.names):
                    found.discard("physio_dist.__version__")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_knows_only_what_it_may(file: Path) -> None:
    place = file.relative_to(PACKAGE)
    room = place.parts[0].removesuffix(".py")
    for name in imports(file):
        if name.startswith("physio_dist") and room in MAY_KNOW:
            other = [*name.split("."), ""][1]
            assert other in MAY_KNOW[room], f"{place} imports {name}"
        top = name.split(".")[0]
        if top in HOMES:
            assert place.as_posix() in HOMES[top], f"{place} imports {top}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_hides_another_and_none_is_too_long(file: Path) -> None:
    assert file.parent != PACKAGE or file.stem not in sys.stdlib_module_names
    assert len(file.read_text().splitlines()) <= 400
