"""What an expert would measure without any network: heart rate and its variability, and EEG band powers.

A fused encoder that does not beat a logistic regression on these has learned nothing worth its price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import signal as dsp
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from physio_dist.data.format.index import ShardSet, open_set, read_sample_table
from physio_dist.errors import UserError
from physio_dist.evaluation.splits import Fold
from physio_dist.evaluation.tasks import SIGNALS, need_both, shard_cache
from physio_dist.stats.scores import auc

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

HEART = ("rate", "sdnn", "rmssd", "pnn50")
BANDS = {"delta": (1.0, 4.0), "theta": (4.0, 8.0), "alpha": (8.0, 13.0), "beta": (13.0, 30.0), "gamma": (30.0, 45.0)}
REGULARISATION = (0.001, 0.01, 0.1, 1.0)
"""Values of C, the inverse strength, among which a logistic regression selects."""

_QRS_HZ = (5.0, 18.0)
_QRS_S = 0.12
_REFRACTORY_S = 0.33
# Intervals between beats outside of 30 to 200 a minute, or a quarter off the window's median: a beat was missed or made
# up.
_SHORTEST_MS, _LONGEST_MS, _OFF = 300.0, 2000.0, 0.25
_FEWEST = 3


def handcrafted_features(data: str, say: Callable[[str], None]) -> dict[str, Floats]:
    """Hand-made features of every window of a set, in storage order.

    Args:
        data: URL of a shard set with both signals.
        say: told what is going on.

    Returns:
        ``ecg``: float64 ``[window, 4]``, see :func:`heart_rate`; ``eeg``: float64 ``[window, channel x band]``, natural
        logarithms of band powers, see :func:`band_powers`. NaN where a feature cannot be measured.

    Raises:
        UserError: the set has only one of the signals.
        DataError: it is damaged.
    """
    shards = open_set(data)
    need_both(shards)
    say(f"measuring heart rate and band powers of {shards.nsamples} windows")
    leads = leads_of(shards)
    heart, brain = np.full((shards.nsamples, len(HEART)), np.nan), []
    for sample, waves, valid in read_windows(shards, SIGNALS):
        usable = [lead for lead in leads if valid["ecg"][lead]]
        if usable:
            heart[sample] = heart_rate(clearest(waves["ecg"], usable, shards), shards.rate)
        powers = band_powers(waves["eeg"], shards.rate)
        powers[~valid["eeg"]] = np.nan
        brain.append(powers.ravel())
    return {"ecg": heart, "eeg": np.stack(brain)}


def read_windows(
    shards: ShardSet, signals: Sequence[str]
) -> Iterator[tuple[int, dict[str, Floats], dict[str, npt.NDArray[np.bool_]]]]:
    """Every window of a set in storage order: its number, and of each signal ``[channel, time]`` in microvolts and
    which channels are valid.

    Raises:
        DataError: the set is damaged.
    """
    sidecar, cache, starts = read_sample_table(shards), shard_cache(), shards.shard_starts()
    for number in range(len(shards.shards)):
        content = np.frombuffer(cache.content(shards, number), np.uint8)
        for sample in range(int(starts[number]), int(starts[number + 1])):
            waves: dict[str, Floats] = {}
            for name in signals:
                info, start = shards.signals[name], int(sidecar.offset[name][sample])
                raw = content[start : start + info.nbytes].view("<i2").reshape(len(info.channels), info.samples)
                waves[name] = raw * info.uv_per_bit
            yield sample, waves, {name: sidecar.valid[name][sample] for name in signals}


def leads_of(shards: ShardSet) -> list[int]:
    """Leads in the order in which they are looked at: II first, where QRS complexes are usually large."""
    names = shards.signals["ecg"].channels
    return sorted(range(len(names)), key=lambda i: (names[i] != "II", i))


def clearest(ecg: Floats, usable: Sequence[int], shards: ShardSet) -> Floats:
    """The lead of ``[lead, time]`` in which beats are best seen; ``usable`` is what of :func:`leads_of` is valid."""
    if shards.signals["ecg"].channels[usable[0]] == "II" or len(usable) == 1:
        return cast(Floats, ecg[usable[0]])
    # The kurtosis of what is left in the band of the QRS: high where little happens but sharp peaks.
    rest = _qrs_band(ecg[list(usable)], shards.rate)
    moments: Floats = (rest**4).mean(axis=1) / np.maximum((rest**2).mean(axis=1) ** 2, 1e-12)
    return cast(Floats, ecg[usable[int(moments.argmax())]])


def _qrs_band(ecg: Floats, rate: float) -> Floats:
    sections = dsp.butter(2, _QRS_HZ, "bandpass", fs=rate, output="sos")
    filtered: Floats = dsp.sosfiltfilt(sections, ecg)
    return filtered


def r_peaks(ecg: Floats, rate: float) -> Ints:
    """Sample numbers of R peaks in one lead, ascending.

    Peaks of the squared band from 5 to 18 Hz, where QRS complexes are and T waves are not (after Pan and
    Tompkins 1985), smoothed over 120 ms; each must reach a fifth of what the seconds of the window typically reach.
    """
    band = _qrs_band(ecg, rate)
    energy = dsp.convolve(band**2, np.hanning(max(3, round(_QRS_S * rate))), "same")
    seconds = max(1, int(len(energy) / rate))
    typical = float(np.median([part.max() for part in np.array_split(energy, seconds)]))
    if not typical > 0:
        return np.zeros(0, dtype=np.int64)
    near = dsp.find_peaks(
        energy, distance=max(1, round(_REFRACTORY_S * rate)), height=0.2 * typical, prominence=0.1 * typical
    )[0]
    half = max(1, round(_QRS_S * rate / 2))
    sharp = [max(0, p - half) + int(np.abs(band[max(0, p - half) : p + half + 1]).argmax()) for p in near]
    return np.unique(np.array(sharp, dtype=np.int64))


def heart_rate(ecg: Floats, rate: float) -> Floats:
    """Heart rate and its variability in one lead, ``[time]`` at ``rate`` Hz.

    Returns:
        float64 ``[4]``: beats a minute; SDNN and RMSSD in ms; share of successive intervals that differ by more than
        50 ms (Task Force of the ESC and NASPE, Circulation 93 (1996) 1043). NaN where there are too few beats. A window
        of ten seconds is far shorter than those measures are meant for.
    """
    intervals = np.diff(r_peaks(ecg, rate)) / rate * 1000.0
    intervals = intervals[(intervals > _SHORTEST_MS) & (intervals < _LONGEST_MS)]
    unknown = np.full(len(HEART), np.nan)
    if len(intervals) < _FEWEST:
        return unknown
    middle = np.median(intervals)
    regular = np.abs(intervals - middle) < _OFF * middle
    changes = np.diff(intervals)[regular[1:] & regular[:-1]]
    kept = intervals[regular]
    if len(kept) < _FEWEST or len(changes) < _FEWEST - 1:
        return unknown
    return np.array(
        [
            60000.0 / kept.mean(), kept.std(ddof=1), np.sqrt((changes**2).mean()),
            (np.abs(changes) > 50.0).mean(),
        ]
    )  # fmt: skip


def band_powers(eeg: Floats, rate: float) -> Floats:
    """Natural logarithms of mean spectral densities (uV^2/Hz), ``[channel, band]``, of ``[channel, time]`` in uV.

    Welch's method with segments of two seconds. NaN for a band that the rate does not reach.
    """
    frequency, density = dsp.welch(eeg, fs=rate, nperseg=min(eeg.shape[1], round(2 * rate)), axis=1)
    powers = np.full((len(eeg), len(BANDS)), np.nan)
    for i, (low, high) in enumerate(BANDS.values()):
        if high <= rate / 2:
            inside = (frequency >= low) & (frequency < high)
            powers[:, i] = np.log(np.maximum(density[:, inside].mean(axis=1), 1e-12))
    return powers


@dataclass(frozen=True)
class Fitted:
    """Probabilities ``[row, class]`` of a fold's test people, and the C that its validation people chose."""

    probability: Floats
    c: float


def logistic(
    features: Mapping[str, Floats], label: Ints, classes: int, fold: Fold,
    strengths: Sequence[float] = REGULARISATION, weights: str | None = None,
) -> Fitted:  # fmt: skip
    """Logistic regression on standardised features, with C selected on the fold's own validation people.

    Args:
        features: float64 ``[n, f]`` for each signal, NaN where unknown (the training rows' median stands in for it).
        label: int ``[n]``.
        classes: number of classes.
        fold: its inner splits select, all its people but those tested train.
        strengths: values of C to select from.
        weights: of classes: None counts windows alike, ``balanced`` classes.
    """
    x = np.concatenate(list(features.values()), axis=1)
    areas = []
    for c in strengths:
        found = [
            auc(label[valid], _fit(x[train], label[train], c, weights).predict_proba(x[valid]))
            for train, valid in fold.inner
        ]
        areas.append(np.mean([area for area in found if area is not None] or [0.0]))
    best = strengths[int(np.argmax(areas))]
    model = _fit(x[fold.train], label[fold.train], best, weights)
    if len(model.classes_) != classes:
        raise UserError(f"fold {fold.name}: a class is missing among those who are left to train on")
    return Fitted(model.predict_proba(x[fold.test]), best)


def _fit(x: Floats, label: Ints, c: float, weights: str | None) -> Pipeline:
    return make_pipeline(
        SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler(),
        LogisticRegression(C=c, max_iter=2000, class_weight=weights),
    ).fit(x, label)  # fmt: skip
