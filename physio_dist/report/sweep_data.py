"""Files of a sweep, and statistics of its predictions on held-out windows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from sklearn.metrics import precision_recall_curve, roc_curve

from physio_dist.errors import DataError, UserError
from physio_dist.report.run_data import Reader, RunInfo, load_info, metadata_of
from physio_dist.runs.sweep_results import (
    BOUND,
    EMBEDDING,
    PREDICTIONS,
    RESULTS,
    TRIALS,
    EmbeddingSummary,
    NeighbourShares,
    ResultRow,
    SweepResults,
    TrialResult,
)
from physio_dist.runs.typed_json import from_json, parse_json, parse_lines, printable
from physio_dist.runtime.arrays import Float64Array, Int64Array, UInt64Array
from physio_dist.stats.auc import (
    PairwiseComparisons,
    compare_all_pairs,
    mean_of_finite,
    positive_classes,
    ratio,
)
from physio_dist.stats.bootstrap import Difference, auc_difference, compared_rows
from physio_dist.stats.permutation import permutation_p_value

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "pr_auc")
# Rows that every sweep reports, from the least informed to the one the sweep is about.
ROWS = ("majority", "untrained", "handmade", "ecg", "eeg", "fused")
# Probabilities are stored as float32.
SUM_TOLERANCE = 1e-3
REMEDY = "run the sweep again, or put back the files that belong together"


@dataclass(frozen=True)
class Predictions:
    """Every held-out window once.

    ``fold``, ``label``: int64 ``[n]``, numbers of ``folds`` and of the classes; ``person``: uint64 ``[n]``;
    ``probability``: row name -> float64 ``[n, class]``. Rows with a value that is no number are in ``broken``.
    """

    fold: Int64Array
    person: UInt64Array
    label: Int64Array
    probability: dict[str, Float64Array]
    folds: list[str]
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Plane:
    """Windows of a signal in two dimensions.

    Attributes:
        place: float64 ``[n, 2]``.
        person, label: uint64 and int64 ``[n]``.
        shares: of the nearest neighbours of a window in all dimensions.
    """

    place: Float64Array
    person: UInt64Array
    label: Int64Array
    shares: NeighbourShares


@dataclass(frozen=True, kw_only=True)
class Sweep(RunInfo):
    """A sweep; what it lacks is None or empty. ``unfinished``: its last trial was still being written."""

    results: SweepResults
    classes: list[str]
    predictions: Predictions | None = None
    trials: list[TrialResult] = field(default_factory=list)
    unfinished: bool = False
    planes: dict[str, Plane] = field(default_factory=dict)

    @cached_property
    def held(self) -> HeldOut | None:
        """Statistics of the predictions; None without predictions."""
        return None if self.predictions is None else HeldOut.of(self.predictions)

    def row(self, name: str) -> ResultRow | None:
        """The row of this name, or None."""
        return next((row for row in self.results.rows if row.name == name), None)

    def bound(self, row: ResultRow) -> ResultRow | None:
        """The best possible result with this row's signals, from the hidden state of simulated people, or None."""
        if row.name.startswith(BOUND) or not row.modalities:
            return None
        kinds = sorted(row.modalities)
        return self.row(BOUND + (kinds[0] if len(kinds) == 1 else "fused"))

    @property
    def real_rows(self) -> list[ResultRow]:
        """All rows but the bounds."""
        return [row for row in self.results.rows if not row.name.startswith(BOUND)]

    @property
    def permuted_auc(self) -> Float64Array:
        """Finite AUCs under permuted labels; empty without that control."""
        auc = [] if self.results.permuted is None else self.results.permuted.auc
        return np.array([value for value in auc if math.isfinite(value)])

    def simulated(self) -> list[bool]:
        """Flags of simulated signals, of the results or else of each data set; empty where unknown."""
        flag = self.results.simulated
        return super().simulated() if flag is None else [flag]


def load_sweep(read: Reader) -> Sweep:
    """Read a sweep; ``read(name)`` returns the bytes of a file or None.

    Raises:
        UserError: there are no results, or a file is damaged; the message names the file (and the line or field).
        DataError: two files contradict each other.
    """
    raw, stored = read(RESULTS), read(PREDICTIONS)
    if raw is None:
        raise UserError(f"{RESULTS} is not in the run directory: a sweep writes it when it is done")
    results = from_json(SweepResults, parse_json(raw, RESULTS), RESULTS)
    classes, predictions = results.classes, None
    if stored is not None:
        predictions, names = parse_predictions(stored)
        classes = classes or names
        _require_same_sweep(results, classes, predictions, names)
    _check_rows(results.rows, len(classes))
    trials, unfinished = parse_trials(read(TRIALS))
    return Sweep(
        **load_info(read),
        results=results,
        classes=classes,
        predictions=predictions,
        trials=trials,
        unfinished=unfinished,
        planes=parse_planes(read(EMBEDDING), results.embedding or EmbeddingSummary(), len(classes)),
    )


def parse_trials(raw: bytes | None) -> tuple[list[TrialResult], bool]:
    """Lines of ``trials.jsonl``, and whether the last was still being written; ``UserError`` names a damaged line."""
    return parse_lines(raw, TRIALS, lambda document, where: from_json(TrialResult, document, where))


def parse_predictions(raw: bytes) -> tuple[Predictions, list[str]]:
    """The held-out windows and the names of their classes.

    Raises ``UserError`` where tensors are missing or no tensors at all, ``DataError`` where they disagree with each
    other: in length, in the number of classes, in a label or fold beyond the names, in probabilities that do not
    add up to one.
    """
    try:
        tensors, meta = load_tensors(raw), metadata_of(raw)
        classes = [printable(name) for name in json.loads(meta["classes"])]
        folds = [printable(name) for name in json.loads(meta["folds"])]
        fold, person, label = tensors["fold"], tensors["person"], tensors["label"]
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{PREDICTIONS} cannot be read ({type(error).__name__}: {error})") from error
    prefix = "probability."
    tables = {name.removeprefix(prefix): table for name, table in tensors.items() if name.startswith(prefix)}
    tables = {printable(name): tables[name].astype(np.float64) for name in sorted(tables)}
    shapes = {table.shape for table in tables.values()}
    if label.ndim != 1 or not label.size or fold.shape != label.shape or person.shape != label.shape or not tables:
        shapes_by_name = {key: list(value.shape) for key, value in sorted(tensors.items())}
        raise DataError(f"{PREDICTIONS}: shapes disagree or windows are missing: {shapes_by_name}; {REMEDY}")
    if shapes != {(label.size, len(classes))}:
        shapes_by_name = {name: list(table.shape) for name, table in tables.items()}
        sizes = f"{label.size} windows and {len(classes)} classes"
        raise DataError(f"{PREDICTIONS}: {sizes}, but probabilities {shapes_by_name}; {REMEDY}")
    for name, values, most in (("label", label, len(classes)), ("fold", fold, len(folds))):
        if values.dtype.kind not in "iu" or int(values.min()) < 0 or int(values.max()) >= most:
            raise DataError(f"{PREDICTIONS}: tensor {name!r} has values that are not in 0..{most - 1}; {REMEDY}")
    broken = [name for name, table in tables.items() if not np.isfinite(table).all()]
    for name in broken:
        del tables[name]
    for name, table in tables.items():
        if table.min() < 0 or np.abs(table.sum(axis=1) - 1).max() > SUM_TOLERANCE:
            raise DataError(
                f"{PREDICTIONS}: the probabilities of {name!r} are negative or do not add up to 1; {REMEDY}"
            )
    predictions = Predictions(
        fold.astype(np.int64), person.astype(np.uint64), label.astype(np.int64), tables, folds, broken
    )
    return predictions, classes


def parse_planes(raw: bytes | None, summary: EmbeddingSummary, classes: int) -> dict[str, Plane]:
    """Signal -> its plane from ``embedding.safetensors`` (None: no file).

    Raises:
        UserError: the file is damaged.
        DataError: tensors disagree with each other.
    """
    if raw is None:
        return {}
    try:
        tensors = load_tensors(raw)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{EMBEDDING} cannot be read ({type(error).__name__}: {error})") from error
    planes = {}
    for signal in sorted(key.removesuffix(".place") for key in tensors if key.endswith(".place")):
        place, person, label = (tensors.get(f"{signal}.{name}", np.zeros(0)) for name in ("place", "person", "label"))
        n = len(place)
        if not n or place.shape != (n, 2) or not person.shape == label.shape == (n,) or not np.isfinite(place).all():
            raise DataError(f"{EMBEDDING}: the tensors of {signal!r} do not fit each other; {REMEDY}")
        if int(label.min()) < 0 or int(label.max()) >= classes:
            raise DataError(f"{EMBEDDING}: {signal}.label has values that are not in 0..{classes - 1}; {REMEDY}")
        shares = {"ecg": summary.ecg, "eeg": summary.eeg}.get(signal) or NeighbourShares()
        planes[printable(signal)] = Plane(
            place.astype(np.float64), person.astype(np.uint64), label.astype(np.int64), shares
        )
    return planes


def _check_rows(rows: Sequence[ResultRow], classes: int) -> None:
    """Raise ``UserError`` where there are no rows, two have one name, or a confusion matrix is not square."""
    names = [row.name for row in rows]
    if not rows:
        raise UserError(f"{RESULTS}: rows is empty; {REMEDY}")
    if len(set(names)) < len(names):
        raise UserError(f"{RESULTS}: two rows have the same name: {', '.join(sorted(names))}")
    for row in rows:
        table = row.confusion or []
        k = classes or len(table)
        if row.confusion is not None and (
            [len(counts) for counts in table] != [k] * k or min(count for counts in table for count in counts) < 0
        ):
            raise UserError(f"{RESULTS}, row {row.name!r}: confusion is not a square table of counts for {k} classes")


def _require_same_sweep(
    results: SweepResults, classes: list[str], predictions: Predictions, stored_classes: list[str]
) -> None:
    """Raise ``DataError`` where the predictions are of another sweep than the results."""
    for name, stated, stored in (
        ("windows", results.windows, int(predictions.label.size)),
        ("people", results.people, len(np.unique(predictions.person))),
    ):
        if stated is not None and stated != stored:
            raise DataError(
                f"{PREDICTIONS} holds {stored:,} {name} and {RESULTS} speaks of {stated:,}: they are not of the same "
                f"sweep; {REMEDY}"
            )
    if classes != stored_classes:
        raise DataError(f"{PREDICTIONS} has the classes {stored_classes} and {RESULTS} has {classes}; {REMEDY}")


@dataclass(frozen=True)
class Reliability:
    """Windows in bins of equal width by a probability: their number, its mean and the observed frequency (NaN in an
    empty bin), ``[bin]`` each."""

    count: Int64Array
    probability: Float64Array
    frequency: Float64Array


@dataclass(frozen=True)
class People:
    """Held-out people, ascending by pseudonym.

    ``names``: the first digits of their pseudonyms, as many as tell them apart, at least six. ``fold``, ``windows``
    ``[person]``; ``accuracy``, ``auc``: row name -> ``[person]``, NaN where undefined.
    """

    names: list[str]
    fold: list[str]
    windows: Int64Array
    accuracy: dict[str, Float64Array]
    auc: dict[str, Float64Array]


@dataclass(frozen=True)
class HeldOut:
    """The predictions and what several sections need of them; ``pairs``: row name -> one entry a class with a curve;
    ``differences``: what a row adds to those that it is held against, by (row, minus)."""

    predictions: Predictions
    pairs: dict[str, list[PairwiseComparisons]]
    people: People
    differences: dict[tuple[str, str], Difference]

    @classmethod
    def of(cls, predictions: Predictions) -> HeldOut:
        """Everything computed once."""
        pairs = {
            row: compare_all_pairs(predictions.label, predictions.person, probability)
            for row, probability in predictions.probability.items()
        }
        return cls(predictions, pairs, people_of(predictions, pairs), _differences(predictions, pairs))


def _differences(
    predictions: Predictions, pairs: dict[str, list[PairwiseComparisons]]
) -> dict[tuple[str, str], Difference]:
    result = {}
    for row, minus in compared_rows(pairs):
        ours, other = predictions.probability[row], predictions.probability[minus]
        p = permutation_p_value(predictions.label, predictions.person, ours, other)
        result[row, minus] = replace(auc_difference(pairs[row], pairs[minus]), p=p)
    return result


def people_of(predictions: Predictions, pairs: dict[str, list[PairwiseComparisons]]) -> People:
    """Accuracy and area of each person, for the rows of ``pairs``."""
    people, first, owner = np.unique(predictions.person, return_index=True, return_inverse=True)
    windows = np.bincount(owner)
    accuracy = {}
    for row in pairs:
        right = predictions.probability[row].argmax(axis=1) == predictions.label
        accuracy[row] = np.bincount(owner, weights=right) / windows
    auc = {row: mean_of_finite(np.stack([one.of_each_person() for one in many])) for row, many in pairs.items()}
    folds = [predictions.folds[number] for number in predictions.fold[first]]
    return People(_short([f"{person:016x}" for person in people.tolist()]), folds, windows, accuracy, auc)


def roc(predictions: Predictions, row: str, positive: int) -> tuple[Float64Array, Float64Array]:
    """Rates of false and of true positives, from (0, 0) to (1, 1)."""
    x, y, _ = roc_curve(predictions.label == positive, predictions.probability[row][:, positive])
    return np.asarray(x, np.float64), np.asarray(y, np.float64)


def mean_roc(predictions: Predictions, row: str, classes: Sequence[int]) -> tuple[Float64Array, Float64Array]:
    """The mean over classes of the rate of true positives at the same rate of false ones."""
    x = np.linspace(0.0, 1.0, 501)
    heights = [np.interp(x, *roc(predictions, row, positive)) for positive in classes]
    y = np.mean(heights, axis=0)
    return np.concatenate([[0.0], x]), np.concatenate([[0.0], y])


def precision_recall(predictions: Predictions, row: str, positive: int) -> tuple[Float64Array, Float64Array]:
    """Recall and precision, from the first positive window on: before it there is no precision to speak of."""
    precision, recall, _ = precision_recall_curve(
        predictions.label == positive, predictions.probability[row][:, positive]
    )
    positive_recall = recall[::-1] > 0
    return np.asarray(recall[::-1][positive_recall], np.float64), np.asarray(
        precision[::-1][positive_recall], np.float64
    )


def reliability(predictions: Predictions, row: str, bins: int = 10) -> Reliability:
    """Bins by probability: of two classes that of the second, of more that of the predicted one."""
    probability = predictions.probability[row]
    sure, hit = probability[:, 1], predictions.label == 1
    if probability.shape[1] > 2:
        sure, hit = probability.max(axis=1), probability.argmax(axis=1) == predictions.label
    place = np.minimum((sure * bins).astype(np.int64), bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = [np.asarray(np.bincount(place, weights=x, minlength=bins), np.float64) for x in (sure, hit)]
    means = [ratio(total, count.astype(np.float64)) for total in sums]
    return Reliability(count.astype(np.int64), *means)


def present(predictions: Predictions, classes: int) -> list[int]:
    """Classes that get a curve and that some windows have and others have not."""
    count = np.bincount(predictions.label, minlength=classes)
    return [c for c in positive_classes(classes) if 0 < count[c] < predictions.label.size]


def _short(pseudonyms: list[str]) -> list[str]:
    digits = 6
    while digits < 16 and len({name[:digits] for name in pseudonyms}) < len(pseudonyms):
        digits += 1
    return [name[:digits] for name in pseudonyms]
