"""Quality of each lead of a window, with reasons.

Flatness and saturation are judged on the raw samples, since any filter turns a constant into something that moves;
amplitude and the limb leads' identities are judged in the band, since a drifting baseline is no fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from physio_dist.runtime.arrays import BoolArray, Float64Array, FloatArray
from physio_dist.signals.montage import LEAD_MATRIX, identity_error

MAX_GAP_S = 0.1
"""Longest run of missing samples that is bridged. Shorter than a QRS complex, so no beat is invented or lost whole."""
MAX_MISSING = 0.05
"""Largest share of a window that may be missing in short gaps."""
HOLD_S = 1.0
"""A lead that repeats one value for this long is not moving; a connected electrode's noise never does."""
MAX_HELD = 0.2
"""Largest share of a window that a lead may stand still."""
RAIL_S = 0.04
"""Shortest stay at the extreme that counts as saturation; a peak touches its extreme for a few samples only."""
MAX_RAILED = 0.05
"""Largest share of a window that may be saturated."""
MIN_SPAN_UV = 40.0
"""An ECG lead whose in-band peak-to-peak value is below this shows no heart beat (0.4 mm on paper): an open input
that dithers around a constant. One in a thousand leads that readers call acceptable is below 110 uV."""
MAX_IDENTITY_ERROR = 0.15
"""Relative residual above which limb leads contradict each other. Rounding alone leaves 0.02-0.03 (largest of 1000 real
records at 1 to 5 uV a bit); two swapped names leave 0.2-0.9."""
SWAPPED_ERROR = 0.05
"""Swapping two names explains a residual if it brings it below this, and to a fifth, and no other swap does."""


@dataclass(frozen=True)
class Limits:
    """Limits of a modality's channels, in microvolts.

    Attributes:
        span: smallest peak-to-peak value in the band of a channel that is connected.
        largest: largest amplitude in the band that the body brings to the skin, with a margin.
        rail: nearest that an amplifier's rail comes to the channel's middle. A quiet baseline may be a channel's lowest
            value too, at coarse resolution for long stretches; it differs from a rail in lying well inside the
            amplifier's range.
    """

    span: float
    largest: float
    rail: float


ECG_LIMITS = Limits(span=MIN_SPAN_UV, largest=10_000.0, rail=2000.0)
EEG_LIMITS = Limits(span=2.0, largest=800.0, rail=100.0)
"""A span below 2 uV is that of a dead channel; spans of real windows of 10 s (eegmat) lie
between 23 and 783 uV, amplitudes at 36 in the median, below 166 in all but one channel of a thousand, and below 576. An
amplifier's rail is a few hundred microvolts away where the recorder takes the offset out before it digitises."""
EEG_SHARE = 0.75
"""Share of EEG channels that have to be valid for a window to be usable: of 19 electrodes five may be loose."""


@dataclass(frozen=True)
class Channels:
    """The channels of a recording, in the order of its rows.

    Attributes:
        names: of the channels.
        limb: rows that were recorded as limb leads; computed ones obey the identities by construction. None in EEG.
        absent: bool ``[channel]``, channels that the recording does not have.
    """

    names: Sequence[str]
    limb: Sequence[int]
    absent: BoolArray


@dataclass(frozen=True)
class ChannelQuality:
    """Quality of one window's channels.

    Attributes:
        valid: bool ``[channel]``.
        reasons: faults, each with the names of the channels that have it.
    """

    valid: BoolArray
    reasons: tuple[str, ...]


def bridge_gaps(raw: FloatArray) -> tuple[Float64Array, BoolArray]:
    """Straight lines over non-finite samples, and where those samples are.

    Gaps of any length are filled, for the filter's sake; which of them leave a window usable is up to `assess`.
    Channels without any value become zero.

    Args:
        raw: ``[channel, time]``.

    Returns:
        filled: float64 ``[channel, time]``, finite.
        missing: bool ``[channel, time]``.
    """
    filled = np.array(raw, np.float64)
    missing = ~np.isfinite(filled)
    at = np.arange(filled.shape[1])
    for i in np.flatnonzero(missing.any(axis=1)):
        gone = missing[i]
        filled[i, gone] = 0.0 if gone.all() else np.interp(at[gone], at[~gone], filled[i, ~gone])
    return filled, missing


def in_runs(flags: BoolArray, length: int) -> BoolArray:
    """The true elements of ``flags`` ``[..., time]`` that belong to runs of at least ``length``."""
    in_run = np.zeros(flags.shape, np.bool_)
    padded = np.zeros((*flags.shape[:-1], flags.shape[-1] + 2), np.int8)
    padded[..., 1:-1] = flags
    edges = np.diff(padded.ravel())  # the padding keeps the runs of different channels apart
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    rows = in_run.reshape(-1, flags.shape[-1])
    long = ends - starts >= length
    for start, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
        row, at = divmod(start, padded.shape[-1])
        rows[row, at : at + end - start] = True
    return in_run


def held_share(raw: Float64Array, rate: float) -> Float64Array:
    """Share of time that each channel of ``raw`` ``[channel, time]`` repeats one value for `HOLD_S` or longer."""
    share: Float64Array = in_runs(np.diff(raw, axis=1) == 0.0, int(HOLD_S * rate)).mean(axis=1)
    return share


def railed_share(raw: Float64Array, rate: float, rail: float) -> Float64Array:
    """Share of time that each channel of ``raw`` ``[channel, time]`` sits at its own extreme values.

    Both are in microvolts; values nearer to the channel's middle than ``rail`` are none.
    """
    share = np.zeros(len(raw))
    high, low = raw.max(axis=1), raw.min(axis=1)
    for i in np.flatnonzero(high - low >= rail):
        middle = np.median(raw[i])
        # Where the lead sits at one rail most of the time that is its middle, and the other end is far away instead.
        if max(high[i] - middle, middle - low[i]) >= rail:
            at_extreme = np.stack([raw[i] == high[i], raw[i] == low[i]])
            share[i] = in_runs(at_extreme, max(2, int(RAIL_S * rate))).mean(axis=1).sum()
    return share


def swapped_names(limb: Float64Array, leads: Sequence[str], samples: int) -> tuple[str, str] | None:
    """The two limb leads that carry each other's name, where the identities leave no doubt about it.

    Every window has a vote, so that a fault in some of them does not hide the others.

    Args:
        limb: in-band ``[len(leads), time]``, all six limb leads; with fewer, a swap has other explanations.
        samples: samples in a window.
    """
    if len(leads) < len(LEAD_MATRIX):
        return None
    votes: Counter[tuple[str, str] | None] = Counter()
    for start in range(0, limb.shape[1] - samples + 1, samples):
        window = limb[:, start : start + samples]
        before = identity_error(window, leads)
        if before <= SWAPPED_ERROR:
            # Dead leads agree with any name, so only a window of living ones speaks for the names as they are.
            votes[None] += int(np.ptp(window, axis=1).min() >= MIN_SPAN_UV)
            continue
        after = sorted((identity_error(window, _swap(leads, a, b)), (a, b)) for a, b in combinations(leads, 2))
        best, names = after[0]
        if best < SWAPPED_ERROR and 5 * best < before and 2 * best < after[1][0]:
            votes[names] += 1
    return votes.most_common(1)[0][0] if votes else None


def contradicting(limb: Float64Array, leads: Sequence[str]) -> tuple[list[int], float]:
    """The limb leads that break the identities, as rows of ``limb`` ``[len(leads), time]``, and the residual.

    One lead is named when the others agree without it, so at least three others are needed; where several break
    the identities it is undecidable which, and all are named. Rows that do not count are all NaN.
    """
    before = identity_error(limb, leads)
    if before <= MAX_IDENTITY_ERROR:
        return [], before
    counted = [i for i in range(len(leads)) if not np.isnan(limb[i]).all()]
    if len(counted) >= 4:
        without = []
        for i in counted:
            others = limb.copy()
            others[i] = np.nan
            without.append((identity_error(others, leads), i))
        without.sort()
        if without[0][0] < MAX_IDENTITY_ERROR and 2 * without[0][0] < without[1][0]:
            return [without[0][1]], before
    return counted, before


def assess(
    raw: Float64Array,
    missing: BoolArray,
    rate: float,
    band: Float64Array,
    channels: Channels,
    limits: Limits,
) -> ChannelQuality:
    """Decide which channels of one window are valid.

    Args:
        raw: ``[channel, time]`` in microvolts as recorded at ``rate``, gaps bridged (`bridge_gaps`).
        missing: ``[channel, time]`` as `bridge_gaps` gives it.
        band: ``[channel, time]`` in microvolts after the band-pass, at any rate.
        channels: of the rows.
        limits: those of the modality.
    """
    leads = channels.names
    valid = np.ones(len(leads), np.bool_)
    reasons = []

    def fail(bad: BoolArray, fault: str) -> None:
        bad = bad & valid
        if bad.any():
            reasons.append(f"{fault}: {', '.join(leads[i] for i in np.flatnonzero(bad).tolist())}")
            valid[bad] = False

    fail(channels.absent, "not in the record")
    long = in_runs(missing, int(MAX_GAP_S * rate) + 1).any(axis=1)
    fail(long | (missing.mean(axis=1) > MAX_MISSING), "missing samples")
    fail((held_share(raw, rate) > MAX_HELD) | (np.ptp(band, axis=1) < limits.span), "flat")
    fail(railed_share(raw, rate, limits.rail) > MAX_RAILED, "saturated")
    fail(np.abs(band).max(axis=1) > limits.largest, f"beyond {limits.largest / 1000:g} mV")
    if channels.limb:
        rows = list(channels.limb)
        counted = band[rows].copy()
        counted[~valid[rows]] = np.nan
        wrong, error = contradicting(counted, [leads[i] for i in rows])
        bad = np.zeros(len(leads), np.bool_)
        bad[[rows[i] for i in wrong]] = True
        fail(bad, f"contradicts the limb leads' identities (residual {error:.2f})")
    return ChannelQuality(valid, tuple(reasons))


def _swap(leads: Sequence[str], a: str, b: str) -> list[str]:
    return [{a: b, b: a}.get(lead, lead) for lead in leads]
