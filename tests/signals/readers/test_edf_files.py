"""EDF and EDF+: real files read right, and faulty ones, made from real ones, refused with a reason."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from physio_dist.errors import UserError
from physio_dist.signals.montage import EEG_19, electrode
from physio_dist.signals.readers import reader
from physio_dist.signals.recording import RecordError, Recording
from physio_dist.signals.windows import WindowSpec, windows_of

Real = Callable[..., Path]
PAIRED = WindowSpec(signals=("ecg", "eeg"), leads=("ECG",), eeg_channels=EEG_19)
# Place and width of a field of the header of every signal, in characters of one signal.
FIELDS = {
    "label": (0, 16), "unit": (96, 8), "physical_min": (104, 8), "physical_max": (112, 8), "digital_min": (120, 8),
    "digital_max": (128, 8), "samples": (216, 8),
}  # fmt: skip
RECORD_BYTES = 21 * 200 * 2
FP1, REFERENCE, ECG = 0, 19, 20


def read(folder: Path, record: str = "Subject00_1") -> Recording:
    return reader("edf").read(str(folder), record)


def write(path: Path, place: int, text: str | bytes, width: int) -> None:
    data = bytearray(path.read_bytes())
    data[place : place + width] = (text.encode() if isinstance(text, str) else text).ljust(width)
    path.write_bytes(data)


def change(path: Path, field: str, signal: int, text: str | bytes) -> None:
    """Overwrite a field of a signal's header."""
    start, width = FIELDS[field]
    count = int(path.read_bytes()[252:256])
    write(path, 256 + start * count + width * signal, text, width)


@pytest.fixture
def short(real: Real) -> Path:
    """The first 20 seconds of a real file without a table."""
    path = real("eegmat", "Subject00_1") / "Subject00_1.edf"
    path.write_bytes(path.read_bytes()[: 256 * 22 + 20 * RECORD_BYTES])
    write(path, 236, "20", 8)
    return path


def test_a_real_pair_is_read_in_microvolts_with_person_and_labels(real: Real) -> None:
    folder = real("eegmat", "Subject00_1", "Subject00_2", "recordings")
    (folder / "recordings.csv").write_text(
        "".join((folder / "recordings.csv").read_text().splitlines(keepends=True)[:3])
    )
    assert reader("edf").records(str(folder)) == ["Subject00_1", "Subject00_2"]
    recording = read(folder)
    assert (recording.person, recording.labels) == ("Subject00", {"task": "rest"})
    assert read(folder, "Subject00_2").labels == {"task": "arithmetic"}
    ecg, eeg = recording.signals["ecg"], recording.signals["eeg"]
    assert (ecg.rate, ecg.channels, ecg.data.dtype) == (200.0, ("ECG ECG",), np.float32)
    assert (eeg.rate, len(eeg.channels), eeg.data.shape[1]) == (200.0, 19, 182 * 200)
    assert {electrode(name) for name in eeg.channels} == set(EEG_19)
    assert recording.unused == ("EEG A2-A1",)
    raw = np.frombuffer((folder / "Subject00_1.edf").read_bytes()[256 * 22 :], "<i2").reshape(182, 21, 200)
    np.testing.assert_allclose(eeg.data[FP1], raw[:, FP1].ravel() * 0.1, atol=1e-3)
    np.testing.assert_allclose(eeg.data[18], raw[:, 18].ravel() * 0.1, atol=1e-3)
    np.testing.assert_allclose(ecg.data[0], raw[:, ECG].ravel(), atol=1e-2)


def test_the_original_at_500_hz_gives_the_windows_of_its_copy_at_200_hz(data_dir: Path) -> None:
    for record in ("Subject00_2", "Subject01_2"):
        original = read(data_dir / "eegmat-original", record)
        assert original.signals["ecg"].rate == original.signals["eeg"].rate == 500.0
        assert (original.person, original.labels) == (None, {})
        ours, copy = windows_of(original, PAIRED), windows_of(read(data_dir / "eegmat", record), PAIRED)
        assert len(ours) == len(copy) == 6
        for mine, other in zip(ours[1:-1], copy[1:-1], strict=True):
            for name, step in (("ecg", 1.0), ("eeg", 0.1)):
                a, b = mine.data[name] * step, other.data[name] * step
                # Two resamplers differ near the new Nyquist frequency, where the recording has nothing left.
                assert np.abs(a - b).max() < 0.02 * np.ptp(b, axis=1).min() + step
                assert np.array_equal(mine.valid[name], other.valid[name])


def test_nothing_of_patient_or_recording_fields_is_kept(real: Real, short: Path) -> None:
    plus = real("eegmat-original", "Subject00_2")
    write(plus / "Subject00_2.edf", 8, "MCH-0234567 F 02-MAY-1951 Haagse_Harry", 80)
    write(plus / "Subject00_2.edf", 88, "Startdate 02-MAR-2002 EMG561 BK/JOP Sony", 80)
    kept = repr(read(plus, "Subject00_2"))
    assert not re.search("Haagse|1951|0234567|2002|JOP|Sony|Doctor|Total time", kept)
    # A label may hold anything: it is repeated only as far as it consists of known words.
    change(short, "label", REFERENCE, "Haagse Harry")
    change(short, "label", FP1, "Fp1-F7")
    assert read(short.parent).unused == ("Fp1-F7", "1 with labels of their own")


def test_folders_are_searched_and_ids_are_paths(short: Path) -> None:
    folder = short.parent
    (folder / "a" / "b").mkdir(parents=True)
    short.rename(folder / "a" / "b" / "night.EDF")
    os.link(folder / "a" / "b" / "night.EDF", folder / "z.edf")
    assert reader("edf").records(str(folder)) == ["a/b/night", "z"]
    assert read(folder, "a/b/night").signals["ecg"].data.shape == (1, 4000)
    assert reader("edf").records(str(folder / "z.edf")) == ["z"]
    assert read(folder / "z.edf", "z").signals["ecg"].data.shape == (1, 4000)
    with pytest.raises(RecordError, match="leads out of the source folder"):
        read(folder / "a", "../z")


def test_folders_without_edf_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        reader("edf").records(str(tmp_path / "nowhere"))
    (tmp_path / "night.bdf").write_text("nothing")
    with pytest.raises(UserError, match=r"looked for EDF files.*there is 1 \.bdf"):
        reader("edf").records(str(tmp_path))


def test_table_and_files_have_to_agree(short: Path) -> None:
    folder = short.parent
    (folder / "sub").mkdir()
    os.link(short, folder / "sub" / "x.edf")
    (folder / "recordings.csv").write_text(
        "subject,file,age,code,note\n17,./Subject00_1.edf,33,007,\n,gone.edf,,,a\n17,Subject00_1.edf,33,007,\n"
    )
    assert reader("edf").records(str(folder)) == ["Subject00_1", "gone", "sub/x"]
    recording = read(folder)
    assert (recording.person, recording.labels) == ("17", {"age": 33, "code": "007", "note": None})
    with pytest.raises(RecordError, match="the file is missing"):
        read(folder, "gone")
    with pytest.raises(RecordError, match=r"recordings\.csv has no row for this file"):
        read(folder, "sub/x")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (b"files,subject\na.edf,1\n", "no column `file`: did you mean 'files'"),
        (b"file,task\na.edf,1\n", "no column `subject`"),
        (b"", "no column `file`"),
        (b"file,subject\na.edf,1\na.edf,2\n", "line 3: no file, or another row says otherwise"),
        (b"file,subject\n,1\n", "line 2: no file"),
        (b"file,subject\na.edf,\xe9\n", "not a UTF-8 CSV file"),
        (b'file,subject\n"a.edf"x,1\n', "not a UTF-8 CSV file"),
    ],
)
def test_senseless_tables_are_refused(short: Path, table: bytes, told: str) -> None:
    (short.parent / "recordings.csv").write_bytes(table)
    with pytest.raises(UserError, match=told):
        reader("edf").records(str(short.parent))
    with pytest.raises(RecordError, match=told):
        read(short.parent)


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def rates(path: Path) -> None:
    # As many samples in all, so that the sizes still agree.
    change(path, "samples", 0, "100")
    change(path, "samples", 1, "300")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: cut(p, -100), r"has 173532 bytes where the header promises 173632: it is truncated"),
        (lambda p: cut(p, -RECORD_BYTES), "it is truncated"),
        (lambda p: p.write_bytes(p.read_bytes() + b"\0" * RECORD_BYTES), "it holds more than its header says"),
        (lambda p: write(p, 236, "21", 8), "it is truncated"),
        (lambda p: write(p, 236, "-1", 8), "promises no samples: -1 data records"),
        (lambda p: write(p, 244, "0", 8), "promises no samples: 20 data records of 0 s"),
        (lambda p: write(p, 244, "x", 8), "a number in it is none"),
        (lambda p: write(p, 252, "20", 4), "5632 bytes for 20 signals, which cannot be"),
        (lambda p: write(p, 252, "-7", 4), "for -7 signals, which cannot be"),
        (lambda p: cut(p, 2000), "cut short"),
        (lambda p: cut(p, 5000), "it is truncated"),
        (lambda p: cut(p, 100), "this is no EDF file"),
        (lambda p: cut(p, 0), "this is no EDF file"),
        (lambda p: p.write_bytes(b"RIFF" * 1000), "this is no EDF file"),
        (lambda p: change(p, "unit", FP1, "degC"), "physical dimension of EEG Fp1 is not a voltage"),
        (lambda p: change(p, "unit", ECG, ""), "physical dimension of ECG ECG is not a voltage"),
        (lambda p: change(p, "digital_max", FP1, "-32768"), "calibration of EEG Fp1 is missing or senseless"),
        (lambda p: change(p, "physical_min", FP1, "3276.7"), "calibration of EEG Fp1 is missing or senseless"),
        (lambda p: change(p, "physical_min", FP1, "nan"), "calibration of EEG Fp1 is missing or senseless"),
        (lambda p: change(p, "physical_max", FP1, ""), "calibration of EEG Fp1 is missing or senseless"),
        (rates, "eeg channels are sampled at different rates: 100 and 200 and 300 Hz"),
        (
            lambda p: [change(p, "label", i, "Resp 1") for i in range(21)],
            "no channel is an ECG lead or an EEG electrode; it has Resp 1, Resp 1",
        ),
        (lambda p: [change(p, "label", i, "Haagse") for i in range(21)], "; it has 21 with labels of their own$"),
    ],
)
def test_faulty_files_are_refused_with_a_reason(short: Path, spoil: Callable[[Path], object], reason: str) -> None:
    assert set(read(short.parent).signals) == {"ecg", "eeg"}
    spoil(short)
    with pytest.raises(RecordError, match=reason):
        read(short.parent)


def test_the_person_of_a_faulty_file_is_known_all_the_same(short: Path) -> None:
    (short.parent / "recordings.csv").write_text("file,subject\nSubject00_1.edf,Subject00\n")
    cut(short, -1)
    with pytest.raises(RecordError) as caught:
        read(short.parent)
    assert caught.value.person == "Subject00"


@pytest.mark.parametrize(
    ("unit", "factor"),
    [("uv", 1.0), ("UV", 1.0), ("mV", 1e3), ("MV", 1e3), ("V", 1e6), ("nV", 1e-3), ("µV", 1.0), ("μV", 1.0),
     (b"\xb5V", 1.0)],
)  # fmt: skip
def test_units_are_known_by_name(short: Path, unit: str | bytes, factor: float) -> None:
    before = read(short.parent).signals["ecg"].data
    change(short, "unit", ECG, unit)
    np.testing.assert_allclose(read(short.parent).signals["ecg"].data, before * factor, rtol=1e-6)


def test_a_physical_minimum_above_the_maximum_turns_the_signal_over(short: Path) -> None:
    before = read(short.parent).signals["eeg"].data[FP1]
    change(short, "physical_min", FP1, "3276.7")
    change(short, "physical_max", FP1, "-3276.8")
    np.testing.assert_allclose(read(short.parent).signals["eeg"].data[FP1], -before - 0.1, atol=1e-3)


def test_channels_that_are_nothing_of_ours_need_no_unit_and_rate(short: Path) -> None:
    change(short, "label", FP1, "SaO2")
    change(short, "unit", FP1, "%")
    change(short, "physical_min", FP1, "")
    change(short, "samples", FP1, "150")
    change(short, "samples", REFERENCE, "250")
    recording = read(short.parent)
    assert len(recording.signals["eeg"].channels) == 18
    assert recording.unused == ("SaO2", "EEG A2-A1")


def test_a_file_of_one_modality_gives_that_one(short: Path) -> None:
    change(short, "label", ECG, "Resp")
    recording = read(short.parent)
    assert set(recording.signals) == {"eeg"}
    with pytest.raises(RecordError, match=r"no ecg in the recording; it has eeg \(EEG Fp1, .*; not known: EEG A2"):
        windows_of(recording, PAIRED)
    assert len(windows_of(recording, replace(PAIRED, signals=("eeg",)))) == 2


def test_interrupted_recordings_are_refused_and_others_of_that_kind_are_not(real: Real) -> None:
    path = real("eegmat-original", "Subject00_2") / "Subject00_2.edf"
    whole = read(path.parent, "Subject00_2").signals["eeg"].data
    write(path, 192, "EDF+D", 44)
    np.testing.assert_array_equal(read(path.parent, "Subject00_2").signals["eeg"].data, whole)
    data = path.read_bytes()
    assert data.count(b"+7\x14\x14") == 1
    path.write_bytes(data.replace(b"+7\x14\x14", b"+8\x14\x14"))
    with pytest.raises(RecordError, match=r"interrupted \(EDF\+D\)"):
        read(path.parent, "Subject00_2")
