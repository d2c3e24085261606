"""Readers by name, and the promise that one format's library is not needed for another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from physio_dist.errors import UserError
from physio_dist.signals.readers import names, reader


def test_reader_returns_each_registered_reader() -> None:
    for name in names():
        assert reader(name).name == name
    assert {"wfdb", "code15", "edf", "simulate"} <= set(names())
    assert [name for name in names() if reader(name).simulated] == ["simulate"]


def test_reader_raises_on_unknown_name() -> None:
    with pytest.raises(UserError, match="no reader 'wfbd'; did you mean 'wfdb'"):
        reader("wfbd")


@pytest.mark.parametrize(
    ("name", "foreign"),
    [
        ("simulate", {"wfdb", "h5py", "edfio", "pandas", "torch"}),
        ("wfdb", {"h5py", "edfio"}),
        ("code15", {"wfdb", "edfio", "pandas"}),
        ("edf", {"wfdb", "h5py", "pandas", "mne", "torch"}),
    ],
)
@pytest.mark.integration
def test_reader_imports_no_other_library(name: str, foreign: set[str]) -> None:
    code = f"""
import sys
from physio_dist.signals.readers import reader
import physio_dist.signals.windows
reader({name!r})
print(sorted({foreign!r} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["wfdb", "code15", "cpsc2018"])
def test_folders_without_records_are_told_from_each_other(name: str, tmp_path: Path) -> None:
    records = reader(name).records
    with pytest.raises(UserError, match="no such folder"):
        records(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="the folder is empty"):
        records(str(tmp_path))
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "signal.edf").write_text("nothing")
    with pytest.raises(UserError, match=r"no records found; looked for .*there is 1 \.(txt|edf), 1 \.(txt|edf)"):
        records(str(tmp_path))
    with pytest.raises(UserError, match="not a folder"):
        records(str(tmp_path / "notes.txt"))
    with pytest.raises(UserError, match="local folder"):
        records("s3://bucket/ecg")
