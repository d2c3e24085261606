"""The EEG model: where on the head things are, at which frequencies, and what drive does to them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.signal import welch

from physio_dist.signals.montage import EEG_19
from physio_dist.signals.simulators import eeg as simulator

MINUTES = 60 * simulator.RATE
ROW = {name: i for i, name in enumerate(EEG_19)}


def quiet(seed: int) -> simulator.Brain:
    """A brain without anything around it."""
    one = simulator.draw_brain(50.0, np.random.default_rng(seed))
    nothing = np.zeros(19, np.float32)
    return replace(one, blinks=0.0, bursts=0.0, noise=nothing, hum=np.zeros((19, 2), np.float32))


def scalp(one: simulator.Brain, drive: float = 0.0, minutes: int = 3, seed: int = 1) -> NDArray[np.float32]:
    return simulator.scalp(one, drive, minutes * MINUTES, np.random.default_rng(seed))


def power(eeg: NDArray[np.float32], low: float, high: float) -> NDArray[np.float64]:
    """Power of each channel in a band."""
    frequency, density = welch(eeg.astype(float), simulator.RATE, nperseg=800)
    inside = (frequency >= low) & (frequency < high)
    found: NDArray[np.float64] = density[:, inside].mean(axis=1)
    return found


def test_electrodes_are_where_the_10_20_system_puts_them() -> None:
    at = dict(zip(EEG_19, simulator.POSITIONS, strict=True))
    np.testing.assert_allclose(np.linalg.norm(simulator.POSITIONS, axis=1), 1.0)
    np.testing.assert_allclose(at["Cz"], [0, 0, 1], atol=1e-12)
    for left, right in (
        ("Fp1", "Fp2"),
        ("F7", "F8"),
        ("F3", "F4"),
        ("T7", "T8"),
        ("C3", "C4"),
        ("P7", "P8"),
        ("P3", "P4"),
        ("O1", "O2"),
    ):
        assert at[left][0] < 0 < at[right][0]
        np.testing.assert_allclose(at[left] * [-1, 1, 1], at[right], atol=1e-12)
    for front, back in (("Fp1", "O1"), ("F7", "P7"), ("F3", "P3"), ("Fz", "Pz")):
        assert at[back][1] < 0 < at[front][1]
        np.testing.assert_allclose(at[back] * [1, -1, 1], at[front], atol=1e-12)
    step = np.degrees(np.arccos([at["Cz"] @ at[name] for name in ("Fz", "C3", "Pz", "C4", "T7", "T8")]))
    np.testing.assert_allclose(step, [36, 36, 36, 36, 72, 72])
    assert at["F3"] @ at["Fz"] == pytest.approx(at["F3"] @ at["F7"])


def test_rhythms_have_their_places_and_frequencies() -> None:
    for seed in range(6):
        one = quiet(seed)
        eeg = scalp(one)
        alpha = power(eeg, one.alpha - 1, one.alpha + 1) / power(eeg, 3, 4.5)
        assert {EEG_19[i] for i in np.argsort(alpha)[-3:]} <= {"O1", "O2", "Pz", "P3", "P4", "P7", "P8"}
        assert alpha[ROW["O1"]] > 3 * alpha[ROW["Fp1"]]
        beta = power(eeg, one.beta - 3, one.beta + 3) / power(eeg, 35, 45)
        assert beta[[ROW[name] for name in ("F3", "F4", "C3", "C4")]].min() > beta[[ROW["O1"], ROW["O2"]]].max()
        theta = power(eeg, 5.25, 6.75) / power(eeg, 2.5, 3.5)
        assert EEG_19[int(np.argmax(theta))] in ("Fz", "F3", "F4", "Cz")
        frequency, density = welch(eeg[[ROW["O1"], ROW["O2"]]].astype(float), simulator.RATE, nperseg=800)
        near = (frequency > 7) & (frequency < 13)
        assert frequency[near][density.mean(axis=0)[near].argmax()] == pytest.approx(one.alpha, abs=0.8)
        # Above all rhythms only the background is left.
        high, higher = power(eeg, 40, 44).mean(), power(eeg, 80, 84).mean()
        assert np.log(high / higher) / np.log(82 / 42) == pytest.approx(one.slope, abs=0.1)


def test_neighbours_see_much_the_same_and_the_other_side_does_not() -> None:
    seen = np.mean([np.corrcoef(scalp(quiet(seed), minutes=1)) for seed in range(5)], axis=0)
    assert seen[ROW["Fp1"], ROW["Fp2"]] > 0.7
    assert seen[ROW["C3"], ROW["P3"]] > 0.6
    assert seen[ROW["Fp1"], ROW["O2"]] < 0.3
    assert seen[ROW["T7"], ROW["T8"]] < 0.3


def test_drive_scales_the_power_of_alpha_and_beta_and_nothing_else() -> None:
    one = quiet(1)
    calm, tense = (scalp(one, drive).astype(float) for drive in (0.0, 1.5))
    changed = {
        (low, high): np.log(power(tense, low, high) / power(calm, low, high))
        for low, high in ((1, 4), (4, 7), (one.alpha - 1, one.alpha + 1), (one.beta - 3, one.beta + 3), (40, 90))
    }
    delta, theta, alpha, beta, gamma = changed.values()
    for still in (delta, theta, gamma):
        np.testing.assert_allclose(still, 0.0, atol=0.1)
    # What is left of the background there keeps the change from its full size.
    assert 1.5 * simulator.ALPHA_EFFECT < alpha[ROW["O1"]] < 0.85 * 1.5 * simulator.ALPHA_EFFECT
    assert 0.6 * 1.5 * simulator.BETA_EFFECT < beta[ROW["C3"]] < 1.5 * simulator.BETA_EFFECT


@pytest.mark.parametrize("samples", [2000, 14_000, 2000 * 13])
def test_amplitudes_do_not_depend_on_length(samples: int) -> None:
    one = quiet(2)
    signals = [simulator.scalp(one, 0.0, samples, np.random.default_rng(seed)).astype(float) for seed in range(40)]
    assert max(np.abs(eeg.mean(axis=1)).max() for eeg in signals) < 1e-3
    found = [eeg.std(axis=1) for eeg in signals]
    # The sources are independent, so their variances add up.
    expected = np.sqrt((one.topography.astype(float) ** 2).sum(axis=1))
    np.testing.assert_allclose(np.sqrt(np.square(found).mean(axis=0)), expected, rtol=0.12)


def test_blinks_are_large_at_the_forehead() -> None:
    one = replace(quiet(3), blinks=0.3)
    blinks = scalp(one, minutes=2).astype(float) - scalp(quiet(3), minutes=2)
    top = blinks[ROW["Fp1"]]
    starts = np.count_nonzero((top[1:] > 1.0) & (top[:-1] <= 1.0))
    assert 20 <= starts <= 50
    assert 60 * 0.7 < top.max() < 2.6 * 160
    assert top.min() > -0.01
    height = blinks.max(axis=1)
    assert height[ROW["Fp1"]] > 2 * height[ROW["F3"]] > 4 * height[ROW["P3"]]


def test_muscle_is_fast_and_at_the_rim() -> None:
    strong = dict.fromkeys(EEG_19, 0.0)
    for seed in range(4):
        bursts = scalp(replace(quiet(seed), bursts=1.0), minutes=1, seed=seed).astype(float) - scalp(
            quiet(seed), minutes=1, seed=seed
        )
        for name, value in zip(EEG_19, power(bursts.astype(np.float32), 20, 95), strict=True):
            strong[name] += float(value)
        assert power(bursts.astype(np.float32), 60, 95).sum() > 5 * power(bursts.astype(np.float32), 1, 13).sum()
    assert max(strong[name] for name in ("Cz", "Fz", "Pz")) < 0.2 * min(
        strong[name] for name in ("T7", "T8", "O1", "Fp2")
    )


@pytest.mark.parametrize("mains", [50.0, 60.0])
def test_mains_and_sensors_are_small(mains: float) -> None:
    one = simulator.draw_brain(mains, np.random.default_rng(5))
    silent = replace(one, topography=np.zeros_like(one.topography), blinks=0.0, bursts=0.0)
    eeg = scalp(silent, minutes=1)
    frequency, density = welch(eeg.astype(float), simulator.RATE, nperseg=800)
    assert (frequency[density.argmax(axis=1)] == mains).sum() > 15
    hum = np.hypot(*one.hum.T)
    np.testing.assert_allclose(eeg.std(axis=1), np.sqrt(hum**2 / 2 + one.noise**2), rtol=0.05)
    assert eeg.std() < 4
