"""Results of a study as the files that hold them: ``results.json`` and ``predictions.safetensors``."""

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
from physio_dist.runs.sweep_results import FoldResult, PermutationControl, ResultRow, RowDifference, Scores
from physio_dist.stats.auc import compare_all_pairs, compared, difference, p_of_no_difference
from physio_dist.stats.scores import METRICS, auc_interval, calibration_error, confusion, score

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]

_DIGITS = 6


@dataclass(frozen=True)
class Row:
    """One line of the table of results, before anything is computed from it.

    Attributes:
        name: of the row.
        modalities: what it is given.
        probability: for each fold ``[test row, class]``.
        config: for each fold what was selected, or None.
        epoch: for each fold the epoch that was selected, or None.
        uncalibrated: the same before temperatures were fitted; None where none were.
    """

    name: str
    modalities: tuple[str, ...]
    probability: Sequence[Floats]
    config: Sequence[dict[str, Any] | None]
    epoch: Sequence[int | None]
    uncalibrated: Sequence[Floats] | None = None


@dataclass(frozen=True)
class Outcome:
    """``results.json`` as an object, the bytes of ``predictions.safetensors``, and those of ``embedding.safetensors``
    where frozen features are known."""

    results: dict[str, Any]
    predictions: bytes
    embedding: bytes | None = None


def row_of(row: Row, table: LabelTable, folds: Sequence[Fold], seed: int) -> ResultRow:
    """A row of ``results.json``: metrics over all test windows together, for each fold, and their spread over folds."""
    tested = np.concatenate([fold.test for fold in folds])
    label, probability = table.label[tested], np.concatenate(list(row.probability))
    per_fold = [
        FoldResult(
            fold=fold.name,
            people=len(np.unique(table.person[fold.test])),
            windows=len(fold.test),
            **_rounded(score(table.label[fold.test], each)),
            config=config,
            epoch=epoch,
        )
        for fold, each, config, epoch in zip(folds, row.probability, row.config, row.epoch, strict=True)
    ]
    interval = auc_interval(label, probability, table.person[tested], seed)
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


def differences(rows: Sequence[Row], table: LabelTable, folds: Sequence[Fold]) -> list[RowDifference]:
    """Pooled AUCs of rows minus those of others, on the same people."""
    tested = np.concatenate([fold.test for fold in folds])
    label, person = table.label[tested], table.person[tested]
    # As predictions.safetensors has them, so that whoever reads it finds the same.
    given = {row.name: np.concatenate(list(row.probability)).astype(np.float32).astype(np.float64) for row in rows}
    pairs = {name: compare_all_pairs(label, person, probability) for name, probability in given.items()}
    found = []
    for name, minus in compared(given):
        one = difference(pairs[name], pairs[minus])
        p = p_of_no_difference(label, person, given[name], given[minus])
        interval = None if math.isnan(one.low) else (round(one.low, _DIGITS), round(one.high, _DIGITS))
        found.append(RowDifference(name, minus, round(one.value, _DIGITS), interval, round(p, _DIGITS)))
    return found


def _rounded(scores: Mapping[str, float | None]) -> dict[str, Any]:
    return {name: math.nan if value is None else round(value, _DIGITS) for name, value in scores.items()}


def _spread(values: Sequence[float]) -> float:
    """Standard deviation over the folds in which a metric is defined."""
    known = [value for value in values if math.isfinite(value)]
    return round(float(np.std(known, ddof=1)), _DIGITS) if len(known) > 1 else math.nan


def majority(table: LabelTable, folds: Sequence[Fold]) -> Row:
    """What one knows without any signal: how frequent the classes are among the fold's training people."""
    probability = []
    for fold in folds:
        shares = np.bincount(table.label[fold.train], minlength=len(table.classes)) / len(fold.train)
        probability.append(np.tile(shares, (len(fold.test), 1)))
    return Row("majority", (), probability, [None] * len(folds), [None] * len(folds))


def oracle_rows(table: LabelTable, folds: Sequence[Fold]) -> list[Row]:
    """The best that the hidden state of simulated signals allows, for each signal and for both together.

    What is simulated depends on its class through one drive a signal, drawn around a mean of the class with an equal
    spread. For somebody who could read the drives the best guess is Bayes' rule with those means and that spread (for
    two classes a logistic function of drive x D / variance, D the difference of the means), taken here from all of the
    table; drives are independent given the class, so the log-likelihoods of both add up.
    """
    if not table.simulated_drive:
        return []
    classes = len(table.classes)
    prior = np.log(np.bincount(table.label, minlength=classes) / len(table.label))
    evidence = {}
    for signal, drive in table.simulated_drive.items():
        means = np.array([drive[table.label == one].mean() for one in range(classes)])
        variance = float(np.mean((drive - means[table.label]) ** 2))
        # Drives without any spread tell the class for sure.
        evidence[signal] = -((drive[:, None] - means) ** 2) / (2 * max(variance, 1e-12))
    ways: dict[str, tuple[str, ...]] = {"bound_ecg": ("ecg",), "bound_eeg": ("eeg",), "bound_fused": ("ecg", "eeg")}
    rows = []
    for name, signals in ways.items():
        logits = prior + sum(evidence[signal] for signal in signals)
        shares = np.exp(logits - logits.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        none = [None] * len(folds)
        rows.append(Row(name, signals, [shares[fold.test] for fold in folds], none, none))
    return rows


def permuted_part(observed: float, areas: Sequence[float]) -> PermutationControl:
    """The control in ``results.json``: p counts the observed labels as one of the permutations.

    ``p_leak`` is of a one-sided t test that the permuted AUCs have a mean above 0.5: labels that mean nothing are told
    apart only by what the same person or recording brings to both sides of a split.
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
    """``predictions.safetensors``: every test window once, in the table's order, with what each row says about it."""
    tested = np.concatenate([fold.test for fold in folds])
    number = np.concatenate([np.full(len(fold.test), i, dtype=np.int64) for i, fold in enumerate(folds)])
    order = np.argsort(tested, kind="stable")
    mine = tested[order]
    tensors: dict[str, npt.NDArray[Any]] = {
        "fold": number[order],
        "person": table.person[mine],
        "recording": table.recording[mine],
        "label": table.label[mine],
        "key": key_table([table.keys[i] for i in mine]),
    }
    for row in rows:
        tensors[f"probability.{row.name}"] = np.concatenate(list(row.probability))[order].astype(np.float32)
    about = {"classes": json.dumps(list(table.classes)), "folds": json.dumps([fold.name for fold in folds])}
    return same_bytes(save_safetensors({name: np.ascontiguousarray(t) for name, t in tensors.items()}, metadata=about))


def same_bytes(data: bytes) -> bytes:
    """A safetensors file with its header in order: the library writes metadata in the order of a random hash."""
    length = int.from_bytes(data[:8], "little")
    text = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    header = text.encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]
