"""Signal-quality indices on signals whose values are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from physio_dist.evaluation.handcrafted import HEART
from physio_dist.evaluation.quality_indices import INDICES, quality_indices, quality_measures
from tests.evaluation.study_samples import publish_set, waves


def index(name: str, lead: np.ndarray, rate: float = 200.0) -> float:
    return float(quality_indices(lead[None], rate)[0, INDICES.index(name)])


def test_indices_are_what_their_names_say() -> None:
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


def test_a_dead_lead_has_finite_indices_and_others_are_not_touched() -> None:
    noise = np.random.default_rng(0).normal(0, 50, (2, 2000))
    found = quality_indices(np.stack([noise[0], np.zeros(2000), noise[1]]), 200.0)
    assert np.isfinite(found).all()
    assert found[1, INDICES.index("flat")] == 1.0 and found[1, INDICES.index("log_span")] == 0.0
    np.testing.assert_array_equal(found[[0, 2]], quality_indices(noise, 200.0))


@pytest.mark.parametrize(("signal", "names"), [("ecg", ("I", "II")), ("eeg", ("C3", "C4"))])
def test_each_window_has_a_row_in_storage_order_with_its_validity(
    tmp_path: Path, signal: str, names: tuple[str, ...]
) -> None:
    values = waves(7, 2, 2000)
    valid = np.ones((7, 2), dtype=bool)
    valid[3, 1] = valid[4] = False
    facts = [{"person": f"p{i}", "record": f"r{i}"} for i in range(7)]
    shards = publish_set(str(tmp_path), facts, {signal: (values, names, 0.5)}, valid={signal: valid})
    said: list[str] = []
    found = quality_measures(shards, signal, said.append)
    per = len(INDICES) if signal == "ecg" else 5
    assert said and found.shape == (7, 2 * per + 2 + (len(HEART) if signal == "ecg" else 0))
    assert np.array_equal(found[:, 2 * per : 2 * per + 2], valid)
    assert np.isnan(found[3, per : 2 * per]).all() and np.isnan(found[4, : 2 * per]).all()
    assert np.isfinite(found[[0, 1, 2, 5, 6], : 2 * per]).all()
    if signal == "ecg":
        np.testing.assert_allclose(found[5, :per], quality_indices(values[5] * 0.5, 200.0)[0])
