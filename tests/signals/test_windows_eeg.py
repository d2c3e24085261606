"""What becomes of EEG, alone and beside an ECG, on its way into windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from physio_dist.errors import UserError
from physio_dist.signals.montage import EEG_19
from physio_dist.signals.recording import RecordError, Recording, Signal
from physio_dist.signals.windows import WindowSpec, windows_of

PAIRED = WindowSpec(signals=("ecg", "eeg"), leads=("ECG",), eeg_channels=EEG_19)
EEG = WindowSpec(signals=("eeg",), eeg_channels=EEG_19)


def noise(rate: float = 256.0, seconds: float = 30.0, channels: tuple[str, ...] = EEG_19) -> Signal:
    data = np.random.default_rng(0).normal(0, 20, (len(channels), round(rate * seconds)))
    return Signal(data.astype(np.float32), rate, channels)


def beats(rate: float = 500.0, seconds: float = 30.0, channels: tuple[str, ...] = ("ECG ECG",)) -> Signal:
    wave = 800 * np.sin(2 * np.pi * 1.2 * np.arange(round(rate * seconds)) / rate) ** 15
    return Signal(np.tile(wave, (len(channels), 1)).astype(np.float32), rate, channels)


def recording(**signals: Signal) -> Recording:
    return Recording("r", signals, None, {})


def tone(frequency: float, rate: float, spec: WindowSpec = EEG) -> float:
    """The share of a tone's amplitude that is left."""
    wave = 50 * np.sin(2 * np.pi * frequency * np.arange(round(30 * rate)) / rate)
    made = windows_of(recording(eeg=Signal(np.tile(wave, (19, 1)).astype(np.float32), rate, EEG_19)), spec)
    return float(made[1].data["eeg"][0].std() * np.sqrt(2) * spec.eeg_uv_per_bit / 50)


def test_both_modalities_are_cut_at_the_same_times_each_in_its_own_steps() -> None:
    # One event in both: a bump of the ECG's and the EEG's own height 12.5 s after the start.
    ecg, eeg = beats(), noise()
    ecg.data[:] = 100 * np.sin(2 * np.pi * 7 * np.arange(15_000) / 500)
    for signal, height in ((ecg, 1500.0), (eeg, 300.0)):
        at = round(12.5 * signal.rate)
        signal.data[:, at - 10 : at + 11] += height * np.hanning(21).astype(np.float32)
    windows = windows_of(recording(ecg=ecg, eeg=eeg), PAIRED)
    assert [window.start_s for window in windows] == [0.0, 10.0, 20.0]
    assert all(window.usable and not window.reasons for window in windows)
    middle = windows[1]
    assert (middle.data["ecg"].shape, middle.data["eeg"].shape) == ((1, 2000), (19, 2000))
    assert abs(int(middle.data["ecg"][0].argmax()) - 500) <= 2
    assert abs(int(middle.data["eeg"].mean(axis=0).argmax()) - 500) <= 2
    assert 1000 < middle.data["ecg"].max() < 1700
    assert 2000 < middle.data["eeg"].mean(axis=0).max() < 3500


def test_a_modality_is_written_only_if_it_is_asked_for() -> None:
    both = recording(ecg=beats(), eeg=noise())
    assert set(windows_of(both, EEG)[0].data) == {"eeg"}
    assert set(windows_of(both, WindowSpec(signals=("ecg",), leads=("ECG",)))[0].data) == {"ecg"}
    assert set(windows_of(both, WindowSpec(leads=("ECG",)))[0].data) == {"ecg", "eeg"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (recording(ecg=beats()), r"^no eeg in the recording; it has ecg \(ECG ECG\)$"),
        (recording(eeg=noise(channels=("Cz", "Pz"))), r"^no ecg in the recording; it has eeg \(Cz, Pz\)$"),
        (recording(eeg=noise(channels=("Cz", "Haagse"))), r"; it has eeg \(Cz, 1 other channels\)$"),
        (
            Recording("r", {"ecg": beats()}, None, {}, ("Fp1-F7", "EOG left")),
            r"it has ecg \(ECG ECG\); not known: Fp1-F7, EOG left$",
        ),
    ],
)
def test_a_missing_modality_is_named_with_what_there_is(record: Recording, reason: str) -> None:
    with pytest.raises(RecordError, match=reason):
        windows_of(record, PAIRED)


def test_an_ecg_without_a_lead_is_no_standard_lead() -> None:
    with pytest.raises(RecordError, match=r"lead II is missing; the record has ECG ECG; leads=ECG takes 'ECG ECG'"):
        windows_of(recording(ecg=beats()), WindowSpec(leads=("II",)))
    with pytest.raises(RecordError, match=r"lead V9 is missing; the record has I, 2 other channels$"):
        windows_of(recording(ecg=beats(channels=("I", "MLII", "Haagse"))), WindowSpec(leads=("V9",)))
    with pytest.raises(RecordError, match=r"lead ECG is missing; the record has I, II$"):
        windows_of(recording(ecg=beats(channels=("I", "II"))), WindowSpec(leads=("ECG",)))


def test_electrodes_are_chosen_by_name_in_the_asked_order() -> None:
    signal = noise(channels=("EEG T3-REF", "EEG CZ-REF", "EEG T8-REF"))
    plain = windows_of(recording(eeg=signal), WindowSpec(signals=("eeg",)))[1].data["eeg"]
    chosen = windows_of(recording(eeg=signal), WindowSpec(signals=("eeg",), eeg_channels=("T4", "T7")))[1]
    np.testing.assert_array_equal(chosen.data["eeg"], plain[[2, 0]])
    assert chosen.usable


def test_missing_electrodes_are_rejected_with_a_hint_or_masked() -> None:
    some = noise(channels=("EEG Fp1", "EEG Cz", "EEG FC5", "EEG O2"))
    asked = ("Fp1", "FC3", "Cz", "O2")
    with pytest.raises(
        RecordError, match=r"electrode FC3 is missing; the record has EEG Fp1.*; FC3: did you mean 'FC5'"
    ):
        windows_of(recording(eeg=some), WindowSpec(eeg_channels=asked))
    window = windows_of(
        recording(eeg=some), WindowSpec(eeg_channels=("fp1", "fc3", "CZ", "O2"), missing_channels="mask")
    )[0]
    assert window.valid["eeg"].tolist() == [True, False, True, True]
    assert window.usable
    assert window.reasons == ("not in the record: FC3",)
    assert not window.data["eeg"][1].any()
    with pytest.raises(RecordError, match="electrode Oz, Iz is missing"):
        windows_of(recording(eeg=some), WindowSpec(eeg_channels=("Oz", "Iz"), missing_channels="mask"))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda row: row.fill(17.0), "flat"),
        (lambda row: np.multiply(row, 0.005, out=row), "flat"),  # an open input that dithers
        (lambda row: np.add(row, 5000 * np.sin(np.arange(len(row)) / 40), out=row), "beyond 0.8 mV"),
        (lambda row: row.__setitem__(slice(3000, 3300), 420.0), "saturated"),
        (lambda row: row.__setitem__(slice(3000, 3030), np.nan), "missing samples"),
    ],
)
def test_faulty_electrodes_are_named_and_zeroed(spoil: Any, fault: str) -> None:
    signal = noise()
    spoil(signal.data[4])
    window = windows_of(recording(ecg=beats(), eeg=signal), PAIRED)[1]
    assert window.reasons == (f"{fault}: C3",)
    assert np.flatnonzero(~window.valid["eeg"]).tolist() == [4]
    assert window.valid["ecg"].all()
    assert not window.data["eeg"][4].any()
    assert window.usable


def test_drift_and_offset_of_electrodes_are_no_fault() -> None:
    signal = noise()
    signal.data[:] += np.float32(90_000) + np.linspace(0, 3000, signal.data.shape[1], dtype=np.float32)
    assert all(window.usable and not window.reasons for window in windows_of(recording(eeg=signal), EEG))


@pytest.mark.parametrize(("dead", "fit"), [(5, True), (6, False)])
def test_three_quarters_of_the_electrodes_have_to_be_valid(dead: int, fit: bool) -> None:
    signal = noise()
    signal.data[:dead] = 3.0
    window = windows_of(recording(ecg=beats(), eeg=signal), PAIRED)[1]
    assert window.usable is fit
    assert fit or window.reasons[-1] == "13 eeg channels valid of 19, 14 needed"


def test_the_ecg_alone_makes_a_pair_unusable() -> None:
    ecg = beats()
    ecg.data[:] = 0.0
    window = windows_of(recording(ecg=ecg, eeg=noise()), PAIRED)[0]
    assert not window.usable
    assert window.reasons == ("flat: ECG", "0 ecg channels valid of 1, 1 needed")


def test_the_band_of_eeg_is_its_own() -> None:
    assert tone(10, 500) == pytest.approx(1.0, abs=0.01)
    assert tone(0.3, 500) == pytest.approx(0.5, abs=0.05)
    assert tone(75, 500) == pytest.approx(0.5, abs=0.03)
    assert tone(60, 500) > 0.9, "the ECG's band ends at 45 Hz"
    assert tone(90, 500) < 0.1
    assert tone(190, 500) < 0.02
    narrow = WindowSpec(signals=("eeg",), eeg_channels=EEG_19, eeg_band=(5.0, 20.0), eeg_uv_per_bit=0.05)
    assert tone(10, 500, narrow) == pytest.approx(1.0, abs=0.02)
    assert tone(30, 500, narrow) < 0.1


def test_the_band_ends_where_the_rate_ends() -> None:
    assert EEG.band_of("eeg", 500) == (0.3, 75.0)
    assert EEG.band_of("eeg", 128) == (0.3, pytest.approx(51.2))
    assert WindowSpec(rate=100, eeg_channels=EEG_19, band=(0.5, 40.0)).band_of("eeg", 500) == (0.3, pytest.approx(40.0))
    assert tone(30, 128) == pytest.approx(1.0, abs=0.01)
    assert tone(51.2, 128) == pytest.approx(0.5, abs=0.05)
    for rate in (101.0, 102.4, 111.0, 128.0):  # at some of them the edge is rounded up
        assert len(windows_of(recording(eeg=noise(rate)), EEG)) == 3
    with pytest.raises(RecordError, match=r"sampled at 0\.7 Hz; a band up to 75 Hz needs 187\.5 Hz"):
        windows_of(recording(eeg=noise(0.7, 3000)), EEG)


@pytest.mark.parametrize(
    "wrong",
    [
        {"eeg_band": (5.0, 1.0)},
        {"eeg_band": (0.0, 75.0)},
        {"eeg_band": (0.3, float("inf"))},
        {"eeg_uv_per_bit": 0.0},
        {"eeg_channels": ("T3", "T7")},
        {"signals": ("ecg", "emg")},
        {"signals": ("eeg", "eeg")},
        {"leads": ("ECG", "EKG")},
    ],
)
def test_senseless_specifications_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        WindowSpec(**wrong)
