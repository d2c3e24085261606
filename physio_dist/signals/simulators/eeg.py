"""A model of the scalp's EEG: sources of rhythms and of background seen by 19 electrodes, with blinks and muscle.

Every source is Gaussian noise with a spectrum. It falls like 1/f for the background and has a peak for the rhythms, the
two parts into which Donoghue et al., Nat. Neurosci. 23 (2020) 1655-1665, take a spectrum: alpha at the back, theta at
the frontal midline, beta between front and centre. An electrode sees a source the less the further away it is on the
head, so neighbours see much the same. Arousal lowers alpha and raises beta. Sizes are those of the rested adults in
eegmat (`quality.EEG_LIMITS`), spread so that persons differ.

Axes are: x to the person's right, y to the nose, z to the vertex; the head is the unit sphere. Amplitudes are in
microvolts, powers in their squares, times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import fft

from physio_dist.runtime.arrays import Float32Array, Float64Array
from physio_dist.signals.montage import EEG_19

RATE = 200

ALPHA_EFFECT = -0.6
"""Change of the logarithm of the power of alpha with a unit of drive; it is suppressed in alert subjects."""
BETA_EFFECT = 0.5
"""The same for beta, which grows."""

_RING = 0.4 * np.pi  # 10-20: the outer electrodes are two fifths of half a circle from the vertex, the inner ones one


def _on_head(inclination: float, right_of_nose: float) -> Float64Array:
    """A point of the unit sphere by its angle from the vertex, in radians, and to the right of the nose, in degrees."""
    turn = np.deg2rad(right_of_nose)
    flat = np.sin(inclination)
    return np.array([flat * np.sin(turn), flat * np.cos(turn), np.cos(inclination)])


def _positions() -> Float64Array:
    """The electrodes of `EEG_19` on the unit sphere, ``[19, 3]``, by the 10-20 system's own rules."""
    ring = {"Fp2": 18, "F8": 54, "T8": 90, "P8": 126, "O2": 162, "O1": 198, "P7": 234, "T7": 270, "F7": 306, "Fp1": 342}
    inner = {"Fz": 0, "C4": 90, "Pz": 180, "C3": 270}
    at = {name: _on_head(_RING, angle) for name, angle in ring.items()}
    at |= {name: _on_head(_RING / 2, angle) for name, angle in inner.items()}
    at["Cz"] = _on_head(0.0, 0.0)
    for between, (a, b) in {"F3": ("Fz", "F7"), "F4": ("Fz", "F8"), "P3": ("Pz", "P7"), "P4": ("Pz", "P8")}.items():
        middle = at[a] + at[b]
        at[between] = middle / np.linalg.norm(middle)
    return np.stack([at[name] for name in EEG_19])


POSITIONS = _positions()

# Sources lie under electrodes: one of background under each, and those of the rhythms.
_ALPHA, _BETA, _THETA = ("O1", "O2", "Pz"), ("F3", "F4", "C3", "C4"), ("Fz",)
_SOURCES = POSITIONS[[EEG_19.index(name) for name in (*EEG_19, *_ALPHA, *_BETA, *_THETA)]]
_KINDS = np.repeat(np.arange(4), [len(EEG_19), len(_ALPHA), len(_BETA), len(_THETA)])
_EYES = np.stack([_on_head(0.56 * np.pi, angle) for angle in (-20.0, 20.0)])
_SMEAR = 0.6
"""Angle over which skull and scalp smear a source, as the standard deviation of a Gaussian, in radians."""
_CORNER_HZ = 0.8  # below it the background's spectrum is flat


@dataclass(frozen=True)
class Brain:
    """One person's brain, skull and electrodes.

    Attributes:
        topography: what a unit of each source is at each electrode, ``[19, source]``.
        slope: exponent of the background's power over frequency.
        alpha, beta: frequencies of the peaks, in Hz.
        blinks: blinks a second.
        blink: a blink's size at each electrode, ``[19]``.
        bursts: bursts of muscle activity a second.
        noise: standard deviation of each electrode's own noise, ``[19]``.
        mains, hum: frequency of mains, and amplitudes of its sine and cosine at each electrode, ``[19, 2]``.
    """

    topography: Float32Array
    slope: float
    alpha: float
    beta: float
    blinks: float
    blink: Float32Array
    bursts: float
    noise: Float32Array
    mains: float
    hum: Float32Array


def draw_brain(mains: float, rng: np.random.Generator) -> Brain:
    """A person's brain: size, place and frequency of every rhythm, where ``mains`` has so many Hz."""
    count = len(EEG_19)
    # No two brains are folded alike: sources lie a little off.
    topography = _seen_from(_SOURCES + rng.normal(0.0, 0.12, _SOURCES.shape), _SMEAR)
    for kind in range(4):
        mine = kind == _KINDS
        topography[:, mine] /= np.sqrt((topography[:, mine] ** 2).sum(axis=1).max())
    # Root mean squares of background, alpha, beta and theta where they are largest.
    sizes = np.array([10.0, 8.0, 3.0, 3.5]) * np.exp(rng.normal(0.0, [0.15, 0.25, 0.15, 0.25]))
    topography *= sizes[_KINDS] * np.exp(rng.normal(0.0, 0.1, len(_KINDS)))
    topography *= np.exp(rng.normal(0.0, 0.1)) * np.exp(rng.normal(0.0, 0.06, (count, 1)))
    blink = _seen_from(_EYES, 0.5).sum(axis=1)
    return Brain(
        topography=topography.astype(np.float32),
        slope=rng.normal(1.4, 0.12),
        alpha=rng.uniform(8.5, 11.5),
        beta=rng.uniform(17.0, 23.0),
        blinks=rng.uniform(0.05, 0.4),
        blink=(rng.uniform(60.0, 160.0) * blink / blink.max()).astype(np.float32),
        bursts=rng.uniform(0.0, 0.03),
        noise=rng.uniform(0.4, 1.2, count).astype(np.float32),
        mains=mains,
        hum=(rng.normal(0.0, 1.0, (count, 2)) * np.exp(rng.normal(-0.5, 0.6))).astype(np.float32),
    )


def scalp(brain: Brain, drive: float, samples: int, rng: np.random.Generator) -> Float32Array:
    """The EEG of `EEG_19` under a drive, ``[19, samples]`` in microvolts at `RATE` against a distant reference."""
    amplitudes = _amplitudes(brain, drive, samples)
    # Gaussian noise is shaped, and sources are mixed, before they become signals: there are fewer electrodes.
    shaped = rng.standard_normal((len(_KINDS), amplitudes.shape[1], 2), np.float32)
    shaped *= amplitudes[_KINDS][:, :, None]
    mixed = (brain.topography @ shaped.reshape(len(_KINDS), -1)).view(np.complex64)
    eeg: Float32Array = fft.irfft(mixed, samples, axis=1, overwrite_x=True)
    sensors = rng.standard_normal(eeg.shape, np.float32)
    sensors *= brain.noise[:, None]
    eeg += sensors
    turns = np.modf(brain.mains * np.arange(samples) / RATE + rng.random())[0].astype(np.float32)
    eeg += brain.hum @ np.stack([np.sin(2 * np.pi * turns), np.cos(2 * np.pi * turns)]).astype(np.float32)
    _blink(eeg, brain, rng)
    _tense(eeg, brain, rng)
    return eeg


def _amplitudes(brain: Brain, drive: float, samples: int) -> Float32Array:
    """Amplitude of each kind of source by frequency, ``[kind, frequency]``; without drive each has variance one."""
    frequencies, inverse = _frequencies(samples)
    power = np.zeros((4, len(frequencies)))
    power[0] = inverse**brain.slope
    for kind, (peak, width) in enumerate(((brain.alpha, 0.9), (brain.beta, 3.5), (6.0, 0.8)), 1):
        power[kind] = np.exp(-0.5 * ((frequencies - peak) / width) ** 2)
    power[:, frequencies < 0.1] = 0.0
    # What a frequency gives to the inverse transform's variance is its power times 4 / samples^2.
    power *= (samples / 2) ** 2 / power.sum(axis=1, keepdims=True)
    power[1] *= np.exp(ALPHA_EFFECT * drive)
    power[2] *= np.exp(BETA_EFFECT * drive)
    found: Float32Array = np.sqrt(power).astype(np.float32)
    return found


@lru_cache(maxsize=4)
def _frequencies(samples: int) -> tuple[Float64Array, Float64Array]:
    frequencies = fft.rfftfreq(samples, 1 / RATE)
    return frequencies, 1.0 / np.maximum(frequencies, _CORNER_HZ)


def _blink(eeg: Float32Array, brain: Brain, rng: np.random.Generator) -> None:
    """Adds blinks, in place: a third of a second, and at the forehead larger than anything that the brain does."""
    for _ in range(rng.poisson(brain.blinks * eeg.shape[1] / RATE)):
        shape = np.hanning(int(rng.uniform(0.25, 0.45) * RATE)).astype(np.float32) * np.float32(rng.uniform(0.7, 1.3))
        start = int(rng.integers(eeg.shape[1] - len(shape)))
        eeg[:, start : start + len(shape)] += brain.blink[:, None] * shape


def _tense(eeg: Float32Array, brain: Brain, rng: np.random.Generator) -> None:
    """Adds bursts of muscle activity, in place: fast noise at the rim of the scalp, where the muscles are."""
    for _ in range(rng.poisson(brain.bursts * eeg.shape[1] / RATE)):
        length = int(rng.uniform(0.3, 2.0) * RATE)
        start = int(rng.integers(eeg.shape[1] - length))
        place = _seen_from(_on_head(0.45 * np.pi, rng.uniform(0.0, 360.0))[None], 0.35).astype(np.float32)
        # The difference of white noise has little power where the brain's rhythms are.
        burst = np.diff(rng.standard_normal(length + 1, np.float32)) * np.hanning(length).astype(np.float32)
        eeg[:, start : start + length] += np.float32(rng.uniform(4.0, 15.0)) * place * burst


def _seen_from(sources: Float64Array, smear: float) -> Float64Array:
    """Gain of sources ``[source, 3]`` at the electrodes, by the angle between them: ``[19, source]``, at most 1."""
    there = sources / np.linalg.norm(sources, axis=1, keepdims=True)
    angle = np.arccos(np.clip(POSITIONS @ there.T, -1.0, 1.0))
    seen: Float64Array = np.exp(-0.5 * (angle / smear) ** 2)
    return seen
