"""Fixtures that every part of the tests shares."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real recordings; its absence is a failure, never a skip."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PHYSIO_DIST_DATA", default))
    assert folder.is_dir(), f"real recordings are not at {folder}: set PHYSIO_DIST_DATA"
    return folder
