"""What the directory of a pretraining run holds, parsed and checked; sweepdata.py does the same for a sweep."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from physio_dist.errors import UserError

Floats = NDArray[np.float64]
Reader = Callable[[str], "bytes | None"]

# Without an attempts file, a pause this many times the usual one between two lines counts as a restart;
# the floor keeps a validation or a checkpoint of a quick run from counting.
PAUSE_FACTOR = 10.0
PAUSE_FLOOR_S = 60.0


@dataclass(frozen=True)
class Metrics:
    """The logged steps of a run, oldest first, as columns.

    ``columns`` maps a field to float64 of shape ``[row]``; null, NaN, infinite and absent values are NaN.
    ``unfinished`` tells that the file ended in half a line, as it does while a run is writing it.
    """

    columns: dict[str, Floats]
    rows: int
    unfinished: bool = False

    def column(self, name: str) -> Floats:
        """Values of one field, float64 ``[row]``; all NaN where it was never logged."""
        values = self.columns.get(name)
        return np.full(self.rows, np.nan) if values is None else values

    def has(self, name: str) -> bool:
        """Whether at least one finite value of this field was logged."""
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
        seen = np.zeros(self.rows, dtype=bool)
        for name in ("val_loss", "val_intra", "val_inter"):
            seen |= np.isfinite(self.column(name))
        rows = np.flatnonzero(seen)
        return int(rows[-1]) if rows.size else None


@dataclass(frozen=True)
class Examples:
    """Held-out windows with what was hidden and what the model put there.

    ``target`` and ``reconstruction``: float32 ``[n, channel, time]`` in uV. ``intra`` and ``inter``: bool
    ``[n, channel, patch]``, hidden in time and hidden with the whole lead; they never overlap here (a lead that is
    hidden whole counts as that). ``valid``: bool ``[n, channel]``. ``rate`` in Hz.
    """

    target: NDArray[np.float32]
    reconstruction: NDArray[np.float32]
    intra: NDArray[np.bool_]
    inter: NDArray[np.bool_]
    valid: NDArray[np.bool_]
    rate: float
    step: str
    channels: list[str]
    keys: list[str]
    simulated: bool | None

    @property
    def patch_samples(self) -> int:
        """Samples in one patch."""
        return int(self.target.shape[2] // self.intra.shape[2])

    def hidden_samples(self, kind: str) -> NDArray[np.bool_]:
        """bool ``[n, channel, time]``: samples hidden as ``intra`` or ``inter``, invalid leads left out."""
        mask: NDArray[np.bool_] = getattr(self, kind) & self.valid[:, :, None]
        return np.repeat(mask, self.patch_samples, axis=2)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a run of any kind was given, as far as its directory tells: its options and the shard sets it read."""

    config_text: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    indexes: list[dict[str, Any]] = field(default_factory=list)

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
        """Name of the run, or a stand-in where the configuration does not tell."""
        return str(self.option("run.name") or "unnamed run")

    def simulated(self) -> list[bool]:
        """Every statement the run makes on whether its signals are simulated; empty if it makes none."""
        return [bool(index["simulated"]) for index in self.indexes if index.get("simulated") is not None]


@dataclass(frozen=True)
class Run(Given):
    """The directory of a pretraining run in memory; what the run lacks is None or empty."""

    metrics: Metrics
    examples: Examples | None = None
    attempts: list[dict[str, Any]] = field(default_factory=list)

    def simulated(self) -> list[bool]:
        """Every statement the run makes on whether its signals are simulated; empty if it makes none."""
        told = super().simulated()
        if not told and self.examples is not None and self.examples.simulated is not None:
            told = [self.examples.simulated]
        return told


@dataclass(frozen=True)
class Restarts:
    """Steps at which the run started again, and whether ``attempts.json`` says so or only the clock does."""

    steps: list[float]
    from_attempts: bool


def load_run(read: Reader) -> Run:
    """Parse all files of a run directory.

    ``read(name)`` returns the bytes of a file or None. Raises ``UserError``, naming the file (and the line), where
    there are no metrics or a file cannot be understood.
    """
    metrics = parse_metrics(read("metrics.jsonl"))
    given = load_given(read)
    examples = read("examples.safetensors")
    return Run(
        metrics=metrics,
        config_text=given.config_text,
        config=given.config,
        examples=None if examples is None else parse_examples(examples),
        indexes=given.indexes,
        attempts=_records(read("attempts.json"), "attempts.json"),
    )


def load_given(read: Reader) -> Given:
    """``config.yaml`` and ``data.json``, which every kind of run has; ``UserError`` where one cannot be understood."""
    raw = read("config.yaml")
    text = None if raw is None else without_credentials(raw.decode("utf-8", "replace"))
    config = {} if text is None else _parse_config(text)
    return Given(config_text=text, config=config, indexes=_records(read("data.json"), "data.json", key="indexes"))


def parse_metrics(raw: bytes | None) -> Metrics:
    """Columns from the lines of ``metrics.jsonl``; ``UserError`` where it is missing, empty or broken."""
    if raw is None:
        raise UserError(
            "metrics.jsonl was looked for in the run directory and is not there: give the directory of a run "
            "(run.dir/run.name) that has logged at least one step"
        )
    lines = raw.decode("utf-8", "replace").split("\n")
    rows: list[dict[str, float]] = []
    unfinished = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = _metrics_row(line)
        except (ValueError, OverflowError) as error:
            # Only the writer's last, unterminated line may be half there: anything before it is damage.
            if number == len(lines):
                unfinished = True
                continue
            raise UserError(f"metrics.jsonl, line {number}: {error}; repair or remove this line") from error
        # A step that comes again was replayed after a restart: what followed the older line is void.
        while rows and rows[-1]["step"] >= row["step"]:
            rows.pop()
        rows.append(row)
    if not rows:
        raise UserError(
            "metrics.jsonl is in the run directory and holds no logged step yet: run until train.log_every steps "
            "are done, then report again"
        )
    names = {name: None for row in rows for name in row}
    columns = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
    return Metrics(columns, len(rows), unfinished)


def _metrics_row(line: str) -> dict[str, float]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    row: dict[str, float] = {}
    for name, value in record.items():
        if value is None:
            row[name] = math.nan
        elif isinstance(value, (int, float)):
            row[name] = float(value) if math.isfinite(value) else math.nan
        elif name in ("step", "loss"):
            raise ValueError(f"{name!r} is {value!r}, not a number")
    if not math.isfinite(row.get("step", math.nan)):
        raise ValueError("no 'step'")
    return row


def parse_examples(raw: bytes) -> Examples:
    """Windows from ``examples.safetensors``; ``UserError`` where tensors are missing or disagree in shape."""
    name = "examples.safetensors"
    try:
        tensors = load_tensors(raw)
        size = int.from_bytes(raw[:8], "little")
        meta = json.loads(raw[8 : 8 + size]).get("__metadata__") or {}
        target, made = tensors["target"], tensors["reconstruction"]
        inter = tensors["inter"] != 0
        intra = (tensors["intra"] != 0) & ~inter
        valid = tensors["valid"] != 0
        channels = [printable(c) for c in json.loads(meta["channels"])]
        keys = [printable(k) for k in json.loads(meta.get("keys", "[]"))]
        rate = float(meta["rate"])
    except (SafetensorError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{name} cannot be read ({type(error).__name__}: {error})") from error
    shape = target.shape
    fits = (
        target.ndim == 3
        and made.shape == shape
        and intra.ndim == 3
        and intra.shape == inter.shape
        and intra.shape[:2] == valid.shape == shape[:2]
        and 0 < intra.shape[2] <= shape[2]
        and shape[2] % intra.shape[2] == 0
        and len(channels) == shape[1]
        and rate > 0
    )
    if not fits:
        found = {key: list(value.shape) for key, value in sorted(tensors.items())}
        raise UserError(f"{name}: shapes disagree: {found}, {len(channels)} channel names, {rate:g} Hz")
    keys += [f"window {i + 1}" for i in range(len(keys), shape[0])]
    flag = meta.get("simulated")
    simulated = None if flag is None else str(flag).lower() == "true"
    step = str(meta.get("step", "?"))
    target, made = target.astype(np.float32), made.astype(np.float32)
    return Examples(target, made, intra, inter, valid, rate, step, channels, keys, simulated)


def find_restarts(run: Run) -> Restarts:
    """Where the run started again: told by ``attempts.json``, or else guessed from long pauses between lines."""
    steps = run.metrics.column("step")
    if run.attempts:
        told = [attempt.get("from_step") for attempt in run.attempts[1:]]
        return Restarts(sorted({float(s) for s in told if isinstance(s, (int, float))}), from_attempts=True)
    gaps = np.diff(run.metrics.column("time"))
    usual = gaps[np.isfinite(gaps)]
    if not usual.size:
        return Restarts([], from_attempts=False)
    limit = max(PAUSE_FLOOR_S, PAUSE_FACTOR * float(np.median(usual)))
    return Restarts([float(s) for s in steps[:-1][gaps > limit]], from_attempts=False)


def without_credentials(text: str) -> str:
    """The text with user names, passwords and signed queries taken out of its URLs: a page gets passed around."""
    text = re.sub(r"(\b\w+://)[^/\s@'\"]+@", r"\1", text)
    return re.sub(r"(\b\w+://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)


def _parse_config(text: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"config.yaml is not YAML: {error}") from error
    if config is not None and not isinstance(config, dict):
        raise UserError("config.yaml holds no mapping of options")
    return config or {}


def _records(raw: bytes | None, name: str, key: str | None = None) -> list[dict[str, Any]]:
    """A list of objects from a JSON file, the top-level list or the one under ``key``."""
    if raw is None:
        return []
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise UserError(f"{name} is not JSON: {error}") from error
    if key is not None:
        document = document.get(key) if isinstance(document, dict) else None
    if not isinstance(document, list) or not all(isinstance(entry, dict) for entry in document):
        raise UserError(f"{name}: expected a list of objects{f' under {key!r}' if key else ''}")
    return document


def printable(value: object) -> str:
    """Control characters would make the drawings invalid XML."""
    return "".join(c for c in str(value) if c.isprintable())
