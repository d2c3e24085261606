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
    """A shard set in ``data.json``.

    Attributes:
        url, fingerprint: of the set.
        splits: name of a split -> windows in it.
        people: in all splits.
        rate: Hz.
        channels: names, of all signals one after the other.
        signals: name of a signal -> names of its channels; None of a run that reads one signal.
        simulated: whether any of it is; None where unknown.
        sources: corpora.
    """

    url: str = ""
    fingerprint: str = ""
    splits: dict[str, int] = field(default_factory=dict)
    people: int | None = None
    rate: float = math.nan
    channels: list[str] = field(default_factory=list)
    signals: dict[str, list[str]] | None = field(default=None, metadata=OPTIONAL)
    simulated: bool | None = None
    sources: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DataFacts:
    """``data.json``; ``encoders`` of a sweep: see :class:`~physio_dist.runs.sweep_results.SweepResults`."""

    indexes: list[ShardSetFacts]
    encoders: dict[str, Any] | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class Attempt:
    """An entry of ``attempts.json``: one start of a run.

    Attributes:
        attempt: number of the start, from 1.
        from_step: last step of the checkpoint it went on from; 0 at the first start.
        world: number of ranks.
        zero_stage, precision, device, threads: of the training.
        versions: name of a package -> version.
    """

    attempt: int | None = None
    from_step: int | None = None
    world: int | None = None
    zero_stage: int | None = None
    precision: str | None = None
    device: str | None = None
    threads: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
