"""Options of ``pretrain.py`` and ``launch.py``, their defaults and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from physio_dist.config.cluster import ClusterOptions, check_cluster
from physio_dist.config.loader import between, one_of, plain_name
from physio_dist.errors import UserError

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
    lead_dropout: float = 0.0


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
    max_grad_norm: float = 1.0
    # A loss, or a gradient norm above max_grad_norm, that is so many times the median of the last 128 steps is a spike;
    # 0: no step is.
    spike_factor: float = 10.0
    # Leave steps with a spike out.
    skip_spikes: bool = False
    # Decay of a moving average of the weights, which an export then takes; 0 keeps none.
    ema: float = 0.0
    # Seconds without progress after which a rank says where it hangs.
    hang_timeout_s: float = 600.0
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
    keep_checkpoints: int = 3
    log_sample_keys: bool = False
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


def check_pretrain(options: PretrainConfig) -> None:
    """Refuse values no run could use, before anything is read or started."""
    train, mask = options.train, options.mask
    one_of("model.preset", options.model.preset, PRESETS)
    one_of("train.precision", train.precision, PRECISIONS)
    one_of("data.signal", options.data.signal, ("ecg", "eeg"))
    if options.zero.stage not in (0, 1, 2, 3):
        raise UserError(f"zero.stage={options.zero.stage}: ZeRO has the stages 0, 1, 2 and 3")
    between("model.dropout", options.model.dropout, 0.0, 0.9)
    between("mask.intra_ratio", mask.intra_ratio, 0.0, 1.0)
    between("mask.inter_ratio", mask.inter_ratio, 0.0, 1.0)
    between("mask.span", 0.0 if mask.span is None else mask.span, 0.0, 1e6)
    one_of("mask.mode", mask.mode, ("both", "alternating"))
    between("mask.lead_dropout", mask.lead_dropout, 0.0, 1.0)
    if mask.lead_dropout > 0 and options.data.signal != "ecg":
        raise UserError(
            f"mask.lead_dropout={mask.lead_dropout} is for data.signal=ecg: there are no such sets of electrodes"
        )
    for name in ("steps", "global_batch", "micro_batch", "log_every", "save_every", "val_every", "keep_checkpoints"):
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
    if not train.max_grad_norm > 0:
        raise UserError(f"train.max_grad_norm={train.max_grad_norm}: it must be positive")
    if train.spike_factor != 0 and not 1 < train.spike_factor < math.inf:
        raise UserError(f"train.spike_factor={train.spike_factor}: it must be above 1, or 0 to look for no spikes")
    if not 0 <= train.ema < 1:
        raise UserError(f"train.ema={train.ema}: it must be at least 0 and below 1")
    if not train.hang_timeout_s > 0:
        raise UserError(f"train.hang_timeout_s={train.hang_timeout_s}: it must be positive")
    if train.profile and not (len(train.profile) == 2 and 1 <= train.profile[0] <= train.profile[1]):
        raise UserError(f"train.profile={train.profile}: it must be [first, last], steps that count from 1")
    one_of("train.loss", train.loss, ("relative", "squared"))
    one_of("train.tracker", train.tracker, ("none", "mlflow", "wandb"))
    if train.skip_spikes and train.spike_factor == 0:
        raise UserError("train.skip_spikes=true leaves out what train.spike_factor finds, which is 0 here: give both")
    if not options.data.cache_gb > 0:
        raise UserError(f"data.cache_gb={options.data.cache_gb}: it must be positive")
    plain_name(options.run.name)
    check_cluster(options.cluster)
    mixture(options.data.index)


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


def _set_url(url: str) -> str:
    return url.removesuffix("/index.json").rstrip("/") or "/"
