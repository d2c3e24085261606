"""Results of a sweep as typed objects: ``results.json`` and the lines of ``trials.jsonl``.

The study makes them, the report reads them. A number that is not defined is NaN, in the files null.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from physio_dist.runs.typed_json import OPTIONAL

RESULTS, PREDICTIONS, TRIALS, EMBEDDING = (
    "results.json", "predictions.safetensors", "trials.jsonl", "embedding.safetensors",
)  # fmt: skip
BOUND = "bound_"
Interval = tuple[float, float]
NO_INTERVAL = (math.nan, math.nan)


@dataclass(frozen=True)
class Scores:
    """Scores of one set of predictions, each between 0 and 1."""

    accuracy: float = math.nan
    balanced_accuracy: float = math.nan
    macro_f1: float = math.nan
    auc: float = math.nan
    pr_auc: float = math.nan


@dataclass(frozen=True)
class FoldSize:
    """A fold's test set."""

    fold: str
    people: int | None = None
    windows: int | None = None


@dataclass(frozen=True)
class FoldResult(Scores, FoldSize):
    """A row on the held-out people of one fold; ``config`` and ``epoch`` are what the fold selected, None without a
    search."""

    config: dict[str, Any] | None = None
    epoch: int | None = None


@dataclass(frozen=True)
class RowInput:
    """Name of a row, and the signals that it is given."""

    name: str
    modalities: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ResultRow(Scores, RowInput):
    """One kind of input over the pooled windows of all held-out people.

    Attributes:
        ece: expected calibration error.
        ece_before: the same before temperatures were fitted; NaN where none were.
        auc_ci: 95 % interval over people of ``auc``; None where it is not defined.
        per_fold: the same in each fold.
        spread: standard deviations over folds.
        confusion: counts ``[true class][predicted class]``.
    """

    ece: float = math.nan
    ece_before: float = field(default=math.nan, metadata=OPTIONAL)
    auc_ci: Interval | None = None
    per_fold: list[FoldResult] = field(default_factory=list)
    spread: Scores = field(default_factory=Scores)
    confusion: list[list[int]] | None = None

    @property
    def interval(self) -> Interval:
        """``auc_ci``, NaNs where it is not defined."""
        return self.auc_ci or NO_INTERVAL


@dataclass(frozen=True)
class RowDifference:
    """ROC-AUC of ``row`` minus that of ``minus`` on the same people, with its interval and two-sided p value."""

    row: str
    minus: str
    auc: float
    ci: Interval | None
    p: float


@dataclass(frozen=True)
class Selection:
    """Selection of configurations: the rule in words, its metric, and for each row the number of trials and the metric
    of each fold's choice."""

    rule: str
    metric: str = "auc"
    trials: dict[str, int] = field(default_factory=dict)
    val_auc: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Published:
    """A figure that a paper reports of the same task; ``unknown`` says what it leaves open."""

    source: str
    metric: str
    value: float
    unknown: str = ""


@dataclass(frozen=True)
class PermutationControl:
    """Control with permuted labels.

    Attributes:
        n: number of permutations.
        auc: ROC-AUC under each of them, ``mean`` their mean.
        p_leak: p value of the mean being above chance.
        p: p value of the observed AUC.
    """

    n: int
    auc: list[float]
    mean: float = math.nan
    p_leak: float = math.nan
    p: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Occlusion:
    """Effect of a signal that is replaced by its mean in the fused heads' input.

    Attributes:
        signal: name of the signal.
        auc_drop: ROC-AUC with everything minus that without it, with its interval ``ci`` over people.
        prob_shift: mean total variation distance between the probabilities with and without it.
    """

    signal: str = ""
    auc_drop: float = math.nan
    ci: Interval | None = None
    prob_shift: float = math.nan

    @property
    def label(self) -> str:
        """Name of the part."""
        return self.signal

    @property
    def interval(self) -> Interval:
        """``ci``, NaNs where it is not defined."""
        return self.ci or NO_INTERVAL


@dataclass(frozen=True, kw_only=True)
class ChannelOcclusion(Occlusion):
    """Effect of one channel of a signal."""

    channel: str

    @property
    def label(self) -> str:
        """Name of the channel."""
        return self.channel


@dataclass(frozen=True, kw_only=True)
class PatchOcclusion(Occlusion):
    """Effect of one patch of a signal: ``start_s`` from the start of the window and ``seconds`` long."""

    start_s: float
    seconds: float

    @property
    def label(self) -> str:
        """Start of the patch."""
        return f"{self.start_s:g} s"


@dataclass(frozen=True)
class OcclusionResults:
    """Occlusion analysis of the fused heads on ``windows`` of ``people``; ``auc`` is that without any occlusion."""

    windows: int = 0
    people: int | None = None
    auc: float = math.nan
    signals: list[Occlusion] = field(default_factory=list)
    channels: list[ChannelOcclusion] = field(default_factory=list)
    patches: list[PatchOcclusion] = field(default_factory=list)


@dataclass(frozen=True)
class NeighbourShares:
    """Shares of a window's nearest neighbours in feature space: of the same person, and among the nearest windows of
    other people those of the same label; ``*_chance``: of neighbours drawn at random."""

    windows: int = 0
    people: int | None = None
    person: float = math.nan
    person_chance: float = math.nan
    label: float = math.nan
    label_chance: float = math.nan


@dataclass(frozen=True)
class EmbeddingSummary:
    """Number of neighbours looked at, and the shares for each signal whose features were embedded."""

    neighbours: int = 0
    ecg: NeighbourShares | None = field(default=None, metadata=OPTIONAL)
    eeg: NeighbourShares | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class SweepResults:
    """``results.json``.

    ``encoders``: signal -> ``url``, ``sha256``, ``people`` and ``simulated`` of its encoder, or these of each fold
    under ``by_fold``.
    """

    task: str = ""
    protocol: str = ""
    leaky: bool = False
    label: str = ""
    classes: list[str] = field(default_factory=list)
    simulated: bool | None = None
    windows: int | None = None
    people: int | None = None
    folds: list[FoldSize] = field(default_factory=list)
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    selection: Selection | None = None
    notes: list[str] = field(default_factory=list)
    rows: list[ResultRow]
    differences: list[RowDifference] = field(default_factory=list)
    published: Published | None = field(default=None, metadata=OPTIONAL)
    permuted: PermutationControl | None = field(default=None, metadata=OPTIONAL)
    occlusion: OcclusionResults | None = field(default=None, metadata=OPTIONAL)
    embedding: EmbeddingSummary | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True)
class TrialResult:
    """A line of ``trials.jsonl``: one configuration for one row.

    Attributes:
        trial: its name.
        row: the row that it was tried for.
        config: the configuration.
        val_auc: best ROC-AUC on validation people.
        epochs: number of epochs, ``stopped`` where they are fewer than planned.
        seconds: duration.
        history: ``(epoch, val_auc)`` of each epoch.
        folds: other values of each epoch, by name.
        last: name of a fold -> last epoch that counts in its selection; absent: all of them.
    """

    row: str
    config: dict[str, Any]
    trial: str = ""
    val_auc: float = math.nan
    epochs: int = 0
    stopped: bool = False
    seconds: float = math.nan
    history: list[tuple[int, float]] = field(default_factory=list)
    folds: dict[str, list[float]] = field(default_factory=dict)
    last: dict[str, int] = field(default_factory=dict)
