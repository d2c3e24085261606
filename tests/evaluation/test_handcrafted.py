"""Heart rate, band powers and signal quality indices."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from physio_dist.evaluation.handcrafted import (
    BANDS,
    HEART,
    INDICES,
    band_powers,
    heart_rate,
    paired_features,
    quality_indices,
    r_peaks,
    window_features,
)
from physio_dist.evaluation.label_table import load_label_table
from physio_dist.evaluation.logistic import fit_logistic
from physio_dist.evaluation.splits import folds_of
from physio_dist.signals.readers import reader
from physio_dist.stats.scores import score
from tests.evaluation.study_samples import facts_of, opened, publish_set, waves


def beats(intervals_ms: np.ndarray, rate: float = 200.0, length: int = 2000, height: float = 900.0) -> np.ndarray:
    """Narrow QRS-like deflections with a broad T wave behind each, over a little noise."""
    x = 5.0 * np.random.default_rng(0).standard_normal(length)
    times = np.arange(length) / rate
    for at in 0.3 + np.concatenate([[0], np.cumsum(intervals_ms)]) / 1000:
        x += height * np.exp(-(((times - at) / 0.012) ** 2))
        x += 0.3 * height * np.exp(-(((times - at - 0.3) / 0.06) ** 2))
    return x


def test_rate_and_variability_of_a_known_rhythm() -> None:
    intervals = np.array([800, 840, 800, 900, 820, 860, 800, 840, 810, 830.0])
    found = heart_rate(beats(intervals), 200.0)
    assert found[0] == pytest.approx(60_000 / intervals.mean(), rel=0.005)
    assert found[1] == pytest.approx(intervals.std(ddof=1), abs=4)
    assert found[2] == pytest.approx(np.sqrt((np.diff(intervals) ** 2).mean()), abs=5)
    assert found[3] == pytest.approx((np.abs(np.diff(intervals)) > 50).mean(), abs=0.12)


@pytest.mark.parametrize("rate", [100.0, 250.0, 500.0])
@pytest.mark.parametrize("height", [-150.0, 3000.0])
def test_polarity_amplitude_and_sampling_rate_do_not_matter(rate: float, height: float) -> None:
    intervals = np.full(12, 700.0)
    found = heart_rate(beats(intervals, rate, int(10 * rate), height), rate)
    assert found[0] == pytest.approx(60_000 / 700, rel=0.01) and found[1] < 10 and found[3] == 0


def test_a_missed_beat_does_not_slow_the_heart() -> None:
    intervals = np.full(11, 800.0)
    with_gap = np.r_[intervals[:4], 1600.0, intervals[:4]]
    found = heart_rate(beats(with_gap), 200.0)
    assert found[0] == pytest.approx(75, rel=0.01) and found[1] < 8


def test_too_few_beats_or_none_are_unknown() -> None:
    assert np.isnan(heart_rate(np.zeros(2000), 200.0)).all()
    three_beats = beats(np.full(2, 800.0), length=500)
    assert len(r_peaks(three_beats, 200.0)) == 3
    assert np.isnan(heart_rate(three_beats, 200.0)).all()
    assert len(r_peaks(np.zeros(2000), 200.0)) == 0


def test_peaks_of_simulated_hearts_are_those_of_their_beats() -> None:
    for person in range(8):
        made = reader("simulate").read("people=8,windows=3,seed=3", f"sim-{person:06d}")
        lead = made.signals["ecg"].data[1].astype(np.float64)
        if made.labels["ectopic_beats"] or made.labels["faults"]:
            continue
        rates = [heart_rate(lead[i : i + 2000], 200.0)[0] for i in range(0, 6000, 2000)]
        assert np.mean(rates) == pytest.approx(made.labels["heart_rate"], rel=0.03)


def test_band_power_is_where_the_wave_is() -> None:
    times = np.arange(2000) / 200.0
    eeg = np.stack([20 * np.sin(2 * np.pi * f * times) for f in (2, 6, 10, 20, 40)])
    found = band_powers(eeg + np.random.default_rng(0).standard_normal(eeg.shape), 200.0)
    assert found.argmax(axis=1).tolist() == [0, 1, 2, 3, 4]
    # A sine of amplitude 20 has a power of 200 uV^2, here spread over a band 5 Hz wide.
    assert found[2, 2] == pytest.approx(np.log(200 / 5), abs=0.3)
    assert np.isnan(band_powers(eeg, 80.0)[:, list(BANDS).index("gamma")]).all()
    assert np.isfinite(band_powers(np.zeros((1, 2000)), 200.0)).all()


def test_every_window_of_a_set_in_order_with_what_is_invalid_unknown(tmp_path: Path) -> None:
    facts = facts_of(people=2, recordings=2, windows=3)
    periods = 600.0 + 25.0 * np.arange(12)
    ecg = np.stack([np.stack([np.zeros(2000), beats(np.full(14, p))]) for p in periods]).astype(np.int16)
    eeg = np.random.default_rng(0).integers(-300, 300, (12, 2, 2000)).astype(np.int16)
    valid = {"ecg": np.ones((12, 2), bool), "eeg": np.ones((12, 2), bool)}
    valid["ecg"][4] = False
    valid["eeg"][7, 1] = False
    signals = {"ecg": (ecg, ("I", "II"), 1.0), "eeg": (eeg, ("C3", "C4"), 0.5)}
    publish_set(str(tmp_path), facts, signals, valid=valid)
    said: list[str] = []
    found = paired_features(opened(str(tmp_path)), said.append)
    assert found["ecg"].shape == (12, 4) and found["eeg"].shape == (12, 10) and len(said) == 1
    good = np.arange(12) != 4
    np.testing.assert_allclose(found["ecg"][good, 0], 60_000 / periods[good], rtol=0.02)
    assert np.isnan(found["ecg"][4]).all()
    assert np.isnan(found["eeg"][7, 5:]).all() and np.isfinite(np.delete(found["eeg"], 7, 0)).all()
    np.testing.assert_allclose(found["eeg"][3, :5], band_powers(eeg[3] * 0.5, 200.0)[0])


def test_paired_features_without_lead_ii_use_clearest_lead(tmp_path: Path) -> None:
    facts = facts_of(people=1, recordings=2, windows=1)
    noise = np.random.default_rng(0).normal(0, 400, (2, 3, 2000))
    ecg = noise.astype(np.int16)
    for window, (lead, period) in enumerate(((1, 750.0), (2, 900.0))):
        ecg[window, lead] = beats(np.full(14, period))
    eeg = np.random.default_rng(0).integers(-300, 300, (2, 1, 2000)).astype(np.int16)
    publish_set(str(tmp_path), facts, {"ecg": (ecg, ("V1", "V2", "V3"), 1.0), "eeg": (eeg, ("Cz",), 1.0)})
    found = paired_features(opened(str(tmp_path)), lambda _: None)["ecg"]
    np.testing.assert_allclose(found[:, 0], [80.0, 60_000 / 900], rtol=0.01)


def test_paired_features_use_valid_lead_ii_even_if_another_is_clearer(tmp_path: Path) -> None:
    facts = facts_of(people=1, recordings=2, windows=1)
    clear, noisy = beats(np.full(9, 1000.0)), beats(np.full(12, 750.0))
    noisy += np.random.default_rng(1).normal(0, 60, 2000)
    ecg = np.stack([np.stack([clear, noisy])] * 2).astype(np.int16)
    eeg = np.random.default_rng(0).integers(-300, 300, (2, 1, 2000)).astype(np.int16)
    valid = {"ecg": np.array([[True, True], [True, False]]), "eeg": np.ones((2, 1), bool)}
    publish_set(str(tmp_path), facts, {"ecg": (ecg, ("V1", "II"), 1.0), "eeg": (eeg, ("Cz",), 1.0)}, valid=valid)
    found = paired_features(opened(str(tmp_path)), lambda _: None)["ecg"]
    np.testing.assert_allclose(found[:, 0], [80.0, 60.0], rtol=0.01)


def index(name: str, lead: np.ndarray, rate: float = 200.0) -> float:
    return float(quality_indices(lead[None], rate)[0, INDICES.index(name)])


def test_quality_indices_of_sines_and_spikes_have_known_values() -> None:
    time = np.arange(2000) / 200
    for frequency, qrs, baseline, high in ((10.0, 1, 0, 0), (0.5, 0, 1, 0), (35.0, 0, 0, 1), (20.0, 0, 0, 0)):
        wave = 100 * np.sin(2 * np.pi * frequency * time)
        # Of a slow wave only what leaks into 5-40 Hz is shared out there.
        assert baseline or index("qrs_power", wave) == pytest.approx(qrs, abs=0.03)
        assert index("baseline_power", wave) == pytest.approx(baseline, abs=0.03)
        assert index("high_power", wave) == pytest.approx(high, abs=0.03)
    wave = 100 * np.sin(2 * np.pi * 5 * time)
    assert index("log_std", wave) == pytest.approx(np.log1p(100 / np.sqrt(2)), rel=1e-3)
    assert index("log_span", wave) == pytest.approx(np.log1p(200), rel=1e-3)
    assert index("log_largest", wave - 50) == pytest.approx(np.log1p(150), rel=1e-3)
    spikes = np.zeros(2000)
    spikes[::200] = 1000
    assert index("kurtosis", spikes) == 100.0 and index("skewness", spikes) > 5 > index("skewness", wave)
    assert index("kurtosis", wave) == pytest.approx(-1.5, abs=0.01)
    half = np.where(time < 5, 0.0, wave)
    assert index("flat", half) == pytest.approx(0.5, abs=0.01)
    assert index("flat", wave) == 0.0


def test_quality_indices_of_dead_lead_are_finite_and_leave_others_unchanged() -> None:
    noise = np.random.default_rng(0).normal(0, 50, (2, 2000))
    found = quality_indices(np.stack([noise[0], np.zeros(2000), noise[1]]), 200.0)
    assert np.isfinite(found).all()
    assert found[1, INDICES.index("flat")] == 1.0 and found[1, INDICES.index("log_span")] == 0.0
    np.testing.assert_array_equal(found[[0, 2]], quality_indices(noise, 200.0))


@pytest.mark.parametrize(("signal", "names"), [("ecg", ("I", "II")), ("eeg", ("C3", "C4"))])
def test_window_features_have_one_row_per_window_in_storage_order(
    tmp_path: Path, signal: str, names: tuple[str, ...]
) -> None:
    values = waves(7, 2, 2000)
    valid = np.ones((7, 2), dtype=bool)
    valid[3, 1] = valid[4] = False
    facts = [{"person": f"p{i}", "record": f"r{i}"} for i in range(7)]
    shards = publish_set(str(tmp_path), facts, {signal: (values, names, 0.5)}, valid={signal: valid})
    said: list[str] = []
    found = window_features(opened(shards.url), signal, said.append)
    per = len(INDICES) if signal == "ecg" else 5
    assert said and found.shape == (7, 2 * per + 2 + (len(HEART) if signal == "ecg" else 0))
    assert np.array_equal(found[:, 2 * per : 2 * per + 2], valid)
    assert np.isnan(found[3, per : 2 * per]).all() and np.isnan(found[4, : 2 * per]).all()
    assert np.isfinite(found[[0, 1, 2, 5, 6], : 2 * per]).all()
    if signal == "ecg":
        np.testing.assert_allclose(found[5, :per], quality_indices(values[5] * 0.5, 200.0)[0])


def test_fit_logistic_on_real_recordings_reaches_known_auc(
    data_dir: Path, tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """Heart rate and band powers of 36 people at rest and calculating: 0.77 pooled over folds of whole people."""
    done = cli("shard", "edf", data_dir / "eegmat", "--out", tmp_path / "set", "signals=ecg,eeg", "leads=ECG")
    assert done.returncode == 0, done.stderr
    table = load_label_table(opened(str(tmp_path / "set")), "eegmat", None)
    measured = {
        name: x[table.sample] for name, x in paired_features(opened(str(tmp_path / "set")), lambda _: None).items()
    }
    assert np.isnan(measured["ecg"]).any(axis=1).mean() < 0.02
    # Whoever calculates has a faster heart: 34 of the 36, says the data's description.
    rate, faster = measured["ecg"][:, 0], 0
    for person in np.unique(table.person):
        mine = table.person == person
        faster += np.nanmedian(rate[mine & (table.label == 1)]) > np.nanmedian(rate[mine & (table.label == 0)])
    assert faster >= 31
    folds = folds_of(table, "grouped_kfold", 6, 3, 0)
    rows = np.concatenate([fold.test for fold in folds])
    for features, low, high in (({"ecg": measured["ecg"]}, 0.66, 0.77), (measured, 0.74, 0.83)):
        parts = [fit_logistic(features, table.label, 2, fold).probability for fold in folds]
        found = score(table.label[rows], np.concatenate(parts))
        assert found["auc"] is not None and low < found["auc"] < high
