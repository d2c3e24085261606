"""Simulated ECGs and EEGs, for tests, demonstrations and benchmarks where no recordings are at hand.

A heart (`physio_dist.signals.simulators.ecg`) is seen by nine electrodes, all noise and all faults arise at the
electrodes, and the leads are computed from their potentials, as a machine computes them: what Einthoven and Goldberger
say of limb leads holds for the noise as well, and a loose limb electrode spoils every lead that depends on it. A brain
(`physio_dist.signals.simulators.eeg`) is seen by nineteen more.

The label: each record is of a calm or an aroused person, and two drives say how much of it reached
heart and brain. They are that state plus noise of their own, so each modality shows it by itself, imperfectly, and
both together tell more; how much at best is known (`best_auc`).

The records say that they are simulated; whatever is learned from them says nothing about patients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import lru_cache, partial
from typing import Any

import numpy as np

from physio_dist.errors import UserError, nearest
from physio_dist.runtime.arrays import Float32Array, IntpArray
from physio_dist.signals.montage import ECG_12, EEG_19, LEAD_MATRIX, LIMB
from physio_dist.signals.recording import LazySignals, RecordError, Recording, Signal
from physio_dist.signals.simulators import ecg as model
from physio_dist.signals.simulators import eeg as scalp_model

RATE = 200
WINDOW_S = 10
_WINDOW = RATE * WINDOW_S

SEPARATION = 1.5
"""Distance between the mean drives of the two states of arousal, in standard deviations of a drive."""

FAULT_SHARE = 0.03
"""Share of windows in which one electrode is at fault."""
_FAULTS = ("flat", "rail", "drift")
_BURSTS = 0.15  # bursts of muscle activity in a window, on average
_RAIL_UV = 25_000.0
_LIMB_MATRIX = np.array([LEAD_MATRIX[lead] for lead in LIMB], np.float32)


class _Purpose(IntEnum):
    """Purposes of random numbers. Each has a stream of its own, so that a change in one leaves the others."""

    BODY, BRAIN, STATES, DRIVES, BEATS, NOISE, FAULTS, SCALP = range(8)


def best_auc(modalities: int) -> float:
    """The largest area under the ROC curve that anything computed from so many modalities can reach.

    A drive is normal with variance 1 and means `SEPARATION` apart; the sum of n drives is sufficient, its means are
    n times as far apart, its variance is n. Two normal values with means d standard deviations apart come in the right
    order with probability Phi(d / sqrt(2)) (Green and Swets 1966).
    """
    return 0.5 * (1.0 + math.erf(SEPARATION * math.sqrt(modalities) / 2.0))


@dataclass(frozen=True)
class Specification:
    """Size of a simulated corpus: ``trials`` records of each person, of ``windows`` windows of 10 s each."""

    people: int = 64
    windows: int = 8
    seed: int = 0
    trials: int = 1

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


@dataclass(frozen=True)
class _Body:
    """Properties of a person's ECG that are the same in all of their records.

    Attributes:
        torso: potential of each electrode over the dipole, ``[9, 3]``.
        swell: how much breathing changes the dipole.
        sway: how much it changes each electrode's potential, ``[9, 1]``.
        noise: standard deviation of each electrode's white noise, ``[9, 1]``.
        mains: frequency of mains where the person lives, in Hz.
    """

    heart: model.Heart
    torso: Float32Array
    swell: float
    sway: Float32Array
    noise: Float32Array
    mains: float


class SimulateReader:
    """Invented persons; the source is a specification (`Specification.parse`), not a folder. See `Reader`."""

    name = "simulate"
    simulated = True

    def records(self, source: str) -> list[str]:
        """``sim-000000`` and so on, one a person, or ``sim-000000-00`` and so on with trials; see `Reader.records`."""
        spec = Specification.parse(source)
        return [_name(spec, person, trial) for person in range(spec.people) for trial in range(spec.trials)]

    def read(self, source: str, record: str) -> Recording:
        """One record at 200 Hz, a function of the specification, but for the number of people; see `Reader.read`.

        The EEG is made only when it is asked for.

        Labels: ``simulated`` true, ``heart_rate`` (beats a minute over the record), ``ectopic_beats`` (their number),
        ``faults`` ("window:electrode:kind", of the ECG), ``arousal`` (0 or 1; as many of each in a person as an even
        number of trials allows), ``drive_ecg`` and ``drive_eeg`` (what of it reached heart and brain).
        """
        spec = Specification.parse(source)
        person, trial = _numbers(spec, source, record)
        arousal = int(_states(spec, person)[trial])
        drives = _rng(spec.seed, person, _Purpose.DRIVES, trial).normal(SEPARATION * (arousal - 0.5), 1.0, 2)
        drive_ecg, drive_eeg = (round(float(drive), 4) for drive in drives)
        body = _body(spec.seed, person)
        potentials, labels = _beating(body, drive_ecg, spec.windows, _rng(spec.seed, person, _Purpose.BEATS, trial))
        potentials += _noise(body, spec.windows, _rng(spec.seed, person, _Purpose.NOISE, trial))
        labels["faults"] = _break_electrodes(potentials, _rng(spec.seed, person, _Purpose.FAULTS, trial))
        ecg = Signal(_leads(potentials), float(RATE), ECG_12)
        signals = LazySignals({"ecg": lambda: ecg, "eeg": partial(_eeg, spec, person, trial, drive_eeg)})
        labels |= {"arousal": arousal, "drive_ecg": drive_ecg, "drive_eeg": drive_eeg}
        # Another seed makes other people.
        who = f"seed {spec.seed} {_whose(person)}" if spec.seed else _whose(person)
        return Recording(record, signals, who, {"simulated": True, **labels}, identified_by=("ecg",))


def _name(spec: Specification, person: int, trial: int) -> str:
    if spec.trials == 1:
        return _whose(person)
    # As many digits as the largest number needs, so that names sort like numbers.
    return f"{_whose(person)}-{trial:0{max(2, len(str(spec.trials - 1)))}d}"


def _whose(person: int) -> str:
    return f"sim-{person:06d}"


def _numbers(spec: Specification, source: str, record: str) -> tuple[int, int]:
    """Person and trial of a record's name."""
    person, _, trial = record.removeprefix("sim-").partition("-")
    digits = person + trial
    if digits.isascii() and digits.isdigit() and person:
        found = int(person), int(trial or 0)
        if found[0] < spec.people and found[1] < spec.trials and _name(spec, *found) == record:
            return found
    raise RecordError(f"{source!r} describes no record of that name")


def _rng(seed: int, person: int, purpose: _Purpose, *trial: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(person, purpose, *trial))))


def _states(spec: Specification, person: int) -> IntpArray:
    """The arousal of each of a person's records, shuffled; of an odd number either state may have one more."""
    rng = _rng(spec.seed, person, _Purpose.STATES)
    return rng.permutation((np.arange(spec.trials) + rng.integers(2)) % 2)


@lru_cache(maxsize=1)  # a person's records are mostly read one after the other
def _body(seed: int, person: int) -> _Body:
    rng = _rng(seed, person, _Purpose.BODY)
    heart = model.draw_heart(rng)
    count = len(model.ELECTRODES)
    # No torso is Dower's: electrodes sit a little off, and bodies conduct differently.
    torso = model.ELECTRODE_MATRIX * np.exp(rng.normal(0.0, 0.12, (count, 1)))
    torso += rng.normal(0.0, 0.05, torso.shape)
    return _Body(
        heart=heart,
        torso=torso.astype(np.float32),
        swell=rng.uniform(0.02, 0.1),
        sway=rng.normal(0.0, 40.0, (count, 1)).astype(np.float32),
        noise=rng.uniform(1.0, 6.0, (count, 1)).astype(np.float32),
        mains=50.0 if rng.random() < 0.5 else 60.0,
    )


def _eeg(spec: Specification, person: int, trial: int, drive: float) -> Signal:
    brain = scalp_model.draw_brain(_body(spec.seed, person).mains, _rng(spec.seed, person, _Purpose.BRAIN))
    rng = _rng(spec.seed, person, _Purpose.SCALP, trial)
    return Signal(scalp_model.scalp(brain, drive, spec.windows * _WINDOW, rng), float(RATE), EEG_19)


def _beating(body: _Body, drive: float, windows: int, rng: np.random.Generator) -> tuple[Float32Array, dict[str, Any]]:
    """Potential of the heart at the electrodes, ``[9, time]`` in microvolts, and its labels."""
    heart = model.under(body.heart, drive)
    seconds = float(windows * WINDOW_S)
    times = np.arange(windows * _WINDOW) / RATE
    beats, ectopic = model.draw_beats(heart, seconds, rng)
    dipole = model.dipole_of(heart, beats, ectopic, times)
    # The lungs fill with air, which insulates, and the heart turns with the diaphragm.
    breath = np.sin(2 * np.pi * (heart.breathing * times + rng.random())).astype(np.float32)
    dipole *= 1.0 + np.float32(body.swell) * breath
    potentials = body.torso @ dipole
    potentials += body.sway * breath
    inside = (beats >= 0.0) & (beats < seconds)
    first, *_, last = beats[inside]
    rate = 60.0 * (int(inside.sum()) - 1) / (last - first)
    return potentials, {"heart_rate": round(float(rate), 2), "ectopic_beats": int(ectopic[inside].sum())}


def _noise(body: _Body, windows: int, rng: np.random.Generator) -> Float32Array:
    """White noise, wandering baselines, mains and muscle at every electrode, ``[9, time]`` in microvolts."""
    count, length = len(model.ELECTRODES), windows * _WINDOW
    noise = rng.standard_normal((count, length), np.float32)
    noise *= body.noise
    frequencies = np.array([*rng.uniform(0.03, 0.4, 4), body.mains, body.mains])
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


def _break_electrodes(potentials: Float32Array, rng: np.random.Generator) -> list[str]:
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


def _leads(potentials: Float32Array) -> Float32Array:
    """The twelve leads of nine electrodes, ``[12, time]``; limb leads come from I and II, so identities are exact."""
    right, left, leg = potentials[:3]
    leads = np.empty((len(ECG_12), potentials.shape[1]), np.float32)
    np.matmul(_LIMB_MATRIX, np.stack([left - right, leg - right]), out=leads[:6])
    np.subtract(potentials[3:], potentials[:3].mean(axis=0), out=leads[6:])
    return leads


READER = SimulateReader()
