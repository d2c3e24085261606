"""Simulated EEG and ECG of one moment: what the hidden state does to each, and how much can be told from them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from scipy.signal import butter, find_peaks, sosfiltfilt, welch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from physio_dist.runtime.arrays import Float64Array, IntpArray
from physio_dist.signals.montage import EEG_19
from physio_dist.signals.readers import reader
from physio_dist.signals.readers.simulate import SEPARATION, best_auc
from physio_dist.signals.recording import LazySignals, Recording, Signal
from physio_dist.signals.windows import Window, WindowSpec, waveform_hash, windows_of

pytestmark = pytest.mark.integration

BOTH = WindowSpec(signals=("ecg", "eeg"))
STUDY = "people=120,trials=4,windows=1,seed=2"


def read_all(source: str) -> list[Recording]:
    simulate = reader("simulate")
    return [simulate.read(source, record) for record in simulate.records(source)]


def rows(*names: str) -> list[int]:
    return [EEG_19.index(name) for name in names]


def beats_of(lead: Float64Array) -> IntpArray:
    """The samples at which lead II is steepest."""
    slope = np.convolve(np.diff(lead) ** 2, np.ones(12) / 12, "same")
    found: IntpArray = find_peaks(slope, height=0.25 * np.percentile(slope, 98), distance=60)[0]
    return found


def correlation(a: Float64Array, b: Float64Array) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def heart_features(window: Window) -> list[float]:
    """Rate in beats a minute, and the logarithms of SDNN and RMSSD, of lead II."""
    intervals = np.diff(beats_of(window.data["ecg"][1].astype(float))) / 200
    floor = 0.003  # beats are found to a sample
    return [
        60 / intervals.mean(), np.log(intervals.std() + floor),
        np.log(np.sqrt(np.mean(np.diff(intervals) ** 2)) + floor),
    ]  # fmt: skip


def band_powers(eeg: Float64Array) -> Float64Array:
    """Logarithms of the power of delta, theta, alpha, beta and low gamma, ``[5, channel]``."""
    frequency, power = welch(eeg, 200, nperseg=400)
    edges = (1, 4, 8, 13, 30, 45)
    bands = [power[:, (frequency >= a) & (frequency < b)].mean(axis=1) for a, b in pairwise(edges)]
    return np.log(bands)


@dataclass
class Study:
    """What can be measured in many people, and the truth."""

    windows: list[Window]
    heart: Float64Array
    bands: Float64Array
    arousal: Float64Array
    ecg: Float64Array
    eeg: Float64Array
    person: IntpArray


@pytest.fixture(scope="module")
def study() -> Study:
    people = read_all(STUDY)
    windows = [windows_of(one, BOTH)[0] for one in people]
    kept = [i for i, one in enumerate(people) if not one.labels["faults"]]
    labels = {
        name: np.array([people[i].labels[name] for i in kept], float) for name in ("arousal", "drive_ecg", "drive_eeg")
    }
    return Study(
        windows, np.array([heart_features(windows[i]) for i in kept]),
        np.array([band_powers(windows[i].data["eeg"] * 0.1) for i in kept]),
        labels["arousal"], labels["drive_ecg"], labels["drive_eeg"], np.array(kept) // 4,
    )  # fmt: skip


def test_persons_have_as_many_records_as_trials() -> None:
    simulate = reader("simulate")
    assert simulate.records("people=2,trials=2") == [f"sim-{p:06d}-{t:02d}" for p in range(2) for t in range(2)]
    many = simulate.records("people=2,trials=101")
    assert many == sorted(many)
    assert len(set(many)) == 202
    for record in many[99:103]:
        one = simulate.read("people=2,trials=101,windows=1", record)
        assert (one.record, (one.person or "")[-10:]) == (record, record[:10])
        assert one.signals["ecg"].data.shape == (12, 2000)
        assert one.signals["eeg"].channels == EEG_19
        assert one.signals["eeg"].data.shape == (19, 2000)
        assert one.signals["eeg"].data.dtype == np.float32
        assert one.signals["eeg"].rate == one.signals["ecg"].rate == 200.0


def test_a_record_does_not_depend_on_what_else_is_read_or_how_many_people_there_are() -> None:
    simulate = reader("simulate")
    first = {one.record: one for one in read_all("people=4,trials=3,windows=1,seed=9")}
    assert len({waveform_hash(one) for one in first.values()}) == 12
    assert len({one.signals["eeg"].data.tobytes() for one in first.values()}) == 12
    for record in sorted(first, reverse=True):
        again = simulate.read("trials=3,seed=9,people=5,windows=1", record)
        # The EEG first, this time.
        assert again.signals["eeg"].data.tobytes() == first[record].signals["eeg"].data.tobytes()
        assert again.signals["ecg"].data.tobytes() == first[record].signals["ecg"].data.tobytes()
        assert again.labels == first[record].labels
    other = simulate.read("people=4,trials=3,windows=1,seed=10", "sim-000000-00")
    assert other.signals["eeg"].data.tobytes() != first["sim-000000-00"].signals["eeg"].data.tobytes()
    assert other.labels["drive_eeg"] != first["sim-000000-00"].labels["drive_eeg"]


def test_states_are_balanced_within_persons_and_shuffled() -> None:
    for trials, counts in ((4, {2}), (6, {3}), (3, {1, 2}), (1, {0, 1})):
        people = read_all(f"people=40,trials={trials},windows=1,seed=4")
        assert all(type(one.labels["arousal"]) is int for one in people)
        states = np.array([one.labels["arousal"] for one in people]).reshape(40, trials)
        assert set(states.sum(axis=1).tolist()) == counts
        assert 10 <= states[:, 0].sum() <= 30
        # Neither are they the same in everybody, nor one after the other.
        assert len({tuple(row) for row in states.tolist()}) >= {4: 5, 6: 12, 3: 5, 1: 2}[trials]


def test_drives_are_normal_about_the_state_and_independent_given_it() -> None:
    people = read_all("people=750,trials=4,windows=1,seed=6")
    state = np.array([one.labels["arousal"] for one in people])
    drives = np.array([[one.labels["drive_ecg"], one.labels["drive_eeg"]] for one in people])
    np.testing.assert_array_equal(drives, np.round(drives, 4))
    rest = drives - SEPARATION * (state[:, None] - 0.5)
    np.testing.assert_allclose(rest.mean(axis=0), 0.0, atol=0.06)
    np.testing.assert_allclose(rest.std(axis=0), 1.0, atol=0.05)
    assert abs(np.corrcoef(rest.T)[0, 1]) < 0.06
    # Nor does one trial tell of the next, or of the person.
    assert abs(np.corrcoef(rest[:-1, 0], rest[1:, 0])[0, 1]) < 0.06
    for column in (drives[:, 0], drives[:, 1]):
        assert roc_auc_score(state, column) == pytest.approx(best_auc(1), abs=0.02)
    assert roc_auc_score(state, drives.sum(axis=1)) == pytest.approx(best_auc(2), abs=0.015)


def test_the_bounds_are_those_of_normal_values() -> None:
    from scipy.stats import norm

    assert best_auc(1) == pytest.approx(norm.cdf(SEPARATION / np.sqrt(2)))
    assert best_auc(2) == pytest.approx(norm.cdf(SEPARATION))
    assert 0.82 < best_auc(1) < 0.87
    assert 0.9 < best_auc(2) < 0.94


def test_eeg_is_made_when_it_is_asked_for_and_once() -> None:
    asked = []

    def make() -> Signal:
        asked.append(1)
        return Signal(np.zeros((1, 2), np.float32), 200.0, ("Cz",))

    signals = LazySignals({"ecg": make, "eeg": make})
    assert "eeg" in signals
    assert "emg" not in signals
    assert (list(signals), len(signals), asked) == (["ecg", "eeg"], 2, [])
    assert signals["eeg"] is signals["eeg"]
    assert asked == [1]
    with pytest.raises(KeyError):
        signals["emg"]


def test_a_persons_body_is_the_same_in_all_records() -> None:
    people = read_all("people=12,trials=4,windows=2,seed=8")
    heights = np.array([np.abs(one.signals["ecg"].data).max(axis=1) for one in people if not one.labels["faults"]])
    who = np.array([int(one.person[-6:]) for one in people if one.person and not one.labels["faults"]])
    shapes = np.array(
        [np.log(one.signals["eeg"].data[rows("P3", "P4", "O1", "O2", "Pz")].std(axis=1)) for one in people]
    )
    shapes -= shapes.mean(axis=1, keepdims=True)
    for values, group in ((np.log(heights), who), (shapes, np.arange(48) // 4)):
        within = np.mean([values[group == k].var(axis=0, ddof=1) for k in np.unique(group) if (group == k).sum() > 1])
        between = values.var(axis=0, ddof=1).mean()
        assert within < 0.5 * between
    peaks = []
    for one in people:
        frequency, power = welch(one.signals["eeg"].data[rows("O1", "O2")], 200, nperseg=800)
        near = (frequency >= 7.5) & (frequency <= 12.5)
        weight = power.mean(axis=0)[near] ** 2
        peaks.append(float((weight * frequency[near]).sum() / weight.sum()))
    table = np.array(peaks).reshape(12, 4)
    assert 8.0 < table.min() < 9.3 < 10.7 < table.max() < 12.0
    # Where drive leaves little of alpha its peak is hard to see, hence the median.
    assert np.median(table.std(axis=1)) < 0.4 < np.median(table, axis=1).std()


def test_mains_are_the_same_in_both_modalities() -> None:
    agreed = []
    for one in read_all("people=20,windows=3,seed=1"):
        found = []
        for signal in one.signals.values():
            frequency, power = welch(signal.data.astype(float), 200, nperseg=1000)
            height = {}
            for hum in (50.0, 60.0):
                beside = (np.abs(frequency - hum) > 0.5) & (np.abs(frequency - hum) < 3.0)
                line = np.isclose(frequency, hum)
                height[hum] = float(np.median(power[:, line].max(axis=1) / np.median(power[:, beside], axis=1)))
            found += [hum for hum in height if height[hum] > 5.0]
        # Some live where it is too faint to be seen.
        assert len(set(found)) <= 1
        agreed += found[:1] if len(found) == 2 else []
    assert len(agreed) > 8
    assert set(agreed) == {50.0, 60.0}


def test_beats_and_noise_and_faults_are_drawn_for_each_record() -> None:
    people = read_all("people=40,trials=2,windows=2,seed=3")
    first, second = people[::2], people[1::2]
    assert {bool(a.labels["faults"]) for a, b in zip(first, second, strict=True) if not b.labels["faults"]} == {
        True,
        False,
    }
    whole = [i for i in range(40) if not first[i].labels["faults"] and not second[i].labels["faults"]]
    fast = butter(4, 75.0, "highpass", fs=200, output="sos")  # above mains and all that the heart does
    alike: dict[str, list[float]] = {"noise": [], "scalp": [], "phase": []}
    for i in whole:
        chest = [sosfiltfilt(fast, one.signals["ecg"].data[6:].astype(float), axis=1) for one in (first[i], second[i])]
        alike["noise"] += [correlation(a, b) for a, b in zip(*chest, strict=True)]
        heads = [one.signals["eeg"].data.astype(float) for one in (first[i], second[i])]
        alike["scalp"] += [correlation(a, b) for a, b in zip(*heads, strict=True)]
        # Where in a heart cycle the record starts.
        times = [beats_of(one.signals["ecg"].data[1].astype(float)) for one in (first[i], second[i])]
        a, b = (found[0] / np.diff(found)[:5].mean() for found in times)
        alike["phase"].append(float(np.cos(2 * np.pi * (a - b))))
    assert len(whole) > 25
    for name, most in (("noise", 0.2), ("scalp", 0.2), ("phase", 0.4)):
        assert abs(np.mean(alike[name])) < most, name


def test_eeg_passes_the_quality_check(study: Study) -> None:
    assert np.mean([window.valid["eeg"].all() for window in study.windows]) > 0.995
    data = np.stack([window.data["eeg"] for window in study.windows]) * 0.1
    spans = np.ptp(data, axis=2)
    # Real windows: between 23 and 783 uV (`quality.EEG_LIMITS`), median amplitude 36.
    assert 15 < spans.min() < 45 < np.median(spans) < 110 < spans.max() < 800
    assert 20 < np.median(np.abs(data).max(axis=2)) < 60


def within(values: Float64Array, person: IntpArray) -> Float64Array:
    """Values minus their person's mean."""
    sums = np.bincount(person, values)
    return values - (sums / np.maximum(np.bincount(person), 1))[person]


def test_each_drive_moves_its_own_modality_across_and_within_persons(study: Study) -> None:
    rate, spread = study.heart[:, 0], study.heart[:, 1]
    alpha = study.bands[:, 2, rows("O1", "O2", "Pz", "P3", "P4")].mean(axis=1)
    beta = study.bands[:, 3, rows("F3", "F4", "C3", "C4")].mean(axis=1)
    for values, drive, across, inside in (
        (rate, study.ecg, 0.65, 0.85), (spread, study.ecg, -0.45, -0.5), (alpha, study.eeg, -0.6, -0.75),
        (beta, study.eeg, 0.55, 0.75),
    ):  # fmt: skip
        sign = np.sign(across)
        assert sign * correlation(values, drive) > abs(across)
        assert sign * correlation(within(values, study.person), within(drive, study.person)) > abs(inside)
        # Persons differ, so that the drive is seen better within than across them.
        assert abs(correlation(values, drive)) < 0.95
    beats = np.polyfit(within(study.ecg, study.person), within(rate, study.person), 1)[0]
    assert 10 < beats < 14


def test_given_the_state_neither_modality_knows_of_the_others_drive(study: Study) -> None:
    def given_state(values: Float64Array) -> Float64Array:
        return values - np.where(study.arousal > 0, values[study.arousal > 0].mean(), values[study.arousal == 0].mean())

    chance = 3.5 / np.sqrt(len(study.ecg))
    for i in range(3):
        assert abs(correlation(given_state(study.heart[:, i]), given_state(study.eeg))) < chance
    for band in range(5):
        powers = study.bands[:, band].mean(axis=1)
        assert abs(correlation(given_state(powers), given_state(study.ecg))) < chance
        assert abs(correlation(given_state(powers), given_state(study.heart[:, 0]))) < chance


def test_both_modalities_tell_more_of_unseen_people_than_either(study: Study) -> None:
    def auc(features: Float64Array) -> float:
        model = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=1000))
        told = cross_val_predict(
            model, features, study.arousal, groups=study.person, cv=GroupKFold(6), method="predict_proba"
        )
        return float(roc_auc_score(study.arousal, told[:, 1]))

    bands = study.bands.reshape(len(study.bands), -1)
    heart, head, fused = auc(study.heart), auc(bands), auc(np.concatenate([study.heart, bands], axis=1))
    assert 0.72 < heart < best_auc(1)
    assert 0.72 < head < best_auc(1)
    assert max(heart, head) + 0.03 < fused < best_auc(2)


def test_another_seed_makes_other_people() -> None:
    whose = [reader("simulate").read(f"people=1,windows=1,seed={seed}", "sim-000000").person for seed in range(3)]
    assert len(set(whose)) == 3
