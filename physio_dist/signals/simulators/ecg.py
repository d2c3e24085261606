"""A model of the heart's electrical activity: a dipole that turns with every beat, seen by nine electrodes.

In the spirit of McSharry et al., IEEE Trans. Biomed. Eng. 50 (2003) 289-294, every wave of the ECG is a Gaussian in
the time relative to the beat, and the heart rate varies with breathing and more slowly; as in Sameni et al., EURASIP
J. Adv. Signal Process. (2007) 43407, the Gaussians drive a dipole in space rather than one lead, so that all leads
belong together. The sizes of waves are the textbook's for adults at rest, spread so that persons differ.

Axes are Frank's: x to the person's left, y to the feet, z to the back. Amplitudes are in microvolts, times in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from physio_dist.runtime.arrays import BoolArray, Float32Array, Float64Array, IntpArray

ELECTRODES = ("RA", "LA", "LL", "V1", "V2", "V3", "V4", "V5", "V6")

# Dower's transform from Frank's axes to leads (Dower, Machado, Osborne, Clin. Cardiol. 3 (1980) 87-95).
_LEAD_I = np.array([0.632, -0.235, 0.059])
_LEAD_II = np.array([0.235, 1.066, -0.132])
_CHEST = np.array(
    [
        [-0.515, 0.157, -0.917],
        [0.044, 0.164, -1.387],
        [0.882, 0.098, -1.277],
        [1.213, 0.127, -0.601],
        [1.125, 0.127, -0.086],
        [0.831, 0.076, 0.230],
    ]
)
# I = LA - RA and II = LL - RA leave one potential free; Wilson's central terminal, the mean of the three, is zero here.
_LIMBS = np.stack([-(_LEAD_I + _LEAD_II), 2 * _LEAD_I - _LEAD_II, 2 * _LEAD_II - _LEAD_I]) / 3
ELECTRODE_MATRIX: Float64Array = np.concatenate([_LIMBS, _CHEST])
"""Potential of each electrode, against Wilson's central terminal, over the dipole: ``[9, 3]``."""

# Waves of a normal beat: centre and width in seconds, dipole in microvolts. The centre of T is counted in units of the
# square root of the RR interval (Bazett), its widths too; it rises more slowly than it falls.
_P = (-0.16, 0.024, (75.0, 95.0, 5.0))
_QRS = (
    (-0.028, 0.009, (-170.0, 20.0, -260.0)),
    (0.0, 0.013, (1050.0, 800.0, 420.0)),
    (0.030, 0.011, (-160.0, -210.0, 430.0)),
)
_T = (0.30, 0.060, 0.036, (260.0, 200.0, -210.0))

_STEP = 0.0005  # seconds between entries of the tables; half a millisecond is a tenth of a sample at 200 Hz
_P_START, _QRS_START, _QRS_END, _T_END = -0.30, -0.15, 0.25, 0.75
_NORMAL, _ECTOPIC = 0, 1

RATE_EFFECT = 0.17
"""Change of the logarithm of the heart rate with a unit of drive: about 12 beats a minute at 72."""
VARIABILITY_EFFECT = -0.6
"""The same for what the vagus nerve does: variation with breathing and from beat to beat, which stress takes away."""
_SLOWEST, _FASTEST = 38.0, 165.0  # beats a minute that no drive goes beyond


@dataclass(frozen=True)
class Heart:
    """One person's heart.

    Attributes:
        rr: mean time between beats.
        sinus, slow, jitter: relative variation of it with breathing, in slow waves of about 0.1 Hz, and at random.
        breathing: breaths a second.
        ectopic_share: share of beats that start in a ventricle: early, wide, without P wave.
        p, qrs, t: tables of the dipole, float32 ``[2, entry, 3]``, first of normal and then of ectopic beats, one entry
            every half millisecond from the wave's start; t counts in units of the square root of RR.
    """

    rr: float
    sinus: float
    slow: float
    jitter: float
    breathing: float
    ectopic_share: float
    p: Float32Array
    qrs: Float32Array
    t: Float32Array


def draw_heart(rng: np.random.Generator) -> Heart:
    """A person's heart: rate, variability, axis, and size and width of every wave."""
    turn = _rotation(rng.normal(0.0, 0.35), rng.normal(0.0, 0.2))
    size = float(np.exp(rng.normal(0.0, 0.25)))
    stretch = rng.uniform(0.85, 1.25)

    def dipole(vector: tuple[float, ...], spread: float) -> Float64Array:
        moved: Float64Array = turn @ np.array(vector) * size * np.exp(rng.normal(0.0, spread, 3))
        return moved

    at = np.arange(_P_START, 0.0, _STEP)
    p = _bump(at, _P[0] + rng.normal(0.0, 0.012), _P[1] * rng.uniform(0.8, 1.2), dipole(_P[2], 0.2))
    at = np.arange(_QRS_START, _QRS_END, _STEP)
    qrs = np.zeros((len(at), 3))
    for centre, width, vector in _QRS:
        qrs += _bump(at, centre * stretch, width * stretch, dipole(vector, 0.25))
    # From a ventricle the wave of activation creeps through muscle: wide, and with T against it.
    direction = rng.normal(0.0, 1.0, 3)
    direction *= 1700.0 * size / np.linalg.norm(direction)
    wide = _bump(at, 0.01, 0.034, direction) + _bump(at, 0.075, 0.026, -0.35 * direction)
    at = np.arange(0.0, _T_END, _STEP)
    centre, rise, fall, vector = _T
    centre *= rng.uniform(0.92, 1.1)
    shape = np.where(at < centre, rise, fall) * rng.uniform(0.85, 1.15)
    t = _bump(at, centre, shape, dipole(vector, 0.3))
    against = _bump(at, centre * 1.1, 1.2 * shape, -0.3 * direction)
    return Heart(
        rr=60.0 / float(np.clip(rng.normal(72.0, 12.0), 45.0, 120.0)),
        sinus=rng.uniform(0.01, 0.06),
        slow=rng.uniform(0.01, 0.04),
        jitter=rng.uniform(0.003, 0.012),
        breathing=rng.uniform(0.18, 0.33),
        ectopic_share=rng.uniform(0.02, 0.12) if rng.random() < 0.2 else 0.0,
        p=np.stack([p, np.zeros_like(p)]).astype(np.float32),
        qrs=np.stack([qrs, wide]).astype(np.float32),
        t=np.stack([t, against]).astype(np.float32),
    )


def under(heart: Heart, drive: float) -> Heart:
    """The same heart under a sympathetic drive, in standard deviations: faster and more regular; at 0 it is at rest."""
    calm = float(np.exp(VARIABILITY_EFFECT * drive))
    return replace(
        heart,
        rr=float(np.clip(heart.rr * np.exp(-RATE_EFFECT * drive), 60.0 / _FASTEST, 60.0 / _SLOWEST)),
        # Intervals that differ by much more than a tenth would be arrhythmia.
        sinus=min(heart.sinus * calm, 0.12),
        jitter=min(heart.jitter * calm, 0.025),
    )


def draw_beats(heart: Heart, seconds: float, rng: np.random.Generator) -> tuple[Float64Array, BoolArray]:
    """Times of R peaks that cover ``[0, seconds]`` with at least one more on either side, and which are ectopic."""
    # At 1.5 times the mean rate, faster than all variation together makes it, plus the beats on either side.
    count = int(1.5 * seconds / heart.rr) + 8
    about = np.arange(count) * heart.rr
    relative = 1.0 + heart.jitter * rng.standard_normal(count)
    relative += heart.sinus * np.sin(2 * np.pi * (heart.breathing * about + rng.random()))
    for frequency in (0.04, 0.07, 0.1):
        relative += heart.slow / 2 * np.sin(2 * np.pi * (frequency * about + rng.random()))
    ectopic = rng.random(count) < heart.ectopic_share
    ectopic[1:] &= ~ectopic[:-1]
    relative[ectopic] *= 0.65
    # The pause after an early beat makes up for it: the sinus node keeps its own time.
    relative[1:][ectopic[:-1]] *= 1.35
    # Both ends need a beat outside of the record; the first interval is over before it starts.
    times = np.cumsum(heart.rr * relative) - (2.0 + rng.random()) * heart.rr
    return times, ectopic


def dipole_of(heart: Heart, beats: Float64Array, ectopic: BoolArray, times: Float64Array) -> Float32Array:
    """The dipole, float32 ``[3, time]`` in microvolts, at ascending ``times`` that the beats cover."""
    last = np.searchsorted(beats, times, side="right") - 1
    interval = np.diff(beats)[last]
    since = times - beats[last]
    until = since - interval
    kind = ectopic.astype(np.intp)
    nearer = since < -until
    total = _look_up(heart.qrs, np.where(nearer, since, until), _QRS_START, kind[np.where(nearer, last, last + 1)])
    total += _look_up(heart.t, since / np.sqrt(interval), 0.0, kind[last])
    total += _look_up(heart.p, until, _P_START, kind[last + 1])
    return np.ascontiguousarray(total.T)


def _look_up(table: Float32Array, at: Float64Array, start: float, kind: IntpArray) -> Float32Array:
    entries = table.shape[1]
    index = ((at - start) * (1.0 / _STEP)).astype(np.intp)
    # Outside of its table a wave is over: first and last entry are as good as zero.
    np.clip(index, 0, entries - 1, out=index)
    index += kind * entries
    return table.reshape(-1, 3).take(index, axis=0)


def _bump(at: Float64Array, centre: float, width: float | Float64Array, dipole: Float64Array) -> Float64Array:
    bump: Float64Array = np.exp(-0.5 * ((at - centre) / width) ** 2)[:, None] * dipole
    return bump


def _rotation(frontal: float, horizontal: float) -> Float64Array:
    """Turns a dipole by an angle in the frontal plane (the electrical axis), then by one in the horizontal plane."""
    c, s = np.cos(frontal), np.sin(frontal)
    d, r = np.cos(horizontal), np.sin(horizontal)
    in_frontal = np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]])
    in_horizontal = np.array([[d, 0.0, -r], [0.0, 1.0, 0.0], [r, 0.0, d]])
    turn: Float64Array = in_horizontal @ in_frontal
    return turn
