"""CODE-15% and CPSC 2018 in their own layouts."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.io import loadmat, savemat

from physio_dist.errors import UserError
from physio_dist.signals.montage import ECG_12
from physio_dist.signals.readers import reader
from physio_dist.signals.readers.code15 import strip_padding
from physio_dist.signals.recording import RecordError
from physio_dist.signals.windows import WindowSpec, windows_of

PART = "exams_part_sample"


@pytest.fixture
def sample(data_dir: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "code15"
    folder.mkdir()
    for path in (data_dir / "code15-sample").iterdir():
        shutil.copy(path, folder)
        (folder / path.name).chmod(0o644)
    return folder


def test_exams_are_matched_by_id_not_by_position(sample: Path) -> None:
    code15 = reader("code15")
    records = code15.records(str(sample))
    assert len(records) == 10
    assert records == sorted(records)
    assert f"{PART}/0" not in records
    with (sample / "exams.csv").open() as lines:
        table = {row["exam_id"]: row for row in csv.DictReader(lines)}
    with h5py.File(sample / f"{PART}.hdf5") as file:
        ids, tracings = file["exam_id"][:].tolist(), file["tracings"][:]
    for record in records:
        exam = record.split("/")[1]
        read, row = code15.read(str(sample), record), table[exam]
        signal = read.signals["ecg"]
        assert read.person == row["patient_id"]
        assert read.labels["age"] == int(row["age"])
        assert read.labels["sex"] == ("M" if row["is_male"] == "True" else "F")
        for name in ("1dAVb", "RBBB", "LBBB", "SB", "ST", "AF"):
            assert read.labels[name] is (row[name] == "True")
        assert set(read.labels) == {"age", "sex", "1dAVb", "RBBB", "LBBB", "SB", "ST", "AF"}
        assert signal.rate == 400.0
        pad = (4096 - signal.data.shape[1]) // 2
        whole = tracings[ids.index(int(exam))]
        np.testing.assert_allclose(signal.data.T, whole[pad : 4096 - pad] * 1000, rtol=1e-6)
        assert not whole[:pad].any() and not whole[4096 - pad :].any()
        assert len(windows_of(read, WindowSpec(seconds=7))) == 1


def test_padding_is_taken_from_both_ends_alike() -> None:
    tracing = np.zeros((100, 12), np.float32)
    tracing[10:88] = 1.0
    assert strip_padding(tracing).shape == (80, 12)
    tracing[:, :] = 1.0
    assert strip_padding(tracing).shape == (100, 12)
    with pytest.raises(RecordError, match="all zero"):
        strip_padding(np.zeros((100, 12), np.float32))


def test_short_tracings_are_refused_with_both_lengths(sample: Path) -> None:
    code15 = reader("code15")
    with pytest.raises(RecordError, match=r"7\.335 s long, shorter than a window of 10 s"):
        windows_of(code15.read(str(sample), f"{PART}/1238362"), WindowSpec())


def test_exams_without_a_certain_person_are_refused(sample: Path) -> None:
    table = sample / "exams.csv"
    lines = table.read_text().splitlines()
    doubled = next(line for line in lines if line.startswith("795649,"))
    lines = [line for line in lines if not line.startswith("975093,")]
    table.write_text("\n".join([*lines, doubled.replace("618483", "1")]))
    code15 = reader("code15")
    assert len(code15.records(str(sample))) == 10
    for exam in (975093, 795649):
        with pytest.raises(RecordError, match="no row, or contradicting rows"):
            code15.read(str(sample), f"{PART}/{exam}")
    assert code15.read(str(sample), f"{PART}/438277").person == "185323"


def test_parts_with_doubled_or_empty_tracings(sample: Path) -> None:
    with h5py.File(sample / f"{PART}.hdf5", "r+") as file:
        file["exam_id"][1] = file["exam_id"][2]
        file["tracings"][3] = 0.0
    code15 = reader("code15")
    assert len(code15.records(str(sample))) == 9
    with pytest.raises(RecordError, match="more than once"):
        code15.read(str(sample), f"{PART}/2657522")
    with pytest.raises(RecordError, match="all zero"):
        code15.read(str(sample), f"{PART}/270272")


@pytest.mark.parametrize("record", ["../x/1", f"{PART}/0", f"{PART}/12", f"{PART}/x", "other/975093", "975093", PART])
def test_unknown_exams_are_refused(sample: Path, record: str) -> None:
    with pytest.raises(RecordError):
        reader("code15").read(str(sample), record)


def test_incomplete_folders_are_told(sample: Path) -> None:
    code15 = reader("code15")
    table = sample / "exams.csv"
    text = table.read_text()
    table.write_text(text.replace("patient_id", "patient"))
    with pytest.raises(UserError, match="column patient_id is missing"):
        code15.records(str(sample))
    table.write_text(text.replace("358121,54", "358121,old"))
    with pytest.raises(UserError, match=r"exams\.csv, line 5"):
        code15.records(str(sample))
    table.unlink()
    with pytest.raises(UserError, match=r"no exams\*\.csv"):
        code15.records(str(sample))


def test_broken_parts_are_told(sample: Path) -> None:
    part = sample / f"{PART}.hdf5"
    part.write_bytes(part.read_bytes()[:5000])
    with pytest.raises(UserError, match="not a whole CODE-15% part"):
        reader("code15").records(str(sample))


def test_cpsc2018_structures(data_dir: Path, tmp_path: Path) -> None:
    folder = str(data_dir / "cpsc2018")
    cpsc = reader("cpsc2018")
    records = cpsc.records(folder)
    assert records == [f"A{i}" for i in range(1980, 1990)]
    record = cpsc.read(folder, "A1981")
    assert record.labels == {"age": 48, "sex": "F"}
    assert record.signals["ecg"].channels == ECG_12
    assert record.signals["ecg"].rate == 500.0
    truth = loadmat(data_dir / "cpsc2018" / "A1981.mat")["ECG"][0, 0]["data"]
    np.testing.assert_allclose(record.signals["ecg"].data, truth * 1000, rtol=1e-6)

    savemat(tmp_path / "three.mat", {"ECG": {"sex": "Male", "age": 5, "data": np.zeros((3, 10))}})
    savemat(tmp_path / "other.mat", {"val": np.zeros((12, 10))})
    (tmp_path / "broken.mat").write_bytes(b"MATLAB 5.0 MAT-file")
    for name, reason in (("three", r"shape \(3, 10\)"), ("other", "KeyError"), ("broken", "no CPSC 2018 structure")):
        with pytest.raises(RecordError, match=reason):
            cpsc.read(str(tmp_path), name)
    with pytest.raises(RecordError, match="missing"):
        cpsc.read(str(tmp_path), "nothing")


def test_cpsc2018_leaves_wfdb_signals_to_wfdb(data_dir: Path) -> None:
    with pytest.raises(UserError, match="read by wfdb"):
        reader("cpsc2018").records(str(data_dir / "cinc2021"))
