"""Every option, its default and its checks; ``options.py`` merges them with a file and the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from physio_dist.cluster_options import LONGEST_S, ClusterOptions, check_cluster
from physio_dist.errors import UserError
from physio_dist.options import between as _between
from physio_dist.options import flatten as flatten
from physio_dist.options import load as load
from physio_dist.options import one_of as _one_of
from physio_dist.options import option_types as option_types
from physio_dist.options import plain_name as _run_name
from physio_dist.options import refuse_another as refuse_another
from physio_dist.options import to_yaml as to_yaml
from physio_dist.search_options import POOLINGS as POOLINGS
from physio_dist.search_options import SearchOptions as SearchOptions
from physio_dist.search_options import check_search
from physio_dist.task_options import TaskOptions, check_task

PRESETS = ("tiny", "base", "large", "xl")
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass
class RunOptions:
    name: str = "pretrain"
    dir: str = "runs"
    seed: int = 0


@dataclass
class DataOptions:
    # A shard set's URL, or a list of {url, weight}.
    index: Any = "???"
    # The signal of the shard set that is trained on: ecg or eeg.
    signal: str = "ecg"
    cache_dir: str = "~/.cache/physio-dist"
    cache_gb: float = 50.0


@dataclass
class ModelOptions:
    preset: str = "base"
    dropout: float = 0.1


@dataclass
class MaskOptions:
    # Share of patches hidden in time; probability that a lead, or the limb leads together, are hidden whole.
    intra_ratio: float = 0.5
    inter_ratio: float = 0.3
    # Mean length in patches of what is hidden in time; 0 or 1: scattered; null: half of the samples each way.
    span: float | None = None
    # both in every sample, or alternating: each sample has one of the two.
    mode: str = "both"
    # Probability that a sample is shown with 8, 2 or 1 of its ECG leads only.
    lead_drop: float = 0.0


@dataclass
class TrainOptions:
    steps: int = 1000
    global_batch: int = 128
    # A maximum: a rank's share of the global batch is cut into pieces of at most this many windows.
    micro_batch: int = 32
    precision: str = "bf16"
    lr: float = 5e-4
    min_lr: float = 1e-5
    warmup_steps: int = 100
    weight_decay: float = 0.05
    # What is minimised: the squared error relative to each lead's mean square, or the squared error itself.
    loss: str = "relative"
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
    # A loss, or a gradient norm above clip, so many times the median of the last 128 steps is a spike; 0 for none.
    spike_factor: float = 10.0
    # Leave steps with a spike out.
    skip_spikes: bool = False
    # Decay of a moving average of the weights, which an export then takes; 0 keeps none.
    ema: float = 0.0
    # Seconds without progress after which a rank says where it hangs.
    stall_s: float = 600.0
    # [first, last]: steps of the first rank that torch's profiler looks at, into profile.json of the run.
    profile: list[int] = field(default_factory=list)
    # none, mlflow or wandb, through their own libraries.
    tracker: str = "none"
    log_every: int = 10
    save_every: int = 500
    val_every: int = 200
    # Held-out windows in each validation, at most.
    val_samples: int = 1024
    # Committed checkpoints that are kept; older ones are deleted.
    keep: int = 3
    trace: bool = False
    # CPU threads of a rank; 0 shares the machine's cores among its ranks.
    threads: int = 0


@dataclass
class ZeroOptions:
    stage: int = 1


@dataclass
class PretrainConfig:
    """The options of ``pretrain.py`` and ``launch.py``."""

    run: RunOptions = field(default_factory=RunOptions)
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    mask: MaskOptions = field(default_factory=MaskOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    zero: ZeroOptions = field(default_factory=ZeroOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    # auto: go on from the newest committed checkpoint; none: a new run; else the URL of a checkpoint.
    resume: str = "auto"


@dataclass
class TuneOptions(TaskOptions):
    # Shard set with both signals and labels.
    data: str = "???"
    # An export's folder, with {fold} for the fold's name, or {fold: folder}; for EEG also a CBraMod checkpoint by URL.
    ecg_encoder: Any = "???"
    eeg_encoder: Any = "???"
    # Configurations that are tried; each for every kind of input.
    trials: int = 32
    # latin_hypercube draws all of them beforehand; optuna proposes by what was found, for each row and fold apart.
    search: str = "latin_hypercube"
    # asha stops what falls behind; fifo lets every trial finish.
    scheduler: str = "asha"
    max_epochs: int = 40
    # Configurations that each fold selects, best first, and whose heads' probabilities are averaged at the test.
    ensemble: int = 1
    # CPUs of a trial.
    cpus: float = 1.0
    # Seconds to wait for nodes that an autoscaler may bring, where there is no room for a trial at first.
    wait_s: float = 0.0
    # Folder of Ray Tune's own state; empty for run.dir/run.name/ray.
    storage: str = ""
    # Folder in which frozen features are kept for this sweep and later ones; empty for run.dir/features.
    features: str = ""
    # Evaluations with labels permuted by recording within people, as a control for leakage.
    permutations: int = 0
    # Fit the temperature of each head's probabilities on its validation people.
    calibrate: bool = False
    # Rows with one modality replaced by noise, as a control: they should gain nothing over the other alone.
    noise_control: bool = False
    # A row more: both encoders and a linear head over them trained end to end, what freezing costs.
    finetune: bool = False
    finetune_epochs: int = 5
    # Of the encoders; the head's is ten times that.
    finetune_lr: float = 1e-4


@dataclass
class TuneConfig:
    """The options of ``tune.py``."""

    run: RunOptions = field(default_factory=lambda: RunOptions(name="sweep"))
    tune: TuneOptions = field(default_factory=TuneOptions)
    search: SearchOptions = field(default_factory=SearchOptions)


@dataclass
class SplitOptions:
    val: float = 0.1
    test: float = 0.1


@dataclass
class WindowOptions:
    rate: int = 200
    seconds: float = 10.0
    # Pass band in Hz.
    low: float = 0.5
    high: float = 45.0
    uv_per_bit: float = 1.0


@dataclass
class EegOptions:
    # Comma-separated electrode names, in the order they are stored; empty for the 19 of the 10-20 system.
    channels: str = ""
    # Pass band in Hz; the upper edge is lowered where a recording's rate does not allow it.
    low: float = 0.3
    high: float = 75.0
    uv_per_bit: float = 0.1


@dataclass
class ShardConfig:
    """The ``key=value`` options of ``physio-dist shard``."""

    # Comma-separated: ecg, eeg or both. A record has to have all of them.
    signals: str = "ecg"
    # label keeps unfit windows and says so in their json; reject drops them.
    quality: str = "reject"
    split: SplitOptions = field(default_factory=SplitOptions)
    window: WindowOptions = field(default_factory=WindowOptions)
    # Comma-separated lead names, in the order they are stored; empty for the standard twelve.
    leads: str = ""
    eeg: EegOptions = field(default_factory=EegOptions)
    # reject: a record without one of the leads is left out; mask: it is kept, the lead marked invalid.
    missing: str = "reject"
    # Leads that must be valid in a fit window (or all that a record has, if fewer).
    min_leads: int = 10
    # repair: two limb leads that bear each other's name are put right, and it is said; reject: left out.
    exchanged: str = "repair"
    # A CSV whose column `record` or `file` names records; the other columns become labels.
    labels: str | None = None
    # The CSV's column that tells people apart.
    person: str | None = None
    # Name of the corpus: people and records of two sources are never taken for the same.
    source: str | None = None
    # URL of a shard set (or several, comma-separated) whose recordings are left out here.
    known: str | None = None
    samples_per_shard: int = 1000
    # Worker processes; 0 takes every core.
    workers: int = 0
    # Address of a Ray cluster that does the work, or auto; empty for processes of this machine.
    ray: str = ""
    # Seconds to wait for nodes that an autoscaler may bring, where the Ray cluster has no CPU at first.
    wait_s: float = 0.0


def check_pretrain(options: PretrainConfig) -> None:
    """Refuse values no run could use, before anything is read or started."""
    train, mask = options.train, options.mask
    _one_of("model.preset", options.model.preset, PRESETS)
    _one_of("train.precision", train.precision, PRECISIONS)
    _one_of("data.signal", options.data.signal, ("ecg", "eeg"))
    if options.zero.stage not in (0, 1, 2, 3):
        raise UserError(f"zero.stage={options.zero.stage}: ZeRO has the stages 0, 1, 2 and 3")
    _between("model.dropout", options.model.dropout, 0.0, 0.9)
    _between("mask.intra_ratio", mask.intra_ratio, 0.0, 1.0)
    _between("mask.inter_ratio", mask.inter_ratio, 0.0, 1.0)
    _between("mask.span", 0.0 if mask.span is None else mask.span, 0.0, 1e6)
    _one_of("mask.mode", mask.mode, ("both", "alternating"))
    _between("mask.lead_drop", mask.lead_drop, 0.0, 1.0)
    if mask.lead_drop > 0 and options.data.signal != "ecg":
        raise UserError(f"mask.lead_drop={mask.lead_drop} is for data.signal=ecg: there are no such sets of electrodes")
    for name in ("steps", "global_batch", "micro_batch", "log_every", "save_every", "val_every", "keep"):
        if getattr(train, name) < 1:
            raise UserError(f"train.{name}={getattr(train, name)}: it must be at least 1")
    for name in ("warmup_steps", "weight_decay", "min_lr", "val_samples", "threads"):
        if not 0 <= getattr(train, name) < math.inf:
            raise UserError(f"train.{name}={getattr(train, name)}: it must not be negative, nor without end")
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(train, name) < 1:
            raise UserError(f"train.{name}={getattr(train, name)}: it must be at least 0 and below 1")
    if not (train.lr > 0 and math.isfinite(train.lr)):
        raise UserError(f"train.lr={train.lr}: it must be a positive number")
    if not train.clip > 0:
        raise UserError(f"train.clip={train.clip}: it must be positive")
    if train.spike_factor != 0 and not 1 < train.spike_factor < math.inf:
        raise UserError(f"train.spike_factor={train.spike_factor}: it must be above 1, or 0 to look for no spikes")
    if not 0 <= train.ema < 1:
        raise UserError(f"train.ema={train.ema}: it must be at least 0 and below 1")
    if not train.stall_s > 0:
        raise UserError(f"train.stall_s={train.stall_s}: it must be positive")
    if train.profile and not (len(train.profile) == 2 and 1 <= train.profile[0] <= train.profile[1]):
        raise UserError(f"train.profile={train.profile}: it must be [first, last], steps that count from 1")
    _one_of("train.loss", train.loss, ("relative", "squared"))
    _one_of("train.tracker", train.tracker, ("none", "mlflow", "wandb"))
    if train.skip_spikes and train.spike_factor == 0:
        raise UserError("train.skip_spikes=true leaves out what train.spike_factor finds, which is 0 here: give both")
    if not options.data.cache_gb > 0:
        raise UserError(f"data.cache_gb={options.data.cache_gb}: it must be positive")
    _run_name(options.run.name)
    check_cluster(options.cluster)
    mixture(options.data.index)


def check_tune(options: TuneConfig) -> None:
    """Refuse values no sweep could use, before anything is read or started."""
    tune = options.tune
    _run_name(options.run.name)
    check_task(tune)
    _one_of("tune.scheduler", tune.scheduler, ("asha", "fifo"))
    _one_of("tune.search", tune.search, ("latin_hypercube", "optuna"))
    if not tune.data:
        raise UserError("tune.data is empty: give the URL of a shard set with ECG and EEG")
    least_of = {
        "folds": 2, "val_folds": 2, "trials": 1, "max_epochs": 1, "ensemble": 1, "permutations": 0, "finetune_epochs": 1
    }  # fmt: skip
    for name, least in least_of.items():
        if getattr(tune, name) < least:
            raise UserError(f"tune.{name}={getattr(tune, name)}: it must be at least {least}")
    if tune.ensemble > tune.trials:
        raise UserError(f"tune.ensemble={tune.ensemble}: only tune.trials={tune.trials} configurations are tried")
    if not 0 < tune.finetune_lr < math.inf:
        raise UserError(f"tune.finetune_lr={tune.finetune_lr}: it must be a positive number")
    if not 0 < tune.cpus < math.inf:
        raise UserError(f"tune.cpus={tune.cpus}: it must be positive")
    _between("tune.wait_s", tune.wait_s, 0.0, LONGEST_S)
    for name, value in (("ecg_encoder", tune.ecg_encoder), ("eeg_encoder", tune.eeg_encoder)):
        folders = list(value.values()) if isinstance(value, dict) else [value]
        if not folders or not all(isinstance(folder, str) and folder for folder in folders):
            raise UserError(f"tune.{name} must be a folder or {{fold: folder}}, not {value!r}")
    check_search(options.search)


def mixture(index: Any) -> list[tuple[str, float]]:
    """``data.index`` as a list of (URL, weight).

    Raises:
        UserError: neither a URL nor a list of ``{url, weight}`` with positive weights.
    """
    form = "data.index must be a URL or a list of {url: ..., weight: ...}"
    if isinstance(index, str) and index:
        return [(_set_url(index), 1.0)]
    if not isinstance(index, list) or not index:
        raise UserError(f"{form}, not {index!r}")
    parts: list[tuple[str, float]] = []
    for item in index:
        if not isinstance(item, dict) or not isinstance(item.get("url"), str) or set(item) - {"url", "weight"}:
            raise UserError(f"{form}; this entry is not: {item!r}")
        weight = item.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise UserError(f"{form}; the weight of {item['url']} must be a positive number, not {weight!r}")
        parts.append((_set_url(item["url"]), float(weight)))
    return parts


def check_shard(options: ShardConfig) -> None:
    """Refuse options that no conversion could use."""
    _one_of("quality", options.quality, ("label", "reject"))
    _one_of("missing", options.missing, ("reject", "mask"))
    _one_of("exchanged", options.exchanged, ("repair", "reject"))
    for name, share in (("split.val", options.split.val), ("split.test", options.split.test)):
        _between(name, share, 0.0, 1.0)
    if options.split.val + options.split.test > 1:
        raise UserError("split.val and split.test add up to more than 1")
    if options.person is not None and options.labels is None:
        raise UserError(f"person={options.person} names a column of a CSV: give labels=FILE.csv too")
    if options.samples_per_shard < 1 or options.workers < 0:
        raise UserError("samples_per_shard must be at least 1 and workers must not be negative")
    _between("wait_s", options.wait_s, 0.0, LONGEST_S)


def _set_url(url: str) -> str:
    return url.removesuffix("/index.json").rstrip("/") or "/"
