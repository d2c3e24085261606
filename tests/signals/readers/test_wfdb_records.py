"""WFDB records as they are found in the field: right, unusual, and wrong."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import wfdb

from physio_dist.errors import UserError
from physio_dist.runtime.arrays import Int16Array, Int64Array
from physio_dist.signals.montage import ECG_12
from physio_dist.signals.readers import reader
from physio_dist.signals.recording import RecordError, Recording
from physio_dist.signals.windows import WindowSpec, waveform_hash, windows_of

Write = Callable[..., None]
Real = Callable[..., Path]


def read(folder: Path, record: str = "r") -> Recording:
    return reader("wfdb").read(str(folder), record)


def edit(folder: Path, name: str, *changes: tuple[str, str]) -> None:
    path = folder / f"{name}.hea"
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("gain", "microvolts"),
    [
        ("1000.0(0)/mV", 1.0),
        ("1000(0)/mv", 1.0),
        ("1000", 1.0),
        ("4880(0)/mV", 1000 / 4880),
        ("200/mV", 5.0),
        ("1e3/MV", 1.0),
        ("0.5(0)/uV", 2.0),
        ("0.5(0)/µV", 2.0),
        ("1000000/V", 1.0),
    ],
)
def test_gain_and_unit(tmp_path: Path, write_wfdb: Write, digital: Int16Array, gain: str, microvolts: float) -> None:
    write_wfdb(tmp_path, "r", digital, gain=gain)
    signal = read(tmp_path).signals["ecg"]
    np.testing.assert_allclose(signal.data, digital * microvolts, rtol=1e-5)
    assert signal.rate == 500.0
    assert signal.channels == ECG_12


def test_baseline_is_taken_off_or_else_the_adc_zero(tmp_path: Path, write_wfdb: Write, digital: Int16Array) -> None:
    write_wfdb(tmp_path, "r", digital, gain="1000(-77)/mV")
    np.testing.assert_allclose(read(tmp_path).signals["ecg"].data, digital + 77.0, atol=0.01)
    write_wfdb(tmp_path, "r", digital, gain="1000/mV")
    edit(tmp_path, "r", ("1000/mV 16 0 ", "1000/mV 16 50 "))
    np.testing.assert_allclose(read(tmp_path).signals["ecg"].data[0], digital[0] - 50.0, atol=0.01)


def test_sentinel_and_rails_are_no_values(tmp_path: Path, write_wfdb: Write, digital: Int16Array) -> None:
    digital[3, 10:20] = -32768
    digital[4, 30:40] = 32767
    digital[5, 50:60] = -32767
    write_wfdb(tmp_path, "r", digital)
    missing = np.isnan(read(tmp_path).signals["ecg"].data)
    assert missing.sum() == 30
    assert missing[3, 10:20].all() and missing[4, 30:40].all() and missing[5, 50:60].all()


def test_dat_and_mat_hold_the_same_waveform(tmp_path: Path, write_wfdb: Write, digital: Int16Array) -> None:
    write_wfdb(tmp_path, "a", digital)
    write_wfdb(tmp_path, "b", digital, suffix=".mat", leads=tuple(lead.upper() for lead in ECG_12))
    write_wfdb(tmp_path, "c", (digital // 5).astype(np.int16), gain="200/mV")
    write_wfdb(tmp_path, "d", (digital // 5 * 5).astype(np.int16))
    a, b, c, d = (waveform_hash(read(tmp_path, name)) for name in "abcd")
    assert a == b != c
    assert c == d


@pytest.mark.parametrize("fmt", ["16", "24", "32", "80", "212", "310", "311"])
def test_other_formats_that_the_library_writes_or_reads(tmp_path: Path, fmt: str) -> None:
    rng = np.random.default_rng(0)
    samples = rng.integers(-100, 100, (999, 2))
    if fmt in {"310", "311"}:
        _pack_three_in_four(tmp_path, fmt, samples)
    else:
        wfdb.wrsamp(
            "r",
            fs=360,
            units=["mV", "mV"],
            sig_name=["II", "V1"],
            d_signal=samples,
            fmt=[fmt, fmt],
            adc_gain=[200.0, 200.0],
            baseline=[0, 0],
            write_dir=str(tmp_path),
        )
    np.testing.assert_allclose(read(tmp_path).signals["ecg"].data, samples.T * 5.0, atol=0.01)
    path = tmp_path / "r.dat"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(RecordError, match=r"r\.dat holds \d+ bytes"):
        read(tmp_path)


def _pack_three_in_four(folder: Path, fmt: str, samples: Int64Array) -> None:
    """Formats 310 and 311: three ten-bit samples in four bytes (WFDB manual, signal-5)."""
    flat = (samples.reshape(-1, 3) & 0x3FF).astype(np.uint32)
    a, b, c = flat.T
    if fmt == "311":
        words = a | b << 10 | c << 20
    else:
        low = (a << 1) & 0x7FF | (c & 0x1F) << 11
        high = (b << 1) & 0x7FF | (c >> 5) << 11
        words = low | high << 16
    (folder / "r.dat").write_bytes(words.astype("<u4").tobytes())
    sums = samples.sum(axis=0) % 65536
    (folder / "r.hea").write_text(
        f"r 2 360 {len(samples)}\n"
        + "".join(
            f"r.dat {fmt} 200/mV 10 0 {samples[0, i]} {sums[i]} 0 {lead}\n" for i, lead in enumerate(("II", "V1"))
        )
    )


def test_labels_are_codes_and_nothing_else(tmp_path: Path, write_wfdb: Write, digital: Int16Array) -> None:
    comments = "# Age: 57\n#Sex: female\n# Dx: 426177001,59118001\n# Rx: aspirin\n# Name: Jane Doe\n# 1 January, seen"
    write_wfdb(tmp_path, "r", digital, comments=comments)
    record = read(tmp_path)
    assert record.labels == {"age": 57, "sex": "F", "dx": ["426177001", "59118001"]}
    assert record.person is None
    write_wfdb(tmp_path, "r", digital, comments="#Age: NaN\n#Sex: Unknown\n#Dx: Jane Doe, 59118001, Unknown")
    assert read(tmp_path).labels == {"age": None, "sex": None, "dx": ["59118001"]}
    write_wfdb(tmp_path, "r", digital, comments="#age: 300\n#sex: M")
    assert read(tmp_path).labels == {"age": None, "sex": "M"}
    write_wfdb(tmp_path, "r", digital)
    assert read(tmp_path).labels == {}


def test_person_is_known_from_the_path_where_corpora_put_it_there(
    tmp_path: Path, write_wfdb: Write, digital: Int16Array
) -> None:
    write_wfdb(tmp_path / "files/p1000/p10000032/s40689238", "40689238", digital)
    (record,) = reader("wfdb").records(str(tmp_path))
    assert record == "files/p1000/p10000032/s40689238/40689238"
    assert read(tmp_path, record).person == "p10000032"


def test_records_are_found_below_and_sorted(tmp_path: Path, write_wfdb: Write, digital: Int16Array) -> None:
    for name in ("b/2", "b/10", "a", "c/d/e"):
        path = tmp_path / name
        write_wfdb(path.parent, path.name, digital)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert reader("wfdb").records(str(tmp_path)) == ["a", "b/10", "b/2", "c/d/e"]
    assert reader("wfdb").records(str(tmp_path / "a.hea")) == ["a"]
    assert reader("wfdb").read(str(tmp_path / "a.hea"), "a").signals["ecg"].data.shape == (12, 5000)


def test_records_files_are_followed(tmp_path: Path, write_wfdb: Write, digital: Int16Array) -> None:
    for name in ("g1/a", "g1/extra", "g2/b", "g3/c"):
        path = tmp_path / name
        write_wfdb(path.parent, path.name, digital)
    (tmp_path / "RECORDS").write_text("g1/\ng2/\n")
    (tmp_path / "g1" / "RECORDS").write_text("a\nlost\n\n")
    records = reader("wfdb").records(str(tmp_path))
    assert records == ["g1/a", "g1/lost", "g2/b", "g3/c"]
    with pytest.raises(RecordError, match="header file is missing"):
        read(tmp_path, "g1/lost")
    (tmp_path / "RECORDS").write_text("g1/a\ng2/b\n")
    assert reader("wfdb").records(str(tmp_path)) == ["g1/a", "g2/b"], "listed above, so not searched below"


@pytest.mark.parametrize("record", ["../r", "/etc/r", "a/../../r", "", "..", "a\\..\\r"])
def test_ids_stay_inside_the_folder(tmp_path: Path, write_wfdb: Write, digital: Int16Array, record: str) -> None:
    write_wfdb(tmp_path, "r", digital)
    (tmp_path / "sub").mkdir()
    with pytest.raises(RecordError, match="out of the source folder"):
        read(tmp_path / "sub", record)


def test_signal_files_stay_inside_the_folder(tmp_path: Path, write_wfdb: Write, digital: Int16Array) -> None:
    write_wfdb(tmp_path, "r", digital)
    (tmp_path / "sub").mkdir()
    shutil.copy(tmp_path / "r.hea", tmp_path / "sub")
    path = tmp_path / "sub" / "r.hea"
    path.write_text(path.read_text().replace("r.dat", "../r.dat"))
    with pytest.raises(RecordError):
        read(tmp_path / "sub")


def test_hint_at_the_other_reader_of_mat_files(data_dir: Path) -> None:
    with pytest.raises(UserError, match=r"looked for WFDB headers.*there is 10 \.mat; .*cpsc2018"):
        reader("wfdb").records(str(data_dir / "cpsc2018"))


DAT, MAT = "1002867", "E07500"


def test_truncated_and_overlong_signal_files(real: Real) -> None:
    folder = real("cinc2011-set-a", DAT)
    path = folder / f"{DAT}.dat"
    whole = path.read_bytes()
    for wrong in (whole[:-2], whole[: len(whole) // 2], b"", whole + b"\0\0"):
        path.write_bytes(wrong)
        with pytest.raises(
            RecordError, match=rf"holds {len(wrong)} bytes of samples; 12 signals x 5000 samples take 120000"
        ):
            read(folder, DAT)
    path.write_bytes(whole)
    assert read(folder, DAT).signals["ecg"].data.shape == (12, 5000)


def test_missing_files(real: Real) -> None:
    folder = real("cinc2021", MAT)
    (folder / f"{MAT}.mat").unlink()
    with pytest.raises(RecordError, match=rf"signal file is missing: {MAT}\.mat"):
        read(folder, MAT)
    with pytest.raises(RecordError, match="header file is missing"):
        read(folder, "E0")


def test_flipped_checksum_and_first_sample(real: Real) -> None:
    folder = real("cinc2021", MAT)
    edit(folder, MAT, (" -58 -5598 0 II", " -58 -5597 0 II"))
    with pytest.raises(RecordError, match=r"checksum of signal 1 \(II\) disagrees"):
        read(folder, MAT)
    edit(folder, MAT, (" -58 -5597 0 II", " -59 -5598 0 II"))
    with pytest.raises(RecordError, match=r"first sample of signal 1 \(II\) disagrees"):
        read(folder, MAT)


def test_flipped_bit_in_the_samples(real: Real) -> None:
    folder = real("cinc2011-set-a", DAT)
    path = folder / f"{DAT}.dat"
    data = bytearray(path.read_bytes())
    data[60_000] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(RecordError, match="checksum of signal 0"):
        read(folder, DAT)


def test_checksums_that_nobody_computed(tmp_path: Path, write_wfdb: Write, digital: Int16Array) -> None:
    write_wfdb(tmp_path, "r", digital)
    path = tmp_path / "r.hea"
    head, *lines = path.read_text().splitlines()
    short = [line.split()[:3] for line in lines]
    path.write_text("\n".join([head, *(" ".join([*s, "16 0 0 0 0", v]) for s, v in zip(short, ECG_12, strict=False))]))
    assert read(tmp_path).signals["ecg"].channels == ECG_12
    path.write_text("\n".join([head, *(" ".join([*s, "16 0"]) for s in short if s)]))
    assert len(read(tmp_path).signals["ecg"].channels) == 12


def test_header_for_four_leads_beside_data_of_twelve(real: Real) -> None:
    folder = real("cinc2011-set-a", DAT)
    path = folder / f"{DAT}.hea"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{DAT} 4 500 5000", *lines[1:5]]))
    with pytest.raises(RecordError, match="4 signals x 5000 samples take 40000"):
        read(folder, DAT)
    path.write_text("\n".join([f"{DAT} 4 500 5000", *lines[1:]]))
    with pytest.raises(RecordError, match="announces 4 signals but describes 12"):
        read(folder, DAT)
    path.write_text("\n".join([f"{DAT} 4 500", *lines[1:5]]))
    with pytest.raises(RecordError, match="checksum of signal"):
        read(folder, DAT)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "cannot be parsed"),
        ("\0\1\2\3", "cannot be parsed"),
        ("<html>404</html>\n", "cannot be parsed"),
        ("r twelve 500 5000\n", "cannot be parsed"),
        ("r 0 500 5000\n", "describes no signals"),
        ("r/3 1 500 5000\nr_1 1000\n", "several segments"),
        ("r 1 500 5000\nr.dat\n", "cannot be parsed"),
        ("r 1 500 5000\nr.dat 99 200/mV 16 0 0 0 0 I\n", "format 99 is not supported"),
        ("r 1 500 60000\nr.dat 16\n", r"no gain for signal 0 \(not a standard lead\)"),
        ("r 1 500 60000\nr.dat 16 0/mV 16 0 0 0 0 I\n", r"no gain for signal 0 \(I\)"),
        ("r 1 500 60000\nr.dat 16 200/mmHg 16 0 0 0 0 I\n", r"unit of signal 0 \(I\) is not a voltage"),
        ("r 1 500 60000\nr.dat 16 200/mmHg 16 0 0 0 0 ABP\n", "none of the signals is a voltage"),
    ],
)
def test_headers_that_say_too_little(
    tmp_path: Path, write_wfdb: Write, digital: Int16Array, text: str, reason: str
) -> None:
    write_wfdb(tmp_path, "r", digital)
    (tmp_path / "r.hea").write_text(text)
    with pytest.raises(RecordError, match=reason):
        read(tmp_path)


def test_reasons_hold_no_text_of_the_header(tmp_path: Path, write_wfdb: Write, digital: Int16Array) -> None:
    write_wfdb(tmp_path, "r", digital)
    (tmp_path / "r.hea").write_text("r 1 500 5000 10:00:00 99/99/2020\nr.dat 16 200/mV 16 0 0 0 0 Jane Doe\n")
    with pytest.raises(RecordError) as caught:
        read(tmp_path)
    assert "2020" not in str(caught.value)
    (tmp_path / "r.hea").write_text("r 1 500 60000\nr.dat 16 200/mV 16 0 5 5 0 Jane Doe\n")
    with pytest.raises(RecordError) as caught:
        read(tmp_path)
    assert "Jane" not in str(caught.value)


def test_signals_that_are_no_leads_stay_out(tmp_path: Path, write_wfdb: Write, digital: Int16Array) -> None:
    write_wfdb(tmp_path, "r", digital[:3], leads=("II", "V1", "RESP"))
    edit(tmp_path, "r", ("V1", "V1"))
    path = tmp_path / "r.hea"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace("/mV", "/ohm")
    path.write_text("\n".join(lines))
    assert read(tmp_path).signals["ecg"].channels == ("II", "V1")
    write_wfdb(tmp_path, "r", digital[:2], leads=("MLII", "MCL1"))
    assert read(tmp_path).signals["ecg"].channels == ("MLII", "MCL1")


def test_leads_permuted_and_in_upper_case_come_back_in_order(real: Real, write_wfdb: Write) -> None:
    folder = real("cinc2021", MAT)
    truth = read(folder, MAT)
    digital = truth.signals["ecg"].data.astype(np.int16)
    order = np.random.default_rng(3).permutation(12)
    write_wfdb(folder, "mixed", digital[order], leads=tuple(ECG_12[i].upper() for i in order))
    mimic = [0, 1, 2, 3, 5, 4, *range(6, 12)]
    write_wfdb(folder, "mimic", digital[mimic], leads=tuple(ECG_12[i] for i in mimic))
    (wanted,) = windows_of(truth, WindowSpec())
    assert wanted.usable and not wanted.reasons
    for name in ("mixed", "mimic"):
        record = read(folder, name)
        (window,) = windows_of(record, WindowSpec())
        np.testing.assert_array_equal(window.data["ecg"], wanted.data["ecg"])
        assert window.reasons == ()
        assert waveform_hash(record) == waveform_hash(truth)


def test_real_leads_made_bad(real: Real, write_wfdb: Write) -> None:
    folder = real("cinc2021", MAT)
    digital = read(folder, MAT).signals["ecg"].data.astype(np.int16)

    def verdict(changed: Int16Array, leads: tuple[str, ...] = ECG_12) -> tuple[str, ...]:
        write_wfdb(folder, "bad", changed[: len(leads)], leads=leads)
        (window,) = windows_of(read(folder, "bad"), WindowSpec(min_leads=1))
        return window.reasons

    bad = digital.copy()
    bad[7] = -32768
    assert verdict(bad) == ("missing samples: V2",)
    bad = digital.copy()
    bad[[1, 11]] = 250
    assert verdict(bad) == ("flat: II, V6",)
    bad = digital.copy()
    bad[4] = np.roll(bad[4], 250)
    assert verdict(bad)[0].startswith("contradicts the limb leads' identities")
    assert verdict(bad)[0].endswith(": aVL")
    with pytest.raises(RecordError, match="lead V5, V6 is missing; the record has I, II"):
        verdict(digital, ECG_12[:10])
    with pytest.raises(RecordError, match="two channels are lead V1"):
        verdict(digital, (*ECG_12[:11], "v1"))
