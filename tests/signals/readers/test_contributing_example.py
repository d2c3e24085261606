"""The example reader of CONTRIBUTING.md works as it is printed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from physio_dist.signals import readers
from physio_dist.signals.recording import RecordError

PAGE = Path(__file__).resolve().parents[3] / "CONTRIBUTING.md"


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> readers.Reader:
    code = PAGE.read_text().split("<!-- example reader -->\n```python\n")[1].split("```")[0]
    name = f"{readers.__name__}.csv_files"
    module = ModuleType(name)
    exec(compile(code, str(PAGE), "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setitem(readers._MODULES, "csv", "csv_files")
    return readers.reader("csv")


def test_example_reader_reads_millivolts_as_microvolts(reader: readers.Reader, tmp_path: Path) -> None:
    values = np.arange(20.0).reshape(10, 2)
    np.savetxt(tmp_path / "a.csv", values, delimiter=",", header="I,II", comments="")

    assert reader.records(str(tmp_path)) == ["a"]

    signal = reader.read(str(tmp_path), "a").signals["ecg"]
    assert signal.channels == ("I", "II")
    assert signal.rate == 500.0
    np.testing.assert_allclose(signal.data, values.T * 1e3)


def test_example_reader_rejects_a_table_of_words(reader: readers.Reader, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("I,II\nno,number\n")
    with pytest.raises(RecordError):
        reader.read(str(tmp_path), "a")
