"""Facts that every run keeps beside its results: ``data.json`` and ``attempts.json``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from physio_dist.runs.typed_json import OPTIONAL

DATA = "data.json"
ATTEMPTS = "attempts.json"
EXAMPLES = "examples.safetensors"


@dataclass(frozen=True)
class ShardSetFacts:
    """A shard set in ``data.json``."""

    url: str = ""
    fingerprint: str = ""
    splits: dict[str, int] = field(default_factory=dict)  # windows
    people: int | None = None
    rate: float = math.nan  # Hz
    channels: list[str] = field(default_factory=list)
    signals: dict[str, list[str]] | None = field(default=None, metadata=OPTIONAL)  # channels of each, in a sweep
    simulated: bool | None = None
    sources: list[str] = field(default_factory=list)  # corpora


@dataclass(frozen=True)
class DataFacts:
    """``data.json``; ``encoders`` of a sweep: see :class:`~physio_dist.runs.sweep_results.SweepResults`."""

    indexes: list[ShardSetFacts]
    encoders: dict[str, Any] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Attempt:
    """An entry of ``attempts.json``: one start of a run, from the checkpoint of step ``from_step`` (0: none)."""

    attempt: int | None = None
    from_step: int | None = None
    world: int | None = None
    zero_stage: int | None = None
    precision: str | None = None
    device: str | None = None
    threads: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
