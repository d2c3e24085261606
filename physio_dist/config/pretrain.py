"""Options of ``pretrain.py`` and ``launch.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from physio_dist.config.cache import CacheOptions
from physio_dist.config.cluster import ClusterOptions
from physio_dist.config.mask import MaskOptions
from physio_dist.config.options import (
    NOT_NEGATIVE,
    POSITIVE,
    ChangeUrl,
    OneOf,
    Range,
    at_least,
    folder_name,
    inside,
    one_url,
    option,
)
from physio_dist.errors import UserError

PRESETS = ("tiny", "base", "large", "xl")
PRECISIONS = ("fp32", "bf16", "fp16")

_FRACTION = Range(0.0, 1.0, "it must be at least 0 and below 1", open_high=True)
_ABOVE_ZERO = Range(0.0, math.inf, "it must be positive", open_low=True)


@dataclass
class RunOptions:
    """Folder and name of a run, and its seed."""

    name: str = option("pretrain", "Folder of the run below `run.dir`.", folder_name)
    dir: str = option("runs", "Folder of runs, a path or a URL.", urls=one_url)
    seed: int = option(0, "Seed of everything random: the same seed gives the same run.")


class ShardSource(NamedTuple):
    """One shard set of the training data.

    Attributes:
        url: folder of the shard set.
        weight: share of the global batch, relative to the weights of the other sets.
    """

    url: str
    weight: float = 1.0


def _parse_index(name: str, value: Any) -> list[ShardSource]:
    form = f"{name} must be a URL or a list of {{url: ..., weight: ...}}"
    if isinstance(value, str) and value:
        return [ShardSource(_set_url(value))]
    if not isinstance(value, list) or not value:
        raise UserError(f"{form}, not {value!r}")
    sources = []
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("url"), str) or set(item) - {"url", "weight"}:
            raise UserError(f"{form}; this entry is not: {item!r}")
        weight = item.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
            raise UserError(f"{form}; the weight of {item['url']} must be a positive number, not {weight!r}")
        sources.append(ShardSource(_set_url(item["url"]), float(weight)))
    # The weight of a single set has no effect, so that runs with different ones are the same run.
    return sources if len(sources) > 1 else [ShardSource(sources[0].url)]


def _set_url(url: str) -> str:
    return url.removesuffix("/index.json").rstrip("/") or "/"


def _plain_index(sources: list[ShardSource]) -> str | list[dict[str, Any]]:
    return sources[0].url if len(sources) == 1 else [source._asdict() for source in sources]


def _index_urls(sources: list[ShardSource], change: ChangeUrl) -> list[ShardSource]:
    return [source._replace(url=change(source.url)) for source in sources]


@dataclass
class DataOptions(CacheOptions):
    """Training data and the node's cache of it."""

    index: list[ShardSource] = option(
        [], "URL of a shard set, with or without `/index.json`, or a list of `{url, weight}`.",
        required=True, parse=_parse_index, plain=_plain_index, urls=_index_urls,
    )  # fmt: skip
    signal: str = option("ecg", "Signal of the shard set that is trained on.", OneOf(("ecg", "eeg")))


@dataclass
class ModelOptions:
    """Size and dropout of the encoder."""

    preset: str = option("base", "Named size of the encoder.", OneOf(PRESETS))
    dropout: float = option(0.1, "Dropout probability.", inside(0.0, 0.9))


def _check_spike_factor(name: str, value: float) -> None:
    if value != 0 and not 1 < value < math.inf:
        raise UserError(f"{name}={value}: it must be above 1, or 0 to look for no spikes")


def _check_profile(name: str, value: list[int]) -> None:
    if value and not (len(value) == 2 and 1 <= value[0] <= value[1]):
        raise UserError(f"{name}={value}: it must be [first, last], steps that count from 1")


@dataclass
class TrainOptions:
    """Optimization, logging and checkpoints."""

    steps: int = option(1000, "Optimizer steps.", at_least(1))
    global_batch: int = option(128, "Windows of a step, over all ranks.", at_least(1))
    micro_batch: int = option(
        32,
        "Most windows of one forward pass, into which a rank's share of the global batch is split.",
        at_least(1),
    )
    precision: str = option("bf16", "Floating-point type of the forward and backward pass.", OneOf(PRECISIONS))
    lr: float = option(5e-4, "Peak learning rate.", POSITIVE)
    min_lr: float = option(1e-5, "Learning rate at the end of the cosine schedule.", NOT_NEGATIVE)
    warmup_steps: int = option(100, "Steps of linear warm-up.", NOT_NEGATIVE)
    weight_decay: float = option(0.05, "Decoupled weight decay of AdamW.", NOT_NEGATIVE)
    loss: str = option(
        "relative",
        "Squared error, `relative` to each lead's mean square or not.",
        OneOf(("relative", "squared")),
    )
    beta1: float = option(0.9, "AdamW's beta1.", _FRACTION)
    beta2: float = option(0.999, "AdamW's beta2.", _FRACTION)
    max_grad_norm: float = option(1.0, "Norm that gradients are clipped to.", _ABOVE_ZERO)
    spike_factor: float = option(
        10.0,
        "A loss, or a gradient norm above `max_grad_norm`, that exceeds the median of the last 128 steps by this "
        "factor is a spike; 0: no step is.",
        _check_spike_factor,
    )
    skip_spikes: bool = option(False, "Skip the optimizer step at a spike.")
    ema: float = option(
        0.0, "Decay of an exponential moving average of the weights, which an export then takes; 0: none.", _FRACTION
    )
    hang_timeout_s: float = option(
        600.0, "Seconds without progress after which a rank prints the stacks of its threads.", _ABOVE_ZERO
    )
    profile: list[int] = option(
        [], "`[first, last]` step that torch's profiler records on the first rank, into `profile.json` of the run.",
        _check_profile,
    )  # fmt: skip
    tracker: str = option("none", "Experiment tracker, through its own library.", OneOf(("none", "mlflow", "wandb")))
    log_every: int = option(10, "Steps between two lines of `metrics.jsonl`.", at_least(1))
    save_every: int = option(500, "Steps between two checkpoints.", at_least(1))
    val_every: int = option(200, "Steps between two validations.", at_least(1))
    val_samples: int = option(1024, "Most held-out windows of a validation.", NOT_NEGATIVE)
    keep_checkpoints: int = option(3, "Newest committed checkpoints that are kept.", at_least(1))
    log_sample_keys: bool = option(False, "Write the sample keys of every step to `trace/rank-R.jsonl`.")
    threads: int = option(0, "CPU threads of a rank; 0 divides the machine's cores among its ranks.", NOT_NEGATIVE)


@dataclass
class ZeroOptions:
    """DeepSpeed ZeRO."""

    stage: int = option(1, "ZeRO stage.", Range(0, 3, "ZeRO has the stages 0, 1, 2 and 3"))


@dataclass(frozen=True)
class Resume:
    """Starting point of a run.

    Attributes:
        existing: whether a run that is there already goes on; otherwise it is refused.
        url: checkpoint that a run without one of its own starts from.
    """

    existing: bool = True
    url: str | None = None


def _parse_resume(_: str, value: str) -> Resume:
    return Resume(existing=value != "none", url=None if value in ("auto", "none") else value)


def _plain_resume(resume: Resume) -> str:
    return resume.url or ("auto" if resume.existing else "none")


def _resume_urls(resume: Resume, change: ChangeUrl) -> Resume:
    return resume if resume.url is None else replace(resume, url=change(resume.url))


@dataclass
class PretrainConfig:
    """Options of ``pretrain.py`` and ``launch.py``."""

    run: RunOptions = field(default_factory=RunOptions)
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    mask: MaskOptions = field(default_factory=MaskOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    zero: ZeroOptions = field(default_factory=ZeroOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    resume: Resume = option(
        Resume(), "`auto`: from the newest committed checkpoint; `none`: a new run; or the URL of a checkpoint.",
        parse=_parse_resume, plain=_plain_resume, urls=_resume_urls,
    )  # fmt: skip

    def validate(self) -> None:
        """Refuse options that do not go together.

        Raises:
            UserError: names the option.
        """
        if self.mask.lead_dropout > 0 and self.data.signal != "ecg":
            raise UserError(
                f"mask.lead_dropout={self.mask.lead_dropout} is for data.signal=ecg: there are no such sets of "
                "electrodes"
            )
        if self.train.skip_spikes and self.train.spike_factor == 0:
            raise UserError(
                "train.skip_spikes=true leaves out what train.spike_factor finds, which is 0 here: give both"
            )
