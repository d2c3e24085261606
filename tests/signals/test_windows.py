"""What becomes of a recording on its way into windows."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from physio_dist.errors import UserError
from physio_dist.signals.montage import ECG_12, LEAD_MATRIX, LIMB
from physio_dist.signals.quality import bridge_gaps, in_runs
from physio_dist.signals.recording import RecordError, Recording, Signal
from physio_dist.signals.windows import WindowSpec, waveform_hash, windows_of


def recording(data: np.ndarray, rate: float, channels: tuple[str, ...] = ECG_12, modality: str = "ecg") -> Recording:
    return Recording("r", {modality: Signal(np.asarray(data, np.float32), rate, channels)}, None, {})


def sines(rate: float, seconds: float, frequency: float, amplitude: float = 1000.0) -> np.ndarray:
    """Twelve leads from three electrodes in quadrature, I of the asked amplitude."""
    turns = 2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate
    two = amplitude * np.stack([np.sin(turns), np.cos(turns)])
    limb = np.array([LEAD_MATRIX[lead] for lead in LIMB]) @ two
    return np.concatenate([limb, np.repeat(two, 3, axis=0)])


def changed(record: Recording, lead: str, start_s: float, end_s: float, value: float) -> Recording:
    signal = record.signals["ecg"]
    signal.data[ECG_12.index(lead), round(start_s * signal.rate) : round(end_s * signal.rate)] = value
    return record


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([125.0, 200.0, 250.0, 257.0, 360.0, 500.0, 976.5625, 1000.0]), st.floats(2.0, 20.0))
def test_sine_keeps_amplitude_and_frequency(rate: float, frequency: float) -> None:
    windows = windows_of(recording(sines(rate, 30, frequency), rate), WindowSpec())
    assert len(windows) == 3
    middle = windows[1].data["ecg"][0].astype(float)
    at = 10 + np.arange(2000) / 200
    # The part of the window that is this sine, in phase: nothing was delayed, scaled or moved in frequency.
    wave = np.sin(2 * np.pi * frequency * at)
    np.testing.assert_allclose(middle, 1000 * wave, atol=12.0)


def test_band_keeps_what_is_inside_and_drops_what_is_outside() -> None:
    def left(frequency: float) -> float:
        windows = windows_of(recording(sines(500, 30, frequency), 500), replace(WindowSpec(), min_leads=1))
        return float(windows[1].data["ecg"][0].std() * np.sqrt(2) / 1000)

    assert left(10) == pytest.approx(1.0, abs=0.01)
    assert left(0.5) == pytest.approx(0.5, abs=0.03)
    assert left(45) == pytest.approx(0.5, abs=0.03)
    assert left(0.1) < 0.01
    assert left(80) < 0.01
    # 190 Hz lies beyond the new rate's Nyquist frequency and would come back as 10 Hz.
    assert left(190) < 0.01


def test_windows_follow_each_other_without_overlap(clean: Recording) -> None:
    windows = windows_of(clean, WindowSpec())
    assert [window.start_s for window in windows] == [10.0 * i for i in range(8)]
    assert all(window.data["ecg"].shape == (12, 2000) for window in windows)
    shorter = windows_of(clean, WindowSpec(seconds=7))
    assert len(shorter) == 11
    whole = np.concatenate([window.data["ecg"] for window in windows], axis=1)
    np.testing.assert_array_equal(np.concatenate([w.data["ecg"] for w in shorter], axis=1), whole[:, : 11 * 1400])


def test_same_recording_gives_same_windows(clean: Recording) -> None:
    first, second = windows_of(clean, WindowSpec()), windows_of(clean, WindowSpec())
    for a, b in zip(first, second, strict=True):
        assert a.data["ecg"].tobytes() == b.data["ecg"].tobytes()
        assert a.reasons == b.reasons


def test_offset_and_drift_of_electrodes_do_not_matter() -> None:
    beating = sines(500, 30, 7)
    still = windows_of(recording(beating, 500), WindowSpec())
    two = np.array([[150_000.0], [-80_000.0]]) + np.array([[6000.0], [-9000.0]]) * np.linspace(0, 1, 15_000)
    drifting = beating.copy()
    drifting[:6] += np.array([LEAD_MATRIX[lead] for lead in LIMB]) @ two
    for before, after in zip(still, windows_of(recording(drifting, 500), WindowSpec()), strict=True):
        assert after.usable and not after.reasons
        difference = before.data["ecg"].astype(int) - after.data["ecg"]
        assert np.abs(difference).max() <= 10


def test_quiet_baseline_is_not_saturation(clean: Recording) -> None:
    data = clean.signals["ecg"].data
    # Upward beats of 1.5 mV from a baseline that coarse resolution holds at one value for most of the time.
    data[6] = 0.0
    for start in range(0, data.shape[1] - 20, 160):
        data[6, start : start + 20] = 1500 * np.hanning(20)
    assert all(window.reasons == () for window in windows_of(clean, WindowSpec()))


def test_dead_limb_leads_do_not_accuse_the_living(clean: Recording) -> None:
    for lead in ("aVL", "aVF"):
        changed(clean, lead, 0, 10, 0.0)
    assert windows_of(clean, WindowSpec())[0].reasons == ("flat: aVL, aVF",)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.31, 1.0), st.floats(100.0, 9000.0))
def test_integers_never_wrap(uv_per_bit: float, amplitude: float) -> None:
    spec = WindowSpec(uv_per_bit=uv_per_bit)
    truth = windows_of(recording(sines(200, 10, 5, amplitude), 200), WindowSpec(uv_per_bit=1.0))[0]
    window = windows_of(recording(sines(200, 10, 5, amplitude), 200), spec)[0]
    for row in np.flatnonzero(window.valid["ecg"]):
        wanted = np.clip(truth.data["ecg"][row] / uv_per_bit, -32767, 32767)
        np.testing.assert_allclose(window.data["ecg"][row], wanted, atol=0.51 / uv_per_bit + 0.51)


@pytest.mark.parametrize(
    ("lead", "start", "end", "value", "fault"),
    [
        ("V2", 20, 30, 123.0, "flat: V2"),
        ("V2", 24, 28, 0.0, "flat: V2"),
        ("V6", 20, 30, np.nan, "missing samples: V6"),
        ("V6", 25, 25.2, np.nan, "missing samples: V6"),
        ("V6", 25, 25.2, np.inf, "missing samples: V6"),
        ("V1", 24, 24.8, 5000.0, "saturated: V1"),
        ("V1", 25, 25.05, 60_000.0, "beyond 10 mV: V1"),
        ("aVL", 24, 24.3, 1500.0, "contradicts the limb leads' identities"),
    ],
)
def test_windows_of_zeroes_and_names_faulty_leads(
    clean: Recording, lead: str, start: float, end: float, value: float, fault: str
) -> None:
    windows = windows_of(changed(clean, lead, start, end, value), WindowSpec())
    faulty = windows[2]
    row = ECG_12.index(lead)
    assert np.flatnonzero(~faulty.valid["ecg"]).tolist() == [row]
    assert len(faulty.reasons) == 1
    assert faulty.reasons[0].startswith(fault)
    assert faulty.reasons[0].endswith(f": {lead}")
    assert not faulty.data["ecg"][row].any()
    assert faulty.usable
    assert all(window.valid["ecg"].all() and window.data["ecg"].any(axis=1).all() for window in windows[4:])


def test_short_gaps_are_bridged(clean: Recording) -> None:
    before = windows_of(clean, WindowSpec())[2].data["ecg"].astype(int)
    window = windows_of(changed(clean, "V6", 25, 25.05, np.nan), WindowSpec())[2]
    assert window.valid["ecg"].all()
    assert window.data["ecg"][11].any()
    np.testing.assert_array_equal(window.data["ecg"][:11], before[:11])


def test_many_short_gaps_are_a_fault(clean: Recording) -> None:
    clean.signals["ecg"].data[11, 4000:6000:10] = np.nan
    assert windows_of(clean, WindowSpec())[2].reasons == ("missing samples: V6",)
    clean.signals["ecg"].data[11, 0:200:10] = np.nan
    assert windows_of(clean, WindowSpec())[0].reasons == ()


def test_window_with_too_few_valid_leads_is_unusable(clean: Recording) -> None:
    for lead in ("V1", "V2", "V3"):
        changed(clean, lead, 0, 10, 7.0)
    first, *others = windows_of(clean, WindowSpec())
    assert not first.usable
    assert first.reasons == ("flat: V1, V2, V3", "9 ecg channels valid of 12, 10 needed")
    assert all(window.usable for window in others)
    assert windows_of(clean, WindowSpec(min_leads=9))[0].usable
    chest = WindowSpec(leads=("V1", "V4"))
    assert not windows_of(clean, chest)[0].usable, "of two leads both are needed"


def test_window_of_dead_recording_names_every_lead() -> None:
    (window,) = windows_of(recording(np.full((12, 5000), -80_000.0), 500), WindowSpec())
    assert not window.usable
    assert window.reasons[0] == "flat: " + ", ".join(ECG_12)
    assert not window.data["ecg"].any()


def test_windows_of_repairs_swapped_leads(clean: Recording) -> None:
    truth = windows_of(clean, WindowSpec())
    data = clean.signals["ecg"].data
    swapped = recording(data[[0, 1, 2, 3, 5, 4, *range(6, 12)]], 200)
    windows = windows_of(swapped, WindowSpec())
    assert all(w.reasons == ("aVL and aVF bear each other's name in the file; put right",) for w in windows)
    for window, wanted in zip(windows, truth, strict=True):
        assert window.usable
        np.testing.assert_array_equal(window.data["ecg"], wanted.data["ecg"])
    with pytest.raises(RecordError, match="aVL and aVF bear each other's name"):
        windows_of(swapped, WindowSpec(swapped_leads="reject"))
    window = windows_of(changed(swapped, "aVF", 0, 10, 3.0), WindowSpec())[0]
    assert window.reasons[1:] == ("flat: aVL",), "the fault follows the lead, not the name"


def test_permuted_limb_leads_are_rejected(clean: Recording) -> None:
    data = clean.signals["ecg"].data
    with pytest.raises(RecordError, match=r"contradicts the limb leads' identities.*I, II, III, aVR, aVL, aVF"):
        windows_of(recording(data[[1, 2, 0, 5, 3, 4, *range(6, 12)]], 200), WindowSpec())


def test_inverted_lead_is_named(clean: Recording) -> None:
    clean.signals["ecg"].data[3] *= -1
    for window in windows_of(clean, WindowSpec()):
        assert window.usable
        assert not window.valid["ecg"][3]
        assert "identities" in window.reasons[0]


def test_windows_of_rejects_or_masks_missing_leads(clean: Recording) -> None:
    six = recording(clean.signals["ecg"].data[:6], 200, ECG_12[:6])
    with pytest.raises(RecordError, match=r"lead V1, V2, V3, V4, V5, V6 is missing; the record has I, II, III, aVR"):
        windows_of(six, WindowSpec())
    window = windows_of(six, WindowSpec(missing_channels="mask"))[0]
    assert window.usable
    assert window.valid["ecg"].tolist() == [True] * 6 + [False] * 6
    assert window.data["ecg"].shape == (12, 2000)
    assert not window.data["ecg"][6:].any()
    assert window.reasons == ("not in the record: V1, V2, V3, V4, V5, V6",)
    with pytest.raises(RecordError, match="missing"):
        windows_of(six, WindowSpec(missing_channels="mask", leads=("V1", "V2")))


def test_computed_leads_are_as_good_as_their_sources(clean: Recording) -> None:
    data = clean.signals["ecg"].data
    eight = recording(data[[0, 1, *range(6, 12)]], 200, ("I", "II", *ECG_12[6:]))
    whole, derived = windows_of(clean, WindowSpec()), windows_of(eight, WindowSpec())
    np.testing.assert_allclose(derived[1].data["ecg"], whole[1].data["ecg"], atol=1)
    eight.signals["ecg"].data[0, 2000:4000] = 5.0
    window = windows_of(eight, WindowSpec())[1]
    assert window.valid["ecg"].tolist() == [False, True, False, False, False, False] + [True] * 6
    assert "computed from invalid leads: III, aVR, aVL, aVF" in window.reasons
    # A source that is not among the asked leads is judged all the same.
    (only,) = {w.valid["ecg"].tolist()[0] for w in windows_of(eight, WindowSpec(leads=("aVF", "V1")))[1:2]}
    assert only is False


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (recording(sines(400, 7.335, 5), 400), r"7\.335 s long, shorter than a window of 10 s"),
        (recording(sines(100, 10, 5), 100), r"sampled at 100 Hz; a band up to 45 Hz needs 112\.5 Hz or more"),
        (recording(np.zeros((12, 0)), 500), "0 s long"),
        (recording(sines(500, 10, 5), float("nan")), "sampled at nan Hz"),
        (Recording("r", {}, None, {}), "no signals"),
    ],
)
def test_windows_of_raises_on_unusable_recordings(record: Recording, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        windows_of(record, WindowSpec())


def test_one_sample_short_still_makes_a_window() -> None:
    assert len(windows_of(recording(sines(500, 10, 5)[:, :4999], 500), WindowSpec())) == 1
    with pytest.raises(RecordError, match="shorter"):
        windows_of(recording(sines(500, 10, 5)[:, :4990], 500), WindowSpec())


def test_other_modalities_keep_their_channels(clean: Recording) -> None:
    eeg = np.random.default_rng(0).normal(0, 20, (3, 5 * 2560)).astype(np.float32)
    eeg[1] = 4.0
    both = Recording("r", {**clean.signals, "eeg": Signal(eeg, 256.0, ("Fp1", "Cz", "O2"))}, None, {})
    windows = windows_of(both, WindowSpec())
    assert len(windows) == 5, "the shorter modality decides"
    assert windows[0].data["eeg"].shape == (3, 2000)
    assert windows[0].valid["eeg"].tolist() == [True, False, True]
    assert windows[0].reasons == ("flat: Cz",)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0},
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"seconds": 10.001},
        {"band": (0.5, 100.0)},
        {"band": (5.0, 1.0)},
        {"band": (0.0, 45.0)},
        {"uv_per_bit": 0.0},
        {"leads": ()},
        {"leads": ("I", "Lead I")},
        {"min_leads": 0},
        {"missing_channels": "ignore"},
        {"swapped_leads": "keep"},
    ],
)
def test_senseless_specifications_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        WindowSpec(**wrong)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 8))
def test_runs_are_those_that_counting_finds(flags: list[bool], length: int) -> None:
    text = "".join("x" if flag else " " for flag in flags)
    expected = [len(word) >= length for word in text.split(" ") for _ in (*word, "")][: len(flags)]
    expected = [a and b for a, b in zip(expected, flags, strict=True)]
    assert in_runs(np.array([flags, flags]), length).tolist() == [expected, expected]


def test_bridges_are_straight() -> None:
    filled, missing = bridge_gaps(np.array([[np.nan, 1.0, np.nan, np.nan, 4.0, np.inf], [np.nan] * 6]))
    assert filled.tolist() == [[1, 1, 2, 3, 4, 4], [0] * 6]
    assert missing[0].tolist() == [True, False, True, True, False, True]
    assert missing[1].all()


def test_hash_knows_a_waveform_by_its_samples(clean: Recording) -> None:
    data = np.rint(clean.signals["ecg"].data / 2.5) * 2.5
    wanted = waveform_hash(recording(data, 200))
    noise = np.random.default_rng(0).normal(0, 1e-4, data.shape)
    padded = np.pad(data, ((0, 0), (40, 41)))
    mimic = [0, 1, 2, 3, 5, 4, *range(6, 12)]
    same = [
        recording(data + noise, 200),
        recording(padded, 200),
        recording(np.pad(data, ((0, 0), (40, 41)), constant_values=np.nan), 200),
        recording(data[mimic], 200, tuple(ECG_12[i].upper() for i in mimic)),
        recording(data[[0, 1, *range(6, 12)]], 200, ("I", "II", *ECG_12[6:])),
        Recording("other", {"ecg": Signal(data.astype(np.float32), 200.0, ECG_12)}, "somebody", {"age": 50}),
    ]
    assert {waveform_hash(record) for record in same} == {wanted}
    touched = data.copy()
    touched[7, 1234] += 2.0
    holed = data.copy()
    holed[7, 1234] = np.nan
    other = [recording(touched, 200), recording(holed, 200), recording(data, 250), recording(data[:, 3:], 200)]
    assert wanted not in {waveform_hash(record) for record in other}
    assert len(bytes.fromhex(wanted)) == hashlib.sha256().digest_size


def test_hash_of_recordings_without_standard_leads() -> None:
    eeg = np.random.default_rng(0).normal(0, 20, (2, 500))
    one = waveform_hash(recording(eeg, 200, ("Fp1", "Cz"), "eeg"))
    assert one == waveform_hash(recording(eeg[::-1], 200, ("cz", "FP1"), "eeg"))
    assert one != waveform_hash(recording(eeg[::-1], 200, ("Fp1", "Cz"), "eeg"))
