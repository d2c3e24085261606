"""Results of a study and their files: ``results.json`` and ``predictions.safetensors``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as save_safetensors
from scipy.stats import ttest_1samp

from physio_dist.data.format.sample_table import key_table
from physio_dist.evaluation.label_table import LabelTable
from physio_dist.evaluation.splits import Fold
from physio_dist.evaluation.trained_heads import TrainedHeads
from physio_dist.runs.sweep_results import FoldResult, PermutationControl, ResultRow, RowDifference, Scores
from physio_dist.runtime.arrays import Float64Array, FloatArray, Int64Array
from physio_dist.stats.auc import PairwiseComparisons, compare_all_pairs
from physio_dist.stats.bootstrap import auc_difference, auc_interval, compared_rows
from physio_dist.stats.permutation import permutation_p_value
from physio_dist.stats.scores import METRICS, calibration_error, confusion, score

_DIGITS = 6


@dataclass(frozen=True)
class Row:
    """Predictions of one row of the table of results.

    Attributes:
        name: of the row.
        modalities: its inputs.
        probability: for each fold ``[test row, class]``.
        config: for each fold the selected configuration, or None.
        epoch: for each fold the selected epoch, or None.
        uncalibrated: ``probability`` before temperatures were fitted; None where none were.
    """

    name: str
    modalities: tuple[str, ...]
    probability: Sequence[FloatArray]
    config: Sequence[dict[str, Any] | None]
    epoch: Sequence[int | None]
    uncalibrated: Sequence[FloatArray] | None = None


@dataclass(frozen=True)
class Outcome:
    """Files of a finished study.

    Attributes:
        results: content of ``results.json``.
        predictions: bytes of ``predictions.safetensors``.
        fused: heads of the fused row, from which the classifier is made.
        embedding: bytes of ``embedding.safetensors``; None for a study without frozen features.
    """

    results: dict[str, Any]
    predictions: bytes
    fused: TrainedHeads
    embedding: bytes | None = None


def tested_rows(folds: Sequence[Fold]) -> Int64Array:
    """Rows of the table that are tested, fold after fold."""
    return np.concatenate([fold.test for fold in folds])


def pooled_probability(row: Row) -> Float64Array:
    """Probabilities of a row over all folds, ``[test row, class]``, rounded as in ``predictions.safetensors``."""
    return np.concatenate(list(row.probability)).astype(np.float32).astype(np.float64)


def compare_rows(rows: Sequence[Row], table: LabelTable, folds: Sequence[Fold]) -> dict[str, list[PairwiseComparisons]]:
    """Pairwise comparisons of each row's test windows, by its name."""
    tested = tested_rows(folds)
    label, person = table.label[tested], table.person[tested]
    return {row.name: compare_all_pairs(label, person, pooled_probability(row)) for row in rows}


def row_result(
    row: Row, table: LabelTable, folds: Sequence[Fold], pairs: Sequence[PairwiseComparisons]
) -> ResultRow:  # fmt: skip
    """A row of ``results.json``: metrics over all test windows together, for each fold, and their spread over folds."""
    tested = tested_rows(folds)
    label, probability = table.label[tested], np.concatenate(list(row.probability))
    per_fold = [
        FoldResult(
            fold=fold.name,
            people=len(np.unique(table.person[fold.test])),
            windows=len(fold.test),
            **_rounded(score(table.label[fold.test], fold_probability)),
            config=config,
            epoch=epoch,
        )
        for fold, fold_probability, config, epoch in zip(folds, row.probability, row.config, row.epoch, strict=True)
    ]
    interval = auc_interval(pairs)
    errors = {"ece": calibration_error(label, probability)}
    if row.uncalibrated is not None:
        errors["ece_before"] = calibration_error(label, np.concatenate(list(row.uncalibrated)))
    return ResultRow(
        name=row.name,
        modalities=list(row.modalities),
        **_rounded(score(label, probability)),
        **_rounded(errors),
        auc_ci=None if interval is None else (round(interval[0], _DIGITS), round(interval[1], _DIGITS)),
        per_fold=per_fold,
        spread=Scores(**{name: _spread([getattr(fold, name) for fold in per_fold]) for name in METRICS}),
        confusion=confusion(label, probability),
    )


def differences(
    rows: Sequence[Row], table: LabelTable, folds: Sequence[Fold], pairs: Mapping[str, Sequence[PairwiseComparisons]]
) -> list[RowDifference]:  # fmt: skip
    """Differences of pooled AUCs between rows, on the same people."""
    tested = tested_rows(folds)
    label, person = table.label[tested], table.person[tested]
    probability = {row.name: pooled_probability(row) for row in rows}
    entries = []
    for name, minus in compared_rows(probability):
        difference = auc_difference(pairs[name], pairs[minus])
        p = permutation_p_value(label, person, probability[name], probability[minus])
        low, high = round(difference.low, _DIGITS), round(difference.high, _DIGITS)
        interval = None if math.isnan(low) else (low, high)
        entries.append(RowDifference(name, minus, round(difference.value, _DIGITS), interval, round(p, _DIGITS)))
    return entries


def _rounded(scores: Mapping[str, float | None]) -> dict[str, Any]:
    return {name: math.nan if value is None else round(value, _DIGITS) for name, value in scores.items()}


def _spread(values: Sequence[float]) -> float:
    """Standard deviation over the folds in which a metric is defined."""
    defined = [value for value in values if math.isfinite(value)]
    return round(float(np.std(defined, ddof=1)), _DIGITS) if len(defined) > 1 else math.nan


def majority(table: LabelTable, folds: Sequence[Fold]) -> Row:
    """Baseline without any signal: class frequencies among the fold's training people."""
    probability = []
    for fold in folds:
        shares = np.bincount(table.label[fold.train], minlength=len(table.classes)) / len(fold.train)
        probability.append(np.tile(shares, (len(fold.test), 1)))
    return Row("majority", (), probability, [None] * len(folds), [None] * len(folds))


def oracle_rows(table: LabelTable, folds: Sequence[Fold]) -> list[Row]:
    """Upper bounds on simulated signals: Bayes' rule given the simulator's drives, for each signal and for both.

    A simulated signal depends on the class through one drive, drawn around a mean of the class with equal variance.
    Given the drives, the optimal prediction is Bayes' rule with those means and that variance (for two classes a
    logistic function of drive x D / variance, D the difference of the means), estimated here from the whole table;
    drives are independent given the class, so their log-likelihoods add up.
    """
    if not table.simulated_drive:
        return []
    classes = len(table.classes)
    prior = np.log(np.bincount(table.label, minlength=classes) / len(table.label))
    evidence = {}
    for signal, drive in table.simulated_drive.items():
        means = np.array([drive[table.label == c].mean() for c in range(classes)])
        variance = float(np.mean((drive - means[table.label]) ** 2))
        # Drives without variance determine the class.
        evidence[signal] = -((drive[:, None] - means) ** 2) / (2 * max(variance, 1e-12))
    inputs: dict[str, tuple[str, ...]] = {"bound_ecg": ("ecg",), "bound_eeg": ("eeg",), "bound_fused": ("ecg", "eeg")}
    rows = []
    for name, signals in inputs.items():
        logits = prior + sum(evidence[signal] for signal in signals)
        posterior = np.exp(logits - logits.max(axis=1, keepdims=True))
        posterior /= posterior.sum(axis=1, keepdims=True)
        none = [None] * len(folds)
        rows.append(Row(name, signals, [posterior[fold.test] for fold in folds], none, none))
    return rows


def permutation_control(observed: float, areas: Sequence[float]) -> PermutationControl:
    """``permuted`` in ``results.json``: AUCs with labels permuted by recording within people.

    ``p`` counts the observed labels as one of the permutations. ``p_leak`` is the p value of a one-sided t test that
    the permuted AUCs have a mean above 0.5: permuted labels can only be predicted from a person or recording that is on
    both sides of a split.
    """
    reached = sum(area >= observed for area in areas)
    return PermutationControl(
        n=len(areas),
        auc=[round(area, _DIGITS) for area in areas],
        mean=round(float(np.mean(areas)), _DIGITS) if areas else math.nan,
        p_leak=_above_chance(areas),
        p=math.nan if math.isnan(observed) or not areas else round((1 + reached) / (len(areas) + 1), _DIGITS),
    )


def _above_chance(areas: Sequence[float]) -> float:
    if len(areas) < 2 or np.ptp(areas) == 0:
        return math.nan
    return float(f"{ttest_1samp(areas, 0.5, alternative='greater').pvalue:.3g}")


def predictions(rows: Sequence[Row], table: LabelTable, folds: Sequence[Fold]) -> bytes:
    """``predictions.safetensors``: every test window once, in the table's order, with each row's probabilities."""
    tested = tested_rows(folds)
    number = np.concatenate([np.full(len(fold.test), i, dtype=np.int64) for i, fold in enumerate(folds)])
    order = np.argsort(tested, kind="stable")
    rows_in_order = tested[order]
    tensors: dict[str, npt.NDArray[Any]] = {
        "fold": number[order],
        "person": table.person[rows_in_order],
        "recording": table.recording[rows_in_order],
        "label": table.label[rows_in_order],
        "key": key_table([table.keys[i] for i in rows_in_order]),
    }
    for row in rows:
        tensors[f"probability.{row.name}"] = np.concatenate(list(row.probability))[order].astype(np.float32)
    about = {"classes": json.dumps(list(table.classes)), "folds": json.dumps([fold.name for fold in folds])}
    return canonical_bytes(
        save_safetensors({name: np.ascontiguousarray(t) for name, t in tensors.items()}, metadata=about)
    )


def canonical_bytes(data: bytes) -> bytes:
    """Sort the header of a safetensors file: the library writes metadata in the order of a random hash."""
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    header = text.encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
