"""Results of a sweep as typed objects: ``results.json`` and the lines of ``trials.jsonl``.

The study makes them, the report reads them. A number that is not defined is NaN, in the files null.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import nan
from typing import Any

from physio_dist.runs.typed_json import OPTIONAL

RESULTS, TRIALS = "results.json", "trials.jsonl"
PREDICTIONS, EMBEDDING = "predictions.safetensors", "embedding.safetensors"
# Rows with the best possible result on simulated signals have this before the name of the row they bound.
BOUND = "bound_"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Scores:
    """Scores of one set of predictions, each between 0 and 1."""

    accuracy: float = nan
    balanced_accuracy: float = nan
    macro_f1: float = nan
    auc: float = nan
    pr_auc: float = nan


@dataclass(frozen=True)
class FoldSize:
    """A fold's test set."""

    fold: str
    people: int | None = None
    windows: int | None = None


@dataclass(frozen=True)
class FoldResult(Scores, FoldSize):
    """A row on the held-out people of one fold, with what the fold selected (None without a search)."""

    config: dict[str, Any] | None = None
    epoch: int | None = None


@dataclass(frozen=True)
class RowInput:
    """Name of a row, and the signals that it is given."""

    name: str
    modalities: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ResultRow(Scores, RowInput):
    """One kind of input over the pooled windows of all held-out people."""

    ece: float = nan  # expected calibration error
    ece_before: float = field(default=nan, metadata=OPTIONAL)  # before temperatures were fitted
    auc_ci: Interval | None = None  # 95 % interval over people
    per_fold: list[FoldResult] = field(default_factory=list)
    spread: Scores = field(default_factory=Scores)  # standard deviations over folds
    confusion: list[list[int]] | None = None  # counts [true class][predicted class]


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
    """Rule of the selection in words, and for each row the number of trials and the metric of each fold's choice."""

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
    """ROC-AUC under ``n`` permutations of the labels."""

    n: int
    auc: list[float]
    mean: float = nan
    p_leak: float = nan  # p value of the mean being above chance
    p: float = nan  # p value of the observed AUC


@dataclass(frozen=True, kw_only=True)
class Occlusion:
    """Effect of a signal that is replaced by its mean in the fused heads' input."""

    signal: str = ""
    auc_drop: float = nan  # ROC-AUC with everything minus that without it
    ci: Interval | None = None  # 95 % interval over people
    prob_shift: float = nan  # mean total variation distance between the probabilities with and without it

    @property
    def label(self) -> str:
        """Name of the part."""
        return self.signal


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
    auc: float = nan
    signals: list[Occlusion] = field(default_factory=list)
    channels: list[ChannelOcclusion] = field(default_factory=list)
    patches: list[PatchOcclusion] = field(default_factory=list)


@dataclass(frozen=True)
class NeighbourShares:
    """Shares of a window's nearest neighbours that are of the same person, and of those of other people that have the
    same label; ``*_chance``: of neighbours drawn at random."""

    windows: int = 0
    people: int | None = None
    person: float = nan
    person_chance: float = nan
    label: float = nan
    label_chance: float = nan


@dataclass(frozen=True)
class EmbeddingSummary:
    """Number of neighbours looked at, and the shares for each signal whose features were embedded."""

    neighbours: int = 0
    ecg: NeighbourShares | None = field(default=None, metadata=OPTIONAL)
    eeg: NeighbourShares | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class SweepResults:
    """``results.json``."""

    task: str = ""
    protocol: str = ""
    leaky: bool = False
    label: str = ""
    classes: list[str] = field(default_factory=list)
    simulated: bool | None = None
    windows: int | None = None
    people: int | None = None
    folds: list[FoldSize] = field(default_factory=list)
    # Signal -> url, sha256, people and simulated of its encoder, or these of each fold under by_fold.
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
    """A line of ``trials.jsonl``: one configuration for one row."""

    row: str
    config: dict[str, Any]
    trial: str = ""
    val_auc: float = nan  # best of all epochs
    epochs: int = 0
    stopped: bool = False  # before the planned number of epochs
    seconds: float = nan
    history: list[tuple[int, float]] = field(default_factory=list)  # epoch, val_auc
    folds: dict[str, list[float]] = field(default_factory=dict)  # other values of each epoch, by name
    last: dict[str, int] = field(default_factory=dict)  # fold -> last epoch that counts in its selection; absent: all
