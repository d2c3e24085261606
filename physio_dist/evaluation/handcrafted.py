"""Handcrafted features of ECG and EEG windows: the baseline that a learned encoder has to beat.

ECG: heart rate and its variability (Task Force of the ESC and NASPE, Circulation 93 (1996) 1043-1065), and for every
lead the signal quality indices of Li, Mark, Clifford, Physiol. Meas. 29 (2008) 15-32 and Clifford, Behar, Li, Rezek,
Physiol. Meas. 33 (2012) 1419-1433 (kurtosis, skewness, relative power of the QRS complex and of the baseline, share of
flat line), with amplitudes. EEG: band powers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
from scipy import signal as dsp
from scipy import stats

from physio_dist.data.format.index import ShardSet
from physio_dist.data.handle import ShardSetHandle
from physio_dist.evaluation.label_table import SIGNALS, require_paired
from physio_dist.runtime.arrays import BoolArray, Float64Array, Int64Array
from physio_dist.signals.quality import in_runs

HEART = ("rate", "sdnn", "rmssd", "pnn50")
BANDS = {"delta": (1.0, 4.0), "theta": (4.0, 8.0), "alpha": (8.0, 13.0), "beta": (13.0, 30.0), "gamma": (30.0, 45.0)}
INDICES = (
    "log_std", "log_span", "log_largest", "flat", "kurtosis", "skewness", "qrs_power", "baseline_power", "high_power",
)  # fmt: skip
"""Quality indices of a lead; :func:`window_features` has these of every lead, the leads' validity, and ``HEART``."""

_QRS_HZ = (5.0, 18.0)
_QRS_S = 0.12
_REFRACTORY_S = 0.33
# RR intervals outside of 30 to 200 beats a minute, or a quarter off the window's median, come from a missed or a
# spurious beat.
_SHORTEST_MS, _LONGEST_MS, _MAX_DEVIATION = 300.0, 2000.0, 0.25
_MIN_INTERVALS = 3
_FLAT_S = 0.1
# A larger kurtosis only tells how high a single spike is.
_MAX_KURTOSIS = 100.0


def paired_features(data: ShardSetHandle, say: Callable[[str], None]) -> dict[str, Float64Array]:
    """Compute features of every window of a paired set, in storage order.

    Args:
        data: a shard set with both signals.
        say: receives a progress message.

    Returns:
        ``ecg``: float64 ``[window, 4]``, see :func:`heart_rate`; ``eeg``: float64 ``[window, channel x band]``, natural
        logarithms of band powers, see :func:`band_powers`. NaN where a feature cannot be measured.

    Raises:
        UserError: the set has only one of the signals.
        DataError: it is damaged.
    """
    shards = data.index
    require_paired(shards)
    say(f"measuring heart rate and band powers of {shards.nsamples} windows")
    leads = lead_order(shards)
    heart, brain = np.full((shards.nsamples, len(HEART)), np.nan), []
    for sample, waves, valid in read_windows(data, SIGNALS):
        usable = [lead for lead in leads if valid["ecg"][lead]]
        if usable:
            heart[sample] = heart_rate(clearest_lead(waves["ecg"], usable, shards), shards.rate)
        powers = band_powers(waves["eeg"], shards.rate)
        powers[~valid["eeg"]] = np.nan
        brain.append(powers.ravel())
    return {"ecg": heart, "eeg": np.stack(brain)}


def window_features(data: ShardSetHandle, signal: str, say: Callable[[str], None]) -> Float64Array:
    """Compute features of one signal of every window of a set, in storage order.

    Args:
        data: a shard set that has ``signal``.
        signal: ``ecg`` or ``eeg``.
        say: receives a progress message.

    Returns:
        float64 ``[window, f]``, NaN where a feature cannot be measured: for ``ecg`` ``INDICES`` of each lead, the
        leads' validity, then ``HEART``; for ``eeg`` log band powers of each channel, and the channels' validity.

    Raises:
        DataError: the set is damaged.
    """
    shards = data.index
    say(f"measuring the {signal.upper()} of {shards.nsamples} windows")
    leads = lead_order(shards) if signal == "ecg" else []
    rows = []
    for _, waves, valid in read_windows(data, (signal,)):
        wave, flags = waves[signal], valid[signal]
        values = quality_indices(wave, shards.rate) if signal == "ecg" else band_powers(wave, shards.rate)
        values[~flags] = np.nan
        row = [values.ravel(), flags.astype(np.float64)]
        if signal == "ecg":
            usable = [lead for lead in leads if flags[lead]]
            unknown = np.full(len(HEART), np.nan)
            row.append(heart_rate(clearest_lead(wave, usable, shards), shards.rate) if usable else unknown)
        rows.append(np.concatenate(row))
    return np.stack(rows)


def read_windows(
    data: ShardSetHandle, signals: Sequence[str]
) -> Iterator[tuple[int, dict[str, Float64Array], dict[str, BoolArray]]]:
    """Iterate over the windows of a set in storage order.

    Yields:
        The window's number; for each signal ``[channel, time]`` in microvolts; for each signal bool ``[channel]``, its
        valid channels.

    Raises:
        DataError: the set is damaged.
    """
    shards, table, starts = data.index, data.sample_table, data.index.shard_starts()
    for number in range(len(shards.shards)):
        content = np.frombuffer(data.cache.content(shards, number), np.uint8)
        for sample in range(int(starts[number]), int(starts[number + 1])):
            waves: dict[str, Float64Array] = {}
            for name in signals:
                info, start = shards.signals[name], int(table.offset[name][sample])
                raw = content[start : start + info.nbytes].view("<i2").reshape(len(info.channels), info.samples)
                waves[name] = raw * info.uv_per_bit
            yield sample, waves, {name: table.valid[name][sample] for name in signals}


def lead_order(shards: ShardSet) -> list[int]:
    """Order the leads by preference for beat detection: II first, where QRS complexes are usually large."""
    names = shards.signals["ecg"].channels
    return sorted(range(len(names)), key=lambda i: (names[i] != "II", i))


def clearest_lead(ecg: Float64Array, usable: Sequence[int], shards: ShardSet) -> Float64Array:
    """Choose the lead of ``[lead, time]`` with the clearest beats; ``usable`` is the valid part of `lead_order`."""
    if shards.signals["ecg"].channels[usable[0]] == "II" or len(usable) == 1:
        return cast(Float64Array, ecg[usable[0]])
    # Kurtosis in the QRS band: high where sharp peaks are rare.
    filtered = _qrs_band(ecg[list(usable)], shards.rate)
    kurtosis: Float64Array = (filtered**4).mean(axis=1) / np.maximum((filtered**2).mean(axis=1) ** 2, 1e-12)
    return cast(Float64Array, ecg[usable[int(kurtosis.argmax())]])


def _qrs_band(ecg: Float64Array, rate: float) -> Float64Array:
    sections = dsp.butter(2, _QRS_HZ, "bandpass", fs=rate, output="sos")
    filtered: Float64Array = dsp.sosfiltfilt(sections, ecg)
    return filtered


def r_peaks(ecg: Float64Array, rate: float) -> Int64Array:
    """Detect R peaks in one lead: ascending sample numbers.

    Peaks of the squared signal between 5 and 18 Hz, which keeps QRS complexes and removes T waves (after Pan and
    Tompkins, IEEE Trans. Biomed. Eng. 32 (1985) 230-236), smoothed over 120 ms; a peak must reach a fifth of the median
    over seconds of each second's maximum.
    """
    band = _qrs_band(ecg, rate)
    energy = dsp.convolve(band**2, np.hanning(max(3, round(_QRS_S * rate))), "same")
    seconds = max(1, int(len(energy) / rate))
    height = float(np.median([part.max() for part in np.array_split(energy, seconds)]))
    if not height > 0:
        return np.zeros(0, dtype=np.int64)
    peaks = dsp.find_peaks(
        energy, distance=max(1, round(_REFRACTORY_S * rate)), height=0.2 * height, prominence=0.1 * height
    )[0]
    half = max(1, round(_QRS_S * rate / 2))
    r_wave = [max(0, p - half) + int(np.abs(band[max(0, p - half) : p + half + 1]).argmax()) for p in peaks]
    return np.unique(np.array(r_wave, dtype=np.int64))


def heart_rate(ecg: Float64Array, rate: float) -> Float64Array:
    """Measure heart rate and its variability in one lead, ``[time]`` at ``rate`` Hz.

    Returns:
        float64 ``[4]``: beats a minute; SDNN and RMSSD in ms; share of successive intervals that differ by more than
        50 ms (Task Force of the ESC and NASPE, Circulation 93 (1996) 1043). NaN where there are too few beats. Those
        measures are defined on recordings of five minutes; a window is far shorter.
    """
    intervals = np.diff(r_peaks(ecg, rate)) / rate * 1000.0
    intervals = intervals[(intervals > _SHORTEST_MS) & (intervals < _LONGEST_MS)]
    unknown = np.full(len(HEART), np.nan)
    if len(intervals) < _MIN_INTERVALS:
        return unknown
    median = np.median(intervals)
    regular = np.abs(intervals - median) < _MAX_DEVIATION * median
    changes = np.diff(intervals)[regular[1:] & regular[:-1]]
    normal = intervals[regular]
    if len(normal) < _MIN_INTERVALS or len(changes) < _MIN_INTERVALS - 1:
        return unknown
    return np.array(
        [
            60000.0 / normal.mean(), normal.std(ddof=1), np.sqrt((changes**2).mean()),
            (np.abs(changes) > 50.0).mean(),
        ]
    )  # fmt: skip


def band_powers(eeg: Float64Array, rate: float) -> Float64Array:
    """Measure log band powers: natural logarithms of mean spectral densities (uV^2/Hz).

    Welch's method with segments of two seconds.

    Args:
        eeg: ``[channel, time]`` in uV.
        rate: Hz.

    Returns:
        float64 ``[channel, len(BANDS)]``; NaN for a band above half the rate.
    """
    frequency, density = dsp.welch(eeg, fs=rate, nperseg=min(eeg.shape[1], round(2 * rate)), axis=1)
    powers = np.full((len(eeg), len(BANDS)), np.nan)
    for i, (low, high) in enumerate(BANDS.values()):
        if high <= rate / 2:
            inside = (frequency >= low) & (frequency < high)
            powers[:, i] = np.log(np.maximum(density[:, inside].mean(axis=1), 1e-12))
    return powers


def quality_indices(ecg: Float64Array, rate: float) -> Float64Array:
    """Measure ``INDICES`` of each lead of ``[lead, time]`` in microvolts: float64 ``[lead, len(INDICES)]``.

    Logarithms are of microvolts; ``flat`` is the share of time in runs of 0.1 s and more without any change;
    powers are relative: 5-15 Hz to 5-40 Hz, below 1 Hz to below 40 Hz, 30 Hz and more to all. The window's own band
    (0.5-45 Hz unless converted otherwise) bounds them. A lead without any change has zeros there.
    """
    frequency, density = dsp.welch(ecg, fs=rate, nperseg=min(ecg.shape[1], round(4 * rate)), axis=1)

    def power(low: float, high: float) -> Float64Array:
        total: Float64Array = density[:, (frequency >= low) & (frequency < high)].sum(axis=1)
        return total

    def share(part: Float64Array, total: Float64Array) -> Float64Array:
        return np.divide(part, total, out=np.zeros_like(part), where=total > 0)

    alive = np.ptp(ecg, axis=1) > 0
    shape = np.zeros((2, len(ecg)))
    if alive.any():
        shape[0, alive] = np.minimum(stats.kurtosis(ecg[alive], axis=1), _MAX_KURTOSIS)
        shape[1, alive] = stats.skew(ecg[alive], axis=1)
    return np.stack(
        [
            np.log1p(ecg.std(axis=1)), np.log1p(np.ptp(ecg, axis=1)), np.log1p(np.abs(ecg).max(axis=1)),
            in_runs(np.diff(ecg, axis=1) == 0.0, max(1, round(_FLAT_S * rate))).mean(axis=1),
            *shape, share(power(5.0, 15.0), power(5.0, 40.0)), share(power(0.0, 1.0), power(0.0, 40.0)),
            share(power(30.0, np.inf), power(0.0, np.inf)),
        ],
        axis=1,
    )  # fmt: skip
