"""Simulated twelve-lead ECGs, for tests, demonstrations and benchmarks where no recordings are at hand.

A heart (`physio_dist.signals.heart`) is seen by nine electrodes, all noise and all faults arise at the electrodes, and
the leads are computed from their potentials, as a machine computes them: what Einthoven and Goldberger say of limb
leads holds for the noise as well, and a loose limb electrode spoils every lead that depends on it. The records say that
they are simulated; whatever is learned from them says nothing about patients.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from physio_dist.errors import UserError, nearest
from physio_dist.signals import heart as model
from physio_dist.signals.montage import ECG_12, LEAD_MATRIX, LIMB
from physio_dist.signals.recording import RecordError, Recording, Signal

RATE = 200
WINDOW_S = 10
_WINDOW = RATE * WINDOW_S

FAULT_SHARE = 0.03
"""Share of windows in which one electrode is at fault."""
_FAULTS = ("flat", "rail", "drift")
_BURSTS = 0.15  # bursts of muscle activity in a window, on average
_RAIL_UV = 25_000.0
_LIMB_MATRIX = np.array([LEAD_MATRIX[lead] for lead in LIMB], np.float32)


@dataclass(frozen=True)
class Specification:
    """What ``people=64,windows=8,seed=0`` means: one record a person, of so many windows of ten seconds."""

    people: int = 64
    windows: int = 8
    seed: int = 0

    @classmethod
    def parse(cls, source: str) -> Specification:
        """The specification in ``source``; what is not mentioned has its default.

        Raises:
            UserError: an unknown or repeated key, no whole number, or a number that is too small.
        """
        known = [field.name for field in fields(cls)]
        values: dict[str, int] = {}
        for item in filter(None, (part.strip() for part in source.split(","))):
            key, _, text = (part.strip() for part in item.partition("="))
            if key not in known:
                raise UserError(f"simulate: unknown key {key!r} in {source!r}; {nearest(key, known)}")
            if key in values:
                raise UserError(f"simulate: {key} is given twice in {source!r}")
            try:
                values[key] = int(text)
            except ValueError:
                raise UserError(f"simulate: {key}={text} is not a whole number") from None
            least = 0 if key == "seed" else 1
            if values[key] < least:
                raise UserError(f"simulate: {key}={text} has to be at least {least}")
        return cls(**values)


class SimulateReader:
    """Invented persons; the source is a specification (`Specification.parse`), not a folder. See `Reader`."""

    name = "simulate"
    simulated = True

    def records(self, source: str) -> list[str]:
        """``sim-000000`` and so on, one a person; see `Reader.records`."""
        return [f"sim-{person:06d}" for person in range(Specification.parse(source).people)]

    def read(self, source: str, record: str) -> Recording:
        """One person's record at 200 Hz: a function of seed, person and number of windows; see `Reader.read`.

        Labels: ``simulated`` true, ``heart_rate`` (beats a minute over the record), ``ectopic_beats`` (their number),
        ``faults`` ("window:electrode:kind").
        """
        spec = Specification.parse(source)
        digits = record.removeprefix("sim-")
        person = int(digits) if digits.isascii() and digits.isdigit() else -1
        if record != f"sim-{person:06d}" or not 0 <= person < spec.people:
            raise RecordError(f"{source!r} describes no record of that name")
        # Independent streams, so that a change in how the noise is drawn leaves the heart as it was.
        seeds = np.random.SeedSequence([spec.seed, person]).spawn(3)
        hearts, noises, faults = (np.random.Generator(np.random.SFC64(seed)) for seed in seeds)
        potentials, labels = _beating(spec.windows, hearts)
        potentials += _noise(spec.windows, noises)
        labels["faults"] = _break_electrodes(potentials, faults)
        signal = Signal(_leads(potentials), float(RATE), ECG_12)
        return Recording(record, {"ecg": signal}, record, {"simulated": True, **labels})


def _beating(windows: int, rng: np.random.Generator) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """What the heart alone does to the electrodes, ``[9, time]`` in microvolts, and the truth about it."""
    heart = model.draw_heart(rng)
    seconds = float(windows * WINDOW_S)
    times = np.arange(windows * _WINDOW) / RATE
    beats, ectopic = model.draw_beats(heart, seconds, rng)
    # No torso is Dower's: electrodes sit a little off, and bodies conduct differently.
    torso = model.ELECTRODE_MATRIX * np.exp(rng.normal(0.0, 0.12, (len(model.ELECTRODES), 1)))
    torso += rng.normal(0.0, 0.05, torso.shape)
    dipole = model.dipole_of(heart, beats, ectopic, times)
    # The lungs fill with air, which insulates, and the heart turns with the diaphragm.
    breath = np.sin(2 * np.pi * (heart.breathing * times + rng.random())).astype(np.float32)
    dipole *= 1.0 + np.float32(rng.uniform(0.02, 0.1)) * breath
    potentials = torso.astype(np.float32) @ dipole
    potentials += rng.normal(0.0, 40.0, (len(potentials), 1)).astype(np.float32) * breath
    inside = (beats >= 0.0) & (beats < seconds)
    first, *_, last = beats[inside]
    rate = 60.0 * (int(inside.sum()) - 1) / (last - first)
    return potentials, {"heart_rate": round(float(rate), 2), "ectopic_beats": int(ectopic[inside].sum())}


def _noise(windows: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """White noise, wandering baselines, mains and muscle at every electrode, ``[9, time]`` in microvolts."""
    count, length = len(model.ELECTRODES), windows * _WINDOW
    noise = rng.standard_normal((count, length), np.float32)
    noise *= rng.uniform(1.0, 6.0, (count, 1)).astype(np.float32)
    mains = 50.0 if rng.random() < 0.5 else 60.0
    frequencies = np.array([*rng.uniform(0.03, 0.4, 4), mains, mains])
    phases = np.array([*rng.random(4), 0.0, 0.25])
    times = np.arange(length, dtype=np.float32) / np.float32(RATE)
    turns = frequencies.astype(np.float32)[:, None] * times + phases.astype(np.float32)[:, None]
    # Only the fraction of a turn matters, and single precision is good for it when it is small.
    waves = np.sin(np.float32(2 * np.pi) * (turns - np.floor(turns)))
    wander = rng.normal(0.0, 45.0, (count, 4))
    residue = rng.normal(0.0, 1.0, (count, 2)) * np.exp(rng.normal(0.7, 0.8))
    noise += np.concatenate([wander, residue], axis=1).astype(np.float32) @ waves
    for _ in range(rng.poisson(_BURSTS * windows)):
        start, duration = int(rng.integers(length - RATE // 4)), int(rng.integers(RATE // 4, 2 * RATE))
        burst = rng.standard_normal(min(duration, length - start)) * np.hanning(min(duration, length - start))
        noise[rng.integers(count), start : start + len(burst)] += rng.uniform(20.0, 80.0) * burst
    return noise


def _break_electrodes(potentials: NDArray[np.float32], rng: np.random.Generator) -> list[str]:
    """Lets single electrodes fail for single windows, in place; says which, as ``window:electrode:kind``.

    ``flat``: bridged to its neighbour or reference by gel or by the machine, so a lead shows nothing; ``rail``: open,
    so its amplifier is thrown from one end of its range to the other; ``drift``: half loose, far off but readable.
    """
    faults = []
    windows = potentials.shape[1] // _WINDOW
    for window in np.flatnonzero(rng.random(windows) < FAULT_SHARE).tolist():
        kind, electrode = _FAULTS[rng.integers(len(_FAULTS))], int(rng.integers(len(model.ELECTRODES)))
        part = potentials[:, window * _WINDOW : (window + 1) * _WINDOW]
        if kind == "flat":
            part[electrode] = part[(electrode + 1) % 3] if electrode < 3 else part[:3].mean(axis=0)
        elif kind == "rail":
            switches = rng.random(_WINDOW) < 2.0 / RATE
            switches[0] = switches[_WINDOW // 2] = True
            part[electrode] = _RAIL_UV * (1 - 2 * (np.cumsum(switches) % 2))
        else:
            turns = rng.uniform(0.05, 0.2) * np.arange(_WINDOW) / RATE
            part[electrode] += rng.uniform(1000.0, 4000.0) * np.sin(2 * np.pi * (turns + rng.random()))
        faults.append(f"{window}:{model.ELECTRODES[electrode]}:{kind}")
    return faults


def _leads(potentials: NDArray[np.float32]) -> NDArray[np.float32]:
    """The twelve leads of nine electrodes, ``[12, time]``; limb leads come from I and II, so identities are exact."""
    right, left, leg = potentials[:3]
    leads = np.empty((len(ECG_12), potentials.shape[1]), np.float32)
    np.matmul(_LIMB_MATRIX, np.stack([left - right, leg - right]), out=leads[:6])
    np.subtract(potentials[3:], potentials[:3].mean(axis=0), out=leads[6:])
    return leads


READER = SimulateReader()
