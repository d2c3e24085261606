"""Subject bootstrap: percentile intervals of AUCs and of their differences over resampled people.

Windows of a person are alike, so resampling windows would give intervals that are far too narrow.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from physio_dist.runtime.arrays import Float64Array, UInt64Array
from physio_dist.stats.auc import PairwiseComparisons, mean_auc, pooled_auc

RESAMPLES = 1000
COVERAGE = 0.95
# Rows of results that are compared with another than the fused one.
_COUNTERPART = {"fused_ecg_only": "ecg", "fused_eeg_only": "eeg", "noise_ecg": "eeg", "noise_eeg": "ecg"}


@dataclass(frozen=True)
class Difference:
    """Difference of two AUCs.

    Attributes:
        value: the first AUC minus the second.
        low, high: ends of the interval over people; NaN with fewer than two people.
        p: p value of no difference; NaN where it is not computed or not defined.
    """

    value: float
    low: float
    high: float
    p: float = math.nan


def auc_interval(pairs: Sequence[PairwiseComparisons]) -> tuple[float, float] | None:
    """Percentile interval of the AUC over resampled people.

    Returns:
        The 2.5th and the 97.5th percentile; None for a single person, and where no resample has all classes.
    """
    interval = _interval(pairs)
    return None if math.isnan(interval[0]) else interval


def auc_difference(first: Sequence[PairwiseComparisons], second: Sequence[PairwiseComparisons]) -> Difference:
    """Difference of two AUCs on the same windows, with its percentile interval.

    Both are measured on the same resampled people, so that what makes a person easy or hard cancels out.
    """
    return Difference(pooled_auc(first) - pooled_auc(second), *_interval(first, second))


def compared_rows(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs ``(row, minus)`` of rows of results whose AUCs are compared."""
    rows = list(names)
    fused = [("fused", name) for name in rows if name not in ("fused", "majority") and not name.startswith("bound_")]
    single = [(name, other) for name, other in _COUNTERPART.items() if name in rows and other in rows]
    return (fused if "fused" in rows else []) + single


def random_bits(purpose: bytes, count: int) -> UInt64Array:
    """``count`` words of 64 random bits that depend on ``purpose`` alone.

    Raw output of Philox is fixed by its specification; NumPy's ways of drawing from it may change.
    """
    key = int.from_bytes(hashlib.sha256(purpose).digest()[:8], "little")
    return np.asarray(np.random.Philox(key=key).random_raw(count), np.uint64)


def _interval(first: Sequence[PairwiseComparisons], second: Sequence[PairwiseComparisons] = ()) -> tuple[float, float]:
    """Percentile interval of the first AUC, less the second where there is one; NaN where it is not defined."""
    people = len(first[0].positives)
    if people < 2:
        return math.nan, math.nan
    counts = _resample_counts(people)
    values = mean_auc(first, counts)
    if second:
        values = values - mean_auc(second, counts)
    values = values[np.isfinite(values)]
    if not values.size:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return float(low), float(high)


def _resample_counts(people: int) -> Float64Array:
    """Number of times each person is drawn, ``[resample, person]``: the same for all rows of results."""
    bits = random_bits(b"report, people drawn again", RESAMPLES * people)
    drawn = (bits % np.uint64(people)).astype(np.int64).reshape(RESAMPLES, people)
    counts = np.zeros((RESAMPLES, people))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], drawn), 1.0)
    return counts
