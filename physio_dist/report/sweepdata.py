"""What the directory of a sweep holds, parsed and checked: results, predictions, trials."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from physio_dist.errors import DataError, UserError
from physio_dist.report.insight import AGAIN, EMBEDDING, Leaned, Plane, parse_leaned, parse_planes
from physio_dist.report.rundata import Floats, Given, Reader, load_given, printable

Ints = NDArray[np.int64]

RESULTS, PREDICTIONS, TRIALS = "results.json", "predictions.safetensors", "trials.jsonl"
METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "auc", "pr_auc")
# Those that every sweep reports, from the least informed to the one the sweep is about.
ROWS = ("majority", "untrained", "handmade", "ecg", "eeg", "fused")
BOUND = "bound_"
# Probabilities are stored as float32.
SUM_TOLERANCE = 1e-3


@dataclass(frozen=True)
class FoldResult:
    """A row on the held-out people of one fold; None where results.json does not tell."""

    fold: str
    people: int | None
    windows: int | None
    scores: dict[str, float]
    config: dict[str, Any] | None
    epoch: int | None


@dataclass(frozen=True)
class Row:
    """One kind of input over all held-out people.

    ``scores`` has all of ``METRICS``, NaN where undefined; ``interval`` is that of the AUC, NaN where unknown;
    ``spread`` is the standard deviation over folds; ``confusion`` counts, ``[true class, predicted class]``; ``ece`` is
    the expected calibration error, NaN where not told, ``ece_before`` that before temperatures were fitted.
    """

    name: str
    modalities: tuple[str, ...]
    scores: dict[str, float]
    interval: tuple[float, float]
    folds: list[FoldResult]
    spread: dict[str, float]
    confusion: Ints | None
    ece: float = math.nan
    ece_before: float = math.nan


@dataclass(frozen=True)
class Permuted:
    """AUCs under permuted labels, NaNs left out; the p value of the observed one, and that of their mean being above
    chance, which tells of a leak (NaN where unknown)."""

    auc: Floats
    p: float
    p_leak: float = math.nan


@dataclass(frozen=True)
class Predictions:
    """Every held-out window once.

    ``fold``, ``label``: int64 ``[n]``, numbers of ``folds`` and of the classes; ``person``: uint64 ``[n]``;
    ``probability``: row name -> float64 ``[n, class]``. Rows with a value that is no number are in ``broken``.
    """

    fold: Ints
    person: NDArray[np.uint64]
    label: Ints
    probability: dict[str, Floats]
    folds: list[str]
    broken: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Trial:
    """One configuration for one row; ``val_auc`` NaN where it never came to a result."""

    row: str
    config: dict[str, Any]
    val_auc: float
    epochs: int
    stopped: bool
    seconds: float
    history: list[tuple[float, float]]


@dataclass(frozen=True)
class Sweep(Given):
    """The directory of a sweep in memory; what it lacks is None or empty."""

    results: dict[str, Any]
    rows: list[Row]
    classes: list[str]
    permuted: Permuted | None = None
    predictions: Predictions | None = None
    trials: list[Trial] = field(default_factory=list)
    unfinished: bool = False
    leaned: Leaned | None = None
    planes: dict[str, Plane] = field(default_factory=dict)

    def row(self, name: str) -> Row | None:
        """The row of this name, or None."""
        return next((row for row in self.rows if row.name == name), None)

    def bound(self, row: Row) -> Row | None:
        """The best that simulated people's hidden state allows with this row's signals, or None."""
        if row.name.startswith(BOUND) or not row.modalities:
            return None
        kinds = sorted(row.modalities)
        return self.row(BOUND + (kinds[0] if len(kinds) == 1 else "fused"))

    @property
    def real_rows(self) -> list[Row]:
        """All rows but the bounds."""
        return [row for row in self.rows if not row.name.startswith(BOUND)]

    def count(self, key: str) -> int | None:
        """``windows``, ``people`` or ``folds``, which may be told as a number or as a list."""
        return _count(self.results.get(key))

    def word(self, key: str) -> str:
        """A text of results.json, empty where it tells none."""
        value = self.results.get(key)
        return printable(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ""

    def simulated(self) -> list[bool]:
        """Every statement the sweep makes on whether its signals are simulated; empty if it makes none."""
        told = self.results.get("simulated")
        return [told] if isinstance(told, bool) else super().simulated()


def load_sweep(read: Reader) -> Sweep:
    """Parse all files of a sweep's directory.

    ``read(name)`` returns the bytes of a file or None. Raises ``UserError``, naming the file (and the line, row or
    tensor), where there are no results or a file cannot be understood, and ``DataError`` where two files contradict
    each other.
    """
    given = load_given(read)
    raw = read(RESULTS)
    if raw is None:
        raise UserError(f"{RESULTS} is not in the run directory: a sweep writes it when it is done")
    results = _object(raw)
    stored, named = read(PREDICTIONS), results.get("classes")
    predictions = None
    classes = [printable(name) for name in named] if isinstance(named, list) else []
    if stored is not None:
        predictions, others = parse_predictions(stored)
        classes = classes or others
        _agree(results, classes, predictions, others)
    trials, unfinished = parse_trials(read(TRIALS))
    return Sweep(
        config_text=given.config_text,
        config=given.config,
        indexes=given.indexes,
        results=results,
        rows=_rows(results, classes),
        classes=classes,
        permuted=_permuted(results.get("permuted")),
        predictions=predictions,
        trials=trials,
        unfinished=unfinished,
        leaned=parse_leaned(results.get("occlusion")),
        planes=parse_planes(read(EMBEDDING), results.get("embedding"), len(classes)),
    )


def parse_predictions(raw: bytes) -> tuple[Predictions, list[str]]:
    """The held-out windows and the names of their classes.

    Raises ``UserError`` where tensors are missing or no tensors at all, ``DataError`` where they disagree with each
    other: in length, in the number of classes, in a label or fold beyond the names, in probabilities that do not
    add up to one.
    """
    try:
        tensors = load_tensors(raw)
        size = int.from_bytes(raw[:8], "little")
        meta = json.loads(raw[8 : 8 + size]).get("__metadata__") or {}
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
        found = {key: list(value.shape) for key, value in sorted(tensors.items())}
        raise DataError(f"{PREDICTIONS}: shapes disagree or windows are missing: {found}; {AGAIN}")
    if shapes != {(label.size, len(classes))}:
        found = {name: list(table.shape) for name, table in tables.items()}
        sizes = f"{label.size} windows and {len(classes)} classes"
        raise DataError(f"{PREDICTIONS}: {sizes}, but probabilities {found}; {AGAIN}")
    for name, values, most in (("label", label, len(classes)), ("fold", fold, len(folds))):
        if values.dtype.kind not in "iu" or int(values.min()) < 0 or int(values.max()) >= most:
            raise DataError(f"{PREDICTIONS}: tensor {name!r} has values that are not in 0..{most - 1}; {AGAIN}")
    broken = [name for name, table in tables.items() if not np.isfinite(table).all()]
    for name in broken:
        del tables[name]
    for name, table in tables.items():
        if table.min() < 0 or np.abs(table.sum(axis=1) - 1).max() > SUM_TOLERANCE:
            raise DataError(f"{PREDICTIONS}: the probabilities of {name!r} are negative or do not add up to 1; {AGAIN}")
    whole = Predictions(fold.astype(np.int64), person.astype(np.uint64), label.astype(np.int64), tables, folds, broken)
    return whole, classes


def parse_trials(raw: bytes | None) -> tuple[list[Trial], bool]:
    """The trials in order of the file, and whether its last line was not finished.

    Raises ``UserError`` naming the line that cannot be understood.
    """
    lines = [] if raw is None else raw.decode("utf-8", "replace").split("\n")
    trials: list[Trial] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            trials.append(_trial(entry))
        except (ValueError, TypeError, UserError) as error:
            # Only the writer's last, unterminated line may be half there: anything before it is damage.
            if number == len(lines):
                return trials, True
            raise UserError(f"{TRIALS}, line {number}: {error}; repair or remove this line") from error
    return trials, False


def same_config(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether two configurations are the same choice: numbers by value, whatever their type."""
    return one is not None and other is not None and one == other


def _trial(entry: Any) -> Trial:
    if not isinstance(entry, dict) or not isinstance(entry.get("config"), dict):
        raise ValueError("not a JSON object with a 'config'")
    history = entry.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise ValueError("'history' is not a list of [epoch, val_auc]")
    points = [(_float(epoch, "history"), _float(value, "history")) for epoch, value in history]
    epochs = _float(entry.get("epochs"), "epochs")
    return Trial(
        row=printable(entry.get("row", "")),
        config=entry["config"],
        val_auc=_float(entry.get("val_auc"), "val_auc"),
        epochs=int(epochs) if math.isfinite(epochs) else len(points),
        stopped=bool(entry.get("stopped")),
        seconds=_float(entry.get("seconds"), "seconds"),
        history=[(epoch, value) for epoch, value in points if math.isfinite(epoch)],
    )


def _object(raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{RESULTS} is not JSON: {error}; {AGAIN}") from error
    rows = document.get("rows") if isinstance(document, dict) else None
    good = isinstance(rows, list) and all(isinstance(row, dict) and isinstance(row.get("name"), str) for row in rows)
    if not rows or not good:
        raise UserError(f"{RESULTS}: expected an object with a list 'rows' of objects that have a 'name'")
    names = [row["name"] for row in rows]
    if len(set(names)) < len(names):
        raise UserError(f"{RESULTS}: two rows have the same name: {', '.join(sorted(names))}")
    return dict(document)


def _rows(results: dict[str, Any], classes: Sequence[str]) -> list[Row]:
    made = []
    for entry in results["rows"]:
        name = printable(entry["name"])
        where = f"{RESULTS}, row {name!r}"
        modalities, folds, spread = entry.get("modalities"), entry.get("per_fold"), entry.get("spread")
        for key, value, kind in (("modalities", modalities, list), ("per_fold", folds, list), ("spread", spread, dict)):
            if value is not None and not isinstance(value, kind):
                raise UserError(f"{where}: {key!r} is {value!r}, not a JSON {'list' if kind is list else 'object'}")
        if not all(isinstance(fold, dict) for fold in folds or []):
            raise UserError(f"{where}: 'per_fold' holds something that is no object")
        made.append(
            Row(
                name=name,
                modalities=tuple(printable(signal) for signal in modalities or []),
                scores=_scores(entry, where),
                interval=_interval(entry.get("auc_ci"), where),
                folds=[_fold(fold, where) for fold in folds or []],
                spread=_scores(spread or {}, where),
                confusion=_confusion(entry.get("confusion"), len(classes), where),
                ece=_float(entry.get("ece"), "ece", where),
                ece_before=_float(entry.get("ece_before"), "ece_before", where),
            )
        )
    return made


def _fold(entry: dict[str, Any], where: str) -> FoldResult:
    config, epoch = entry.get("config"), entry.get("epoch")
    return FoldResult(
        fold=printable(entry.get("fold", "")),
        people=_count(entry.get("people")),
        windows=_count(entry.get("windows")),
        scores=_scores(entry, f"{where}, fold {printable(entry.get('fold', ''))}"),
        config=config if isinstance(config, dict) else None,
        epoch=_count(epoch),
    )


def _scores(entry: dict[str, Any], where: str) -> dict[str, float]:
    return {name: _float(entry.get(name), name, where) for name in METRICS}


def _float(value: Any, name: str, where: str = "") -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{where}{': ' if where else ''}{name!r} is {value!r}, not a number or null")
    return float(value) if math.isfinite(value) else math.nan


def _interval(value: Any, where: str) -> tuple[float, float]:
    if value is None:
        return math.nan, math.nan
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{where}: 'auc_ci' is {value!r}, not [low, high]")
    return _float(value[0], "auc_ci", where), _float(value[1], "auc_ci", where)


def _confusion(value: Any, classes: int, where: str) -> Ints | None:
    if value is None:
        return None
    try:
        table = np.array(value)
    except ValueError:  # lines of different lengths
        table = np.zeros(0)
    if table.ndim != 2 or table.shape != (classes or len(table),) * 2 or table.dtype.kind != "i" or table.min() < 0:
        raise UserError(f"{where}: 'confusion' is not a square table of counts for {classes} classes")
    return table.astype(np.int64)


def _permuted(value: Any) -> Permuted | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not isinstance(value.get("auc"), list):
        raise UserError(f"{RESULTS}: 'permuted' is not an object with a list 'auc'")
    auc = np.array([_float(entry, "auc", f"{RESULTS}, permuted") for entry in value["auc"]])
    p, leak = (_float(value.get(name), name, f"{RESULTS}, permuted") for name in ("p", "p_leak"))
    return Permuted(auc[np.isfinite(auc)], p, leak)


def _count(value: Any) -> int | None:
    if isinstance(value, list):
        return len(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _agree(results: dict[str, Any], classes: list[str], predictions: Predictions, others: list[str]) -> None:
    """Refuse predictions of another sweep than the results'."""
    told = {"windows": _count(results.get("windows")), "people": _count(results.get("people"))}
    found = {"windows": int(predictions.label.size), "people": len(np.unique(predictions.person))}
    for name, number in told.items():
        if number is not None and number != found[name]:
            raise DataError(
                f"{PREDICTIONS} holds {found[name]:,} {name} and {RESULTS} speaks of {number:,}: they are not of the "
                f"same sweep; {AGAIN}"
            )
    if classes != others:
        raise DataError(f"{PREDICTIONS} has the classes {others} and {RESULTS} has {classes}; {AGAIN}")
