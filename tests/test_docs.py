"""Files that the documentation names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ("csv_files.py",)
"""Ends of paths that a page tells readers to create."""
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_named_in_a_page_exist(page: Path) -> None:
    named = re.findall(r"`((?:physio_dist|tests|tools|configs|cluster|docs)/[\w./-]*)`", page.read_text())
    assert [name for name in named if not (ROOT / name).exists() and not name.endswith(EXAMPLES)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_of_a_page_exist(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_links_to_pages_in_code_exist() -> None:
    files = [*(ROOT / "physio_dist").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml"), *(ROOT / "tools").glob("*.*")]
    named = {(file.name, link) for file in files for link in re.findall(r"docs/[\w/-]+\.md", file.read_text())}
    assert {(file, link) for file, link in named if not (ROOT / link).exists()} == set()
