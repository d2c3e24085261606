"""Imports compared with the layers of docs/architecture.md."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "physio_dist"
FILES = sorted(PACKAGE.rglob("*.py"))

# What each package (or module of the top level) may import, beside itself and `physio_dist.__version__`.
FOUNDATION = {"errors", "storage", "runtime"}
MAY_IMPORT: dict[str, set[str]] = {
    # Imported on first use of a public function.
    "__init__": {"models"},
    "errors": set(),
    "stats": {"errors", "runtime"},
    "storage": {"errors"},
    "runtime": {"errors"},
    "config": FOUNDATION,
    "runs": FOUNDATION | {"config"},
    "signals": FOUNDATION | {"config"},
    "data": FOUNDATION | {"config", "runs", "signals"},
    "models": FOUNDATION | {"config", "runs"},
    "objectives": FOUNDATION | {"config", "signals", "models"},
    "training": FOUNDATION | {"config", "runs", "signals", "data", "models", "objectives"},
    "evaluation": FOUNDATION | {"stats", "config", "runs", "signals", "data", "models", "objectives"},
    "report": FOUNDATION | {"stats", "config", "runs"},
    "planning": FOUNDATION | {"config", "data", "models", "objectives", "training"},
    "ray_backend": FOUNDATION | {"stats", "config", "runs", "data", "models", "evaluation", "training"},
    "cli": FOUNDATION
    | {"config", "runs", "signals", "data", "models", "evaluation", "training", "report", "planning", "ray_backend"},
    "__main__": {"cli"},
    "pretrain": {"config", "runtime", "training"},
    "launch": {"ray_backend", "runtime"},
    "tune": {"ray_backend", "runtime"},
}
# Where libraries may be imported that not everybody needs, as prefixes of paths below the package.
HOMES: dict[str, tuple[str, ...]] = {
    "deepspeed": ("training/backends/deepspeed_engine.py",),
    "ray": ("ray_backend/",),
    "optuna": ("evaluation/search_space.py", "ray_backend/"),
    "sklearn": ("evaluation/", "stats/", "report/sweep_data.py"),
    "wfdb": ("signals/readers/wfdb_records.py", "evaluation/handcrafted.py"),
    "h5py": ("signals/readers/code15.py", "signals/readers/mat_people.py"),
    "edfio": ("signals/readers/edf_files.py",),
    "matplotlib": ("report/",),
    "jinja2": ("report/page.py",),
    "fsspec": ("storage/files.py",),
    "s3fs": (),
}
# Modules that lie beside the packages; a new one needs a good reason.
TOP_LEVEL = {"__init__", "__main__", "cli", "errors", "registry", "pretrain", "launch", "tune"}


def unit_of(place: Path) -> str:
    """The package, or the module of the top level, that a file belongs to."""
    return place.parts[0].removesuffix(".py")


def imported_by(file: Path) -> set[str]:
    """The dotted names that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            if node.module == "physio_dist":
                names |= {f"physio_dist.{alias.name}" for alias in node.names}
            else:
                names.add(node.module or "")
    return names - {"physio_dist.__version__"}


def test_every_package_has_a_rule() -> None:
    assert {unit_of(file.relative_to(PACKAGE)) for file in FILES} == set(MAY_IMPORT)


def test_places_of_optional_libraries_exist() -> None:
    assert all((PACKAGE / place).exists() for places in HOMES.values() for place in places)


def test_top_level_holds_only_entry_points_and_packages() -> None:
    assert {file.stem for file in PACKAGE.glob("*.py")} <= TOP_LEVEL


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_follow_the_layers(file: Path) -> None:
    place = file.relative_to(PACKAGE)
    unit = unit_of(place)
    for name in imported_by(file):
        top, *below = name.split(".")
        if top == "physio_dist":
            assert {below[0]} <= MAY_IMPORT[unit] | {unit}, f"{place} imports {name}"
        elif top in HOMES:
            assert place.as_posix().startswith(HOMES[top]), f"{place} imports {top}"


def test_packages_form_no_cycle() -> None:
    edges = {
        unit: {name.split(".")[1] for file in FILES if unit_of(file.relative_to(PACKAGE)) == unit
               for name in imported_by(file) if name.startswith("physio_dist.")} - {unit}
        for unit in MAY_IMPORT
    }  # fmt: skip
    while leaves := {unit for unit, known in edges.items() if not known}:
        edges = {unit: known - leaves for unit, known in edges.items() if unit not in leaves}
    assert not edges, f"packages that import each other in a circle: {edges}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_module_shadows_the_standard_library(file: Path) -> None:
    assert file.stem.startswith("__") or file.stem not in sys.stdlib_module_names
