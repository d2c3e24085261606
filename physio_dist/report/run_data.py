"""Files of a pretraining run, and those that every kind of run has; :mod:`.sweep_data` reads those of a sweep."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from physio_dist.errors import UserError
from physio_dist.runs.run_dir import CONFIG, METRICS
from physio_dist.runs.run_files import ATTEMPTS, DATA, EXAMPLES, Attempt, DataFacts, ShardSetFacts
from physio_dist.runs.typed_json import from_json, parse_json, parse_lines, printable
from physio_dist.runtime.arrays import BoolArray, Float32Array, Float64Array

Reader = Callable[[str], "bytes | None"]

# Without an attempts file, a pause this many times the usual one between two lines counts as a restart;
# the floor keeps a validation or a checkpoint of a quick run from counting.
PAUSE_FACTOR = 10.0
PAUSE_FLOOR_S = 60.0


@dataclass(frozen=True)
class Metrics:
    """The logged steps of a run, oldest first, as columns.

    Attributes:
        columns: name of a field -> float64 ``[row]``; null, NaN, infinite and absent values are NaN.
        rows: number of logged steps.
        unfinished: whether the last line of the file was still being written.
    """

    columns: dict[str, Float64Array]
    rows: int
    unfinished: bool = False

    def column(self, name: str) -> Float64Array:
        """Values of one field, float64 ``[row]``; all NaN where it was never logged."""
        values = self.columns.get(name)
        return np.full(self.rows, np.nan) if values is None else values

    def has(self, name: str) -> bool:
        """Return True if at least one finite value of this field was logged."""
        return bool(np.isfinite(self.column(name)).any())

    def median(self, name: str) -> float:
        """Median of the finite values of a field; NaN where there are none."""
        values = self.column(name)
        finite = values[np.isfinite(values)]
        return float(np.median(finite)) if finite.size else math.nan

    def last(self, name: str) -> float:
        """Last finite value of a field; NaN where there is none."""
        values = self.column(name)
        finite = values[np.isfinite(values)]
        return float(finite[-1]) if finite.size else math.nan

    def last_validation(self) -> int | None:
        """Row of the newest step that carries a validation result, or None."""
        values = np.stack([self.column(name) for name in ("val_loss", "val_intra", "val_inter")])
        rows = np.flatnonzero(np.isfinite(values).any(axis=0))
        return int(rows[-1]) if rows.size else None


@dataclass(frozen=True)
class Examples:
    """Held-out windows, their masks, and their reconstructions by the model.

    Attributes:
        target, reconstruction: float32 ``[n, channel, time]`` in uV.
        intra, inter: bool ``[n, channel, patch]``, patches hidden in time and with their whole lead; they do not
            overlap (a patch hidden both ways is ``inter``).
        valid: bool ``[n, channel]``.
        rate: Hz.
        step: training step of the model.
        channels: names.
        keys: of the windows.
        simulated: whether the windows are; None where unknown.
    """

    target: Float32Array
    reconstruction: Float32Array
    intra: BoolArray
    inter: BoolArray
    valid: BoolArray
    rate: float
    step: str
    channels: list[str]
    keys: list[str]
    simulated: bool | None

    @property
    def patch_samples(self) -> int:
        """Samples in one patch."""
        return int(self.target.shape[2] // self.intra.shape[2])

    def hidden_samples(self, kind: str) -> BoolArray:
        """bool ``[n, channel, time]``: samples hidden as ``intra`` or ``inter``, invalid leads left out."""
        mask: BoolArray = getattr(self, kind) & self.valid[:, :, None]
        return np.repeat(mask, self.patch_samples, axis=2)


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """Configuration and data sets of a run of any kind; what the run lacks is None or empty."""

    config_text: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    indexes: list[ShardSetFacts] = field(default_factory=list)

    def option(self, path: str) -> Any:
        """Value of a dotted option (``train.lr``) in the resolved configuration, or None."""
        value: Any = self.config
        for part in path.split("."):
            if not isinstance(value, dict):
                return None
            value = value.get(part)
        return value

    @property
    def name(self) -> str:
        """Name of the run, or a stand-in where it has no configuration."""
        return str(self.option("run.name") or "unnamed run")

    def simulated(self) -> list[bool]:
        """For each data set with a known origin whether its signals are simulated."""
        return [index.simulated for index in self.indexes if index.simulated is not None]


@dataclass(frozen=True, kw_only=True)
class Run(RunInfo):
    """A pretraining run."""

    metrics: Metrics
    examples: Examples | None = None
    attempts: list[Attempt] = field(default_factory=list)

    def simulated(self) -> list[bool]:
        """For each data set with a known origin whether its signals are simulated; else that of the examples."""
        if (flags := super().simulated()) or self.examples is None or self.examples.simulated is None:
            return flags
        return [self.examples.simulated]

    def restarts(self) -> Restarts:
        """Restarts noted in ``attempts.json``, or without it long pauses between logged steps."""
        if self.attempts:
            steps = {float(attempt.from_step) for attempt in self.attempts[1:] if attempt.from_step is not None}
            return Restarts(sorted(steps), from_attempts=True)
        gaps = np.diff(self.metrics.column("time"))
        finite = gaps[np.isfinite(gaps)]
        if not finite.size:
            return Restarts([], from_attempts=False)
        limit = max(PAUSE_FLOOR_S, PAUSE_FACTOR * float(np.median(finite)))
        return Restarts(self.metrics.column("step")[:-1][gaps > limit].tolist(), from_attempts=False)


@dataclass(frozen=True)
class Restarts:
    """Steps at which the run started again, and whether ``attempts.json`` or only the clock says so."""

    steps: list[float]
    from_attempts: bool


def load_run(read: Reader) -> Run:
    """Read a pretraining run; ``read(name)`` returns the bytes of a file or None.

    Raises:
        UserError: there are no metrics, or a file is damaged; the message names the file (and the line).
    """
    examples, attempts = read(EXAMPLES), read(ATTEMPTS)
    documents = [] if attempts is None else parse_json(attempts, ATTEMPTS)
    if not isinstance(documents, list):
        raise UserError(f"{ATTEMPTS} is not a list")
    return Run(
        **load_info(read),
        metrics=parse_metrics(read(METRICS)),
        examples=None if examples is None else parse_examples(examples),
        attempts=[from_json(Attempt, document, ATTEMPTS) for document in documents],
    )


def load_info(read: Reader) -> dict[str, Any]:
    """Fields of :class:`RunInfo` from ``config.yaml`` and ``data.json``; ``UserError`` where one is damaged."""
    config, data = read(CONFIG), read(DATA)
    text = None if config is None else without_credentials(config.decode("utf-8", "replace"))
    indexes = [] if data is None else from_json(DataFacts, parse_json(data, DATA), DATA).indexes
    return {"config_text": text, "config": {} if text is None else _parse_config(text), "indexes": indexes}


def parse_metrics(raw: bytes | None) -> Metrics:
    """Columns from the lines of ``metrics.jsonl``; ``UserError`` where it is missing, empty or damaged."""
    if raw is None:
        raise UserError(
            f"{METRICS} is not in the run directory: give the directory of a run (run.dir/run.name) that has logged at "
            "least one step"
        )
    lines, unfinished = parse_lines(raw, METRICS, _metrics_row)
    rows: list[dict[str, float]] = []
    for line in lines:
        # A step that comes again was replayed after a restart: what followed the older line is void.
        while rows and rows[-1]["step"] >= line["step"]:
            rows.pop()
        rows.append(line)
    if not rows:
        raise UserError(
            f"{METRICS} is in the run directory and holds no logged step yet: run until train.log_every steps are "
            "done, then report again"
        )
    names = {name: None for row in rows for name in row}
    columns = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
    return Metrics(columns, len(rows), unfinished)


def _metrics_row(record: Any, where: str) -> dict[str, float]:
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object")
    numbers = {name: value for name, value in record.items() if value is None or isinstance(value, int | float)}
    if others := {"step", "loss"} & (set(record) - set(numbers)):
        raise UserError(f"{where}: {min(others)!r} is not a number")
    try:
        row = {name: math.nan if value is None else float(value) for name, value in numbers.items()}
    except OverflowError as error:
        raise UserError(f"{where}: {error}") from error
    row = {name: value if math.isfinite(value) else math.nan for name, value in row.items()}
    if math.isnan(row.get("step", math.nan)):
        raise UserError(f"{where}: no 'step'")
    return row


def metadata_of(raw: bytes) -> dict[str, str]:
    """The metadata in the header of a safetensors file; ``ValueError`` where it is damaged."""
    size = int.from_bytes(raw[:8], "little")
    return dict(json.loads(raw[8 : 8 + size]).get("__metadata__") or {})


def parse_examples(raw: bytes) -> Examples:
    """Windows from ``examples.safetensors``; ``UserError`` where tensors are missing or disagree in shape."""
    try:
        tensors, meta = load_tensors(raw), metadata_of(raw)
        inter = tensors["inter"] != 0
        keys = [printable(key) for key in json.loads(meta.get("keys", "[]"))]
        examples = Examples(
            target=tensors["target"].astype(np.float32),
            reconstruction=tensors["reconstruction"].astype(np.float32),
            intra=(tensors["intra"] != 0) & ~inter,
            inter=inter,
            valid=tensors["valid"] != 0,
            rate=float(meta["rate"]),
            step=str(meta.get("step", "?")),
            channels=[printable(channel) for channel in json.loads(meta["channels"])],
            keys=keys + [f"window {i + 1}" for i in range(len(keys), len(inter))],
            simulated=None if "simulated" not in meta else meta["simulated"].lower() == "true",
        )
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{EXAMPLES} cannot be read ({type(error).__name__}: {error})") from error
    shape, patches = examples.target.shape, inter.shape[-1]
    fits = (
        len(shape) == inter.ndim == 3
        and examples.reconstruction.shape == shape
        and examples.intra.shape == inter.shape
        and inter.shape[:2] == examples.valid.shape == shape[:2]
        and 0 < patches <= shape[2]
        and shape[2] % patches == 0
        and len(examples.channels) == shape[1]
        and examples.rate > 0
    )
    if not fits:
        shapes = {key: list(value.shape) for key, value in sorted(tensors.items())}
        names = f"{len(examples.channels)} channel names, {examples.rate:g} Hz"
        raise UserError(f"{EXAMPLES}: shapes disagree: {shapes}, {names}")
    return examples


def without_credentials(text: str) -> str:
    """The text without user names, passwords and signed queries in its URLs: a page gets passed around."""
    text = re.sub(r"(\b\w+://)[^/\s@'\"]+@", r"\1", text)
    return re.sub(r"(\b\w+://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)


def _parse_config(text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{CONFIG} is not YAML: {error}") from error
    if config is not None and not isinstance(config, dict):
        raise UserError(f"{CONFIG} holds no mapping of options")
    return config or {}
