"""One fusion study: what its trials need, how a trial trains, and what is concluded from all of them. No Ray here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from physio_dist.config import TuneConfig

SEARCHED = ("fused", "ecg", "eeg", "untrained")
"""Rows of the table that are searched for: what a trial's head is given."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Study:
    """Everything that trials need; picklable, its large arrays are plain NumPy arrays."""

    options: TuneConfig
    inputs: dict[str, npt.NDArray[np.float32]]
    notes: tuple[str, ...]


@dataclass
class TrialRecord:
    """What is known of a trial when it has ended, however it ended.

    Attributes:
        trial: its name.
        row: one of ``SEARCHED``.
        config: one of :func:`candidates`.
        history: what :func:`train` yielded.
        last: name of a fold -> last epoch that counts in the selection for that fold; absent: all of them.
        seconds: how long it took.
    """

    trial: str
    row: str
    config: dict[str, Any]
    history: list[dict[str, Any]]
    last: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a study found: ``results.json`` as an object, and the bytes of ``predictions.safetensors``."""

    results: dict[str, Any]
    predictions: bytes


def prepare(options: TuneConfig, features_url: str, say: Say) -> Study:
    """Open data and encoders, check them, embed and pool."""
    raise NotImplementedError


def candidates(options: TuneConfig) -> list[dict[str, Any]]:
    """``tune.trials`` configurations, drawn from ``search`` by ``run.seed``."""
    raise NotImplementedError


def train(study: Study, row: str, config: dict[str, Any]) -> Iterator[dict[str, float]]:
    """Train one configuration on all folds; after each epoch yields
    ``{"epoch": e, "val_auc": mean over folds, "fold_<name>": AUC on the validation people of that fold, ...}``."""
    raise NotImplementedError


def conclude(study: Study, records: list[TrialRecord], say: Say) -> Outcome:
    """Select, evaluate on the test people, compare."""
    raise NotImplementedError
