"""What can be measured in every window of one signal without any network: the row that a probe has to beat.

For ECG heart rate and its variability, and of each lead the indices by which its quality is usually judged: those of
Li, Mark, Clifford, Physiol. Meas. 29 (2008) 15-32 and Clifford, Behar, Li, Rezek, Physiol. Meas. 33 (2012) 1419-1433
(kurtosis, skewness, relative power of the QRS complex and of the baseline, share of flat line), with amplitudes. For
EEG band powers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import signal as dsp
from scipy import stats

from physio_dist.data.format.index import ShardSet
from physio_dist.evaluation.handcrafted import HEART, band_powers, clearest, heart_rate, leads_of, read_windows
from physio_dist.signals.quality import in_runs

Floats = npt.NDArray[np.float64]

INDICES = (
    "log_std", "log_span", "log_largest", "flat", "kurtosis", "skewness", "qrs_power", "baseline_power", "high_power",
)  # fmt: skip
"""Of each lead; a window's features are these of every lead, the leads' validity, and ``HEART``."""

_FLAT_S = 0.1
# Above this, kurtosis tells of single spikes; how far above does not matter.
_MOST_KURTOSIS = 100.0


def quality_measures(shards: ShardSet, signal: str, say: Callable[[str], None]) -> Floats:
    """Measured features of every window of a set, in storage order.

    Args:
        shards: an opened set that has ``signal``.
        signal: ``ecg`` or ``eeg``.
        say: told what is going on.

    Returns:
        float64 ``[window, f]``, NaN where a feature cannot be measured: for ``ecg`` ``INDICES`` of each lead, whether
        it is valid, then ``HEART``; for ``eeg`` log band powers of each channel, and whether it is valid.

    Raises:
        DataError: the set is damaged.
    """
    say(f"measuring the {signal.upper()} of {shards.nsamples} windows")
    order = leads_of(shards) if signal == "ecg" else []
    found = []
    for _, waves, valid in read_windows(shards, (signal,)):
        wave, flags = waves[signal], valid[signal]
        parts = quality_indices(wave, shards.rate) if signal == "ecg" else band_powers(wave, shards.rate)
        parts[~flags] = np.nan
        row = [parts.ravel(), flags.astype(np.float64)]
        if signal == "ecg":
            usable = [lead for lead in order if flags[lead]]
            unknown = np.full(len(HEART), np.nan)
            row.append(heart_rate(clearest(wave, usable, shards), shards.rate) if usable else unknown)
        found.append(np.concatenate(row))
    return np.stack(found)


def quality_indices(ecg: Floats, rate: float) -> Floats:
    """``INDICES`` of each lead of ``[lead, time]`` in microvolts: float64 ``[lead, len(INDICES)]``.

    Logarithms are of microvolts; ``flat`` is the share of time in stretches of 0.1 s and more without any change;
    powers are relative: 5-15 Hz to 5-40 Hz, below 1 Hz to below 40 Hz, 30 Hz and more to all. The window's own band
    (0.5-45 Hz unless converted otherwise) bounds them. A lead without any change has zeros there.
    """
    frequency, density = dsp.welch(ecg, fs=rate, nperseg=min(ecg.shape[1], round(4 * rate)), axis=1)

    def power(low: float, high: float) -> Floats:
        total: Floats = density[:, (frequency >= low) & (frequency < high)].sum(axis=1)
        return total

    def share(part: Floats, whole: Floats) -> Floats:
        return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)

    alive = np.ptp(ecg, axis=1) > 0
    shape = np.zeros((2, len(ecg)))
    if alive.any():
        shape[0, alive] = np.minimum(stats.kurtosis(ecg[alive], axis=1), _MOST_KURTOSIS)
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
