"""Areas under ROC curves by people: who is told from whom, people drawn again, two rows of results exchanged.

Shared by what a study writes and what its report draws, so that both say the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
People = npt.NDArray[np.uint64]

RESAMPLES = 1000
PERMUTATIONS = 4999
COVERAGE = 0.95
# What each row of results is held against, beside the fused one against all.
_AGAINST = {"fused_ecg_only": "ecg", "fused_eeg_only": "eeg", "noise_ecg": "eeg", "noise_eeg": "ecg"}


@dataclass(frozen=True)
class PairwiseComparisons:
    """All comparisons of a window of a class with one of another class, summed by the people they belong to.

    ``win_matrix[i, j]``: pairs of a positive window of person *i* and a negative one of person *j* in which the
    positive one has the higher score, ties counted half. ``positives``, ``negatives``: windows of each person. The area
    under the ROC curve of any multiset of people follows: with person *i* taken c_i times it is c'Wc / (c'p c'n),
    which is the Mann-Whitney statistic (Hanley and McNeil 1982).
    """

    win_matrix: Floats
    positives: Floats
    negatives: Floats

    def auc(self, counts: Floats) -> Floats:
        """Areas for ``counts`` ``[repeat, person]``, ``[repeat]``; NaN where a class is missing."""
        total = (counts @ self.positives) * (counts @ self.negatives)
        won = ((counts @ self.win_matrix) * counts).sum(axis=1)
        return ratio(won, total)

    def of_each_person(self) -> Floats:
        """The area within each person, ``[person]``; NaN where a person has one kind of window only."""
        total = self.positives * self.negatives
        return ratio(np.diag(self.win_matrix), total)


@dataclass(frozen=True)
class Difference:
    """By how much the AUC of one row exceeds another's, with the interval over people (NaN with fewer than two), and
    the p value of no difference (NaN where it is not asked for or not defined)."""

    value: float
    low: float
    high: float
    p: float = math.nan


def positive_classes(classes: int) -> list[int]:
    """Classes that get a curve: of two the second, else each against the rest."""
    return [1] if classes == 2 else list(range(classes))


def compare_pairs(
    positive: npt.NDArray[np.bool_], person: People, score: Floats, other: Floats | None = None
) -> PairwiseComparisons:
    """Comparisons of the positive windows, by ``score``, with all others, by ``other`` (None: by ``score`` too).

    Args:
        positive: ``[n]``, which windows are of the class.
        person, score, other: ``[n]``.
    """
    people, owner = np.unique(person, return_inverse=True)
    below_score = score if other is None else other
    above, whose = score[positive], owner[positive]
    win_matrix = np.zeros((len(people), len(people)))
    for j in range(len(people)):
        below = np.sort(below_score[~positive & (owner == j)])
        if below.size:
            won = (np.searchsorted(below, above, "left") + np.searchsorted(below, above, "right")) / 2
            win_matrix[:, j] = np.bincount(whose, weights=won, minlength=len(people))
    positives = np.bincount(whose, minlength=len(people)).astype(np.float64)
    negatives = np.bincount(owner, minlength=len(people)) - positives
    return PairwiseComparisons(win_matrix, positives, negatives)


def compare_all_pairs(label: Ints, person: People, probability: Floats) -> list[PairwiseComparisons]:
    """One entry a class that gets a curve; ``probability`` is ``[n, class]``."""
    return [compare_pairs(label == one, person, probability[:, one]) for one in positive_classes(probability.shape[1])]


def mean_auc(pairs: Sequence[PairwiseComparisons], counts: Floats) -> Floats:
    """Mean over classes of their areas, ``[repeat]``; classes that a repeat lacks are left out of its mean."""
    return mean_of_finite(np.stack([one.auc(counts) for one in pairs]))


def pooled_auc(pairs: Sequence[PairwiseComparisons]) -> float:
    """The area over all people, each taken once."""
    return float(mean_auc(pairs, np.ones((1, len(pairs[0].positives))))[0])


def difference(one: Sequence[PairwiseComparisons], other: Sequence[PairwiseComparisons]) -> Difference:
    """How far ``one``'s area is above ``other``'s, with the percentile interval of a bootstrap over people.

    Both are measured on the same resampled people, so that what makes a person easy or hard cancels out.
    """
    value = pooled_auc(one) - pooled_auc(other)
    people = len(one[0].positives)
    if people < 2:
        return Difference(value, math.nan, math.nan)
    counts = _resampled(people)
    drawn = mean_auc(one, counts) - mean_auc(other, counts)
    drawn = drawn[np.isfinite(drawn)]
    if not drawn.size:
        return Difference(value, math.nan, math.nan)
    low, high = np.quantile(drawn, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Difference(value, float(low), float(high))


def p_of_no_difference(label: Ints, person: People, one: Floats, other: Floats) -> float:
    """Two-sided p value of the two rows telling classes apart equally well, by permutation of whole people.

    Under that hypothesis it does not matter which row answers for somebody: the rows are exchanged for a random half of
    the people, again and again, and the areas of the two mixtures compared. Scores become ranks within their row first,
    so that a bold row and a shy one can be mixed (Venkatraman and Begg, Biometrika 83 (1996) 835-848, there by window).
    The observed rows count as one of the exchanges.

    Args:
        label, person: ``[n]``.
        one, other: probabilities ``[n, class]`` of the same windows.

    Returns:
        NaN with fewer than two people, and where a class is missing everywhere.
    """
    people = len(np.unique(person))
    if people < 2:
        return math.nan
    kept = np.concatenate([np.zeros((1, people)), _permutations(people)])
    swapped = 1.0 - kept
    found = []
    for c in positive_classes(one.shape[1]):
        positive = label == c
        a, b = rankdata(one[:, c]), rankdata(other[:, c])
        aa, bb = compare_pairs(positive, person, a), compare_pairs(positive, person, b)
        ab, ba = compare_pairs(positive, person, a, b), compare_pairs(positive, person, b, a)
        total = float(aa.positives.sum() * aa.negatives.sum())
        own, mixed = aa.win_matrix - bb.win_matrix, ab.win_matrix - ba.win_matrix

        def form(left: Floats, matrix: Floats, right: Floats) -> Floats:
            return np.asarray(((left @ matrix) * right).sum(axis=1))

        gap = form(swapped, own, swapped) - form(kept, own, kept)
        gap += form(swapped, mixed, kept) - form(kept, mixed, swapped)
        found.append(ratio(gap, np.full(len(gap), total)))
    gaps = np.abs(mean_of_finite(np.stack(found)))
    if not np.isfinite(gaps[0]):
        return math.nan
    return float((gaps >= gaps[0] - 1e-12).mean())


def compared(names: Iterable[str]) -> list[tuple[str, str]]:
    """Which rows of results are held against which others: ``(row, minus)``."""
    known = list(names)
    fused = [("fused", name) for name in known if name not in ("fused", "majority") and not name.startswith("bound_")]
    single = [(name, against) for name, against in _AGAINST.items() if name in known and against in known]
    return (fused if "fused" in known else []) + single


def mean_of_finite(values: Floats) -> Floats:
    """Mean over the first axis of what is finite; NaN where nothing is."""
    finite = np.isfinite(values)
    count = finite.sum(axis=0)
    total = np.where(finite, values, 0.0).sum(axis=0)
    return ratio(total, count.astype(np.float64))


def ratio(part: Floats, whole: Floats) -> Floats:
    """Quotients, NaN where there is nothing to divide by."""
    made: Floats = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
    return made


def _raw(purpose: bytes, count: int) -> npt.NDArray[np.uint64]:
    # Raw output is fixed by the generator's specification; numpy's ways of drawing from it may change.
    key = int.from_bytes(hashlib.sha256(purpose).digest()[:8], "little")
    return np.asarray(np.random.Philox(key=key).random_raw(count), np.uint64)


def _resampled(people: int) -> Floats:
    """How often each person is drawn in each repeat, ``[repeat, person]``: the same for every pair of rows."""
    raw = _raw(b"report, people drawn again", RESAMPLES * people)
    drawn = (raw % np.uint64(people)).astype(np.int64).reshape(RESAMPLES, people)
    counts = np.zeros((RESAMPLES, people))
    np.add.at(counts, (np.arange(RESAMPLES)[:, None], drawn), 1.0)
    return counts


def _permutations(people: int) -> Floats:
    """Whose rows are exchanged in each repeat, 0 or 1 ``[repeat, person]``."""
    raw = _raw(b"rows of people exchanged", PERMUTATIONS * people)
    return np.asarray(raw >> np.uint64(63), np.float64).reshape(PERMUTATIONS, people)
