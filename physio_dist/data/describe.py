"""Summary of a shard set in words and numbers, and windows to draw."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from physio_dist import storage
from physio_dist.data.format import tar
from physio_dist.data.format.index import SPLITS, ShardSet, open_set
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.errors import DataError, UserError
from physio_dist.runtime.arrays import BoolArray, Float32Array

# Labels are looked at in this many shards; reading all of a large set would take hours.
_LABEL_SHARDS = 4


@dataclass(frozen=True)
class Windows:
    """Windows to draw: microvolts ``[window, channel, time]``, validity ``[window, channel]``, keys."""

    signal: Float32Array
    valid: BoolArray
    keys: list[str]


def describe(url: str) -> list[str]:
    """Summary lines: counts, rates, leads, labels, people and bytes.

    Raises:
        UserError: there is no shard set.
        DataError: it is damaged.
    """
    shards = open_set(url)
    table = read_sample_table(shards)
    lines = [
        f"{shards.url}" + ("   SIMULATED signals" if shards.simulated else ""),
        f"  {shards.nsamples} windows of {shards.people} people in {len(shards.shards)} shards, "
        f"{sum(s.filesize for s in shards.shards) / 1e6:,.1f} MB; sources: {', '.join(shards.sources)}",
        f"  fingerprint {shards.fingerprint}",
        *_resplit(shards),
    ]
    for code, name in enumerate(SPLITS):
        rows = table.split == code
        lines.append(f"  {name}: {int(rows.sum())} windows of {len(np.unique(table.person[rows]))} people")
    for name, signal in shards.signals.items():
        valid = table.valid[name]
        lines.append(
            f"  {name}: {len(signal.channels)} channels x {signal.samples} samples at {shards.rate:g} Hz "
            f"({signal.samples / shards.rate:g} s), {signal.uv_per_bit:g} uV per bit"
        )
        if not shards.nsamples:
            continue
        shares = (f"{c} {share:.1%}" for c, share in zip(signal.channels, valid.mean(axis=0), strict=True))
        lines.append(f"    valid: {', '.join(shares)}")
    return lines + _labels(shards)


def _resplit(shards: ShardSet) -> list[str]:
    about = shards.made_by.get("view")
    origin = ", ".join(f"{name} {value}" for name, value in about.items()) if isinstance(about, dict) else ""
    return [f"  a resplit of {shards.base_url}" + (f": {origin}" if origin else "")] if shards.base_url else []


def _labels(shards: ShardSet) -> list[str]:
    values: dict[str, Counter[str]] = {}
    seen = 0
    for number in range(min(_LABEL_SHARDS, len(shards.shards))):
        data = _read(shards, number)
        for member in tar.scan(io.BytesIO(data), shards.shards[number].url):
            seen += 1
            labels = (member.facts or {}).get("labels")
            for name, value in labels.items() if isinstance(labels, dict) else ():
                for item in value if isinstance(value, list) else [value]:
                    values.setdefault(name, Counter())[json.dumps(item)] += 1
    scope = "all windows" if len(shards.shards) <= _LABEL_SHARDS else f"the first {seen} windows"
    return [f"  labels in {scope}:" if values else "  no labels"] + [
        f"    {name}: " + ", ".join(f"{value} x {count}" for value, count in counts.most_common(6))
        + (f", and {len(counts) - 6} more values" if len(counts) > 6 else "")
        for name, counts in sorted(values.items())
    ]  # fmt: skip


def some_windows(url: str, count: int) -> tuple[ShardSet, dict[str, Windows]]:
    """``count`` windows spread evenly over a set, for every signal.

    Raises:
        UserError: there is no shard set, or ``count`` is not positive.
    """
    if count < 1:
        raise UserError(f"--plot {count}: at least 1 window")
    shards = open_set(url)
    if not shards.nsamples:
        raise UserError(f"{url} holds no windows: there is nothing to draw")
    table = read_sample_table(shards)
    chosen = np.unique(np.linspace(0, shards.nsamples - 1, min(count, shards.nsamples)).astype(np.int64))
    starts = shards.shard_starts()
    windows: dict[str, Any] = {}
    for name, signal in shards.signals.items():
        waves = []
        for sample in chosen:
            number = int(np.searchsorted(starts, sample, side="right") - 1)
            start = int(table.offset[name][sample])
            raw = _read(shards, number, start, start + signal.nbytes)
            if len(raw) != signal.nbytes:
                raise DataError(f"{shards.shard_url(number)} is shorter than the index says: it was truncated")
            waves.append(np.frombuffer(raw, "<i2").reshape(len(signal.channels), -1) * np.float32(signal.uv_per_bit))
        windows[name] = Windows(np.stack(waves), table.valid[name][chosen], table.keys(chosen))
    return shards, windows


def _read(shards: ShardSet, number: int, start: int | None = None, end: int | None = None) -> bytes:
    try:
        return storage.read_bytes(shards.shard_url(number), start, end)
    except storage.NotFoundError:
        raise DataError(f"{shards.shard_url(number)} is in the index but not there") from None
