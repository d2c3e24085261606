"""What a sweep tells of its heads and features: what was withheld from them and what that cost; features on a plane."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from physio_dist.errors import DataError, UserError
from physio_dist.report.rundata import Floats, printable

EMBEDDING = "embedding.safetensors"
_LEANED = "results.json, occlusion"
AGAIN = "run the sweep again, or put back the files that belong together"


@dataclass(frozen=True)
class Withheld:
    """What the AUC lost without a signal, channel or patch; ``start`` in seconds, NaN of what is no patch.

    ``low``, ``high``: interval over people, NaN where unknown; ``moved``: by how much probabilities changed.
    """

    signal: str
    name: str
    lost: float
    low: float
    high: float
    moved: float
    start: float = math.nan
    seconds: float = math.nan


@dataclass(frozen=True)
class Leaned:
    """Everything that was withheld from the fused heads, and the AUC with all of it."""

    auc: float
    windows: int
    signals: list[Withheld] = field(default_factory=list)
    channels: list[Withheld] = field(default_factory=list)
    patches: list[Withheld] = field(default_factory=list)


@dataclass(frozen=True)
class Plane:
    """Windows of a signal on a plane.

    ``place`` float64 ``[n, 2]``; ``person`` uint64, ``label`` int64 ``[n]``. ``near``: of ``person`` and ``label`` the
    share among the nearest windows and that by chance, NaN where unknown; ``neighbours``: how many are looked at.
    """

    place: Floats
    person: NDArray[np.uint64]
    label: NDArray[np.int64]
    near: dict[str, tuple[float, float]]
    neighbours: int


def parse_leaned(value: Any) -> Leaned | None:
    """``leaned`` of results.json. Raises ``UserError`` where it cannot be understood."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise UserError(f"{_LEANED}: {value!r} is no JSON object")
    parts: dict[str, list[Withheld]] = {}
    for kind in ("signals", "channels", "patches"):
        entries = value.get(kind) or []
        if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
            raise UserError(f"{_LEANED}: {kind!r} is not a list of objects")
        parts[kind] = [_withheld(one) for one in entries]
    windows = value.get("windows")
    return Leaned(_number(value, "auc"), windows if isinstance(windows, int) else 0, **parts)


def _withheld(entry: Mapping[str, Any]) -> Withheld:
    signal, interval = printable(str(entry.get("signal", ""))), entry.get("ci") or [None, None]
    if not isinstance(interval, list) or len(interval) != 2:
        raise UserError(f"{_LEANED}: 'ci' is {interval!r}, not [low, high]")
    ends = {"low": interval[0], "high": interval[1]}
    return Withheld(
        signal, printable(str(entry.get("channel", signal))), _number(entry, "auc_drop"), _number(ends, "low"),
        _number(ends, "high"), _number(entry, "prob_shift"), _number(entry, "start_s"), _number(entry, "seconds"),
    )  # fmt: skip


def _number(entry: Mapping[str, Any], name: str) -> float:
    value = entry.get(name)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{_LEANED}: {name!r} is {value!r}, not a number or null")
    return float(value)


def parse_planes(raw: bytes | None, told: Any, classes: int) -> dict[str, Plane]:
    """Of each signal its plane, with what results.json tells of it.

    Raises ``UserError`` where the file is none of tensors, ``DataError`` where tensors disagree with each other.
    """
    if raw is None:
        return {}
    try:
        tensors = load_tensors(raw)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{EMBEDDING} cannot be read ({type(error).__name__}: {error})") from error
    about = told if isinstance(told, dict) else {}
    planes = {}
    for key in sorted(tensors):
        signal, _, what = key.rpartition(".")
        if what != "place":
            continue
        place, person, label = tensors[key], tensors.get(f"{signal}.person"), tensors.get(f"{signal}.label")
        n = len(place)
        whole = person is not None and label is not None and person.shape == label.shape == (n,)
        if not whole or place.shape != (n, 2) or not n or not np.isfinite(place).all():
            raise DataError(f"{EMBEDDING}: the tensors of {signal!r} do not fit each other; {AGAIN}")
        assert person is not None and label is not None
        if int(label.min()) < 0 or int(label.max()) >= classes:
            raise DataError(f"{EMBEDDING}: {signal}.label has values that are not in 0..{classes - 1}; {AGAIN}")
        told_of = about.get(signal)
        facts = told_of if isinstance(told_of, dict) else {}
        near = {name: (_number(facts, name), _number(facts, f"{name}_chance")) for name in ("person", "label")}
        count = about.get("neighbours")
        planes[printable(signal)] = Plane(
            place.astype(np.float64), person.astype(np.uint64), label.astype(np.int64), near,
            count if isinstance(count, int) else 0,
        )  # fmt: skip
    return planes
