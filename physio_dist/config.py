"""Every option, its default and its checks.

Options come in three layers, later ones winning: the defaults below, a YAML file, and ``key=value`` words of
the command line. The merge is OmegaConf's; the checks and the messages are ours.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from physio_dist import storage
from physio_dist.errors import PhysioError, UserError, closest, nearest

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
    intra_ratio: float = 0.5
    inter_ratio: float = 0.3


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
    beta1: float = 0.9
    beta2: float = 0.999
    clip: float = 1.0
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
    """The options of ``pretrain.py``."""

    run: RunOptions = field(default_factory=RunOptions)
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    mask: MaskOptions = field(default_factory=MaskOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    zero: ZeroOptions = field(default_factory=ZeroOptions)
    # auto: go on from the newest committed checkpoint; none: a new run; else the URL of a checkpoint.
    resume: str = "auto"


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


T = TypeVar("T")


def load(schema: type[T], file: str | None, overrides: Sequence[str], check: Callable[[T], None]) -> T:
    """Defaults <- YAML file <- ``key=value`` words, as an instance of ``schema``.

    Raises:
        UserError: an unreadable file, an unknown option (with the nearest known one), a value of the wrong
            type, or a value that ``check`` refuses.
    """
    merged: Any = OmegaConf.structured(schema)
    types = option_types(schema)
    if file is not None:
        merged = _merge(merged, _read_yaml(file, types), types, where=file)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"option {word!r} is not of the form key=value")
        merged = _merge(merged, _layer(key, text, types), types, where="command line")
    try:
        if missing := sorted(str(name) for name in OmegaConf.missing_keys(merged)):
            raise UserError(f"option {missing[0]} is needed and has no default: give {missing[0]}=...")
        options: T = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # ${...} that leads nowhere
        raise UserError(f"option {error.full_key or ''}: {_first_line(error)}") from None
    check(options)
    return options


def _layer(key: str, text: str, types: dict[str, Any]) -> Any:
    """One ``key=value`` of the command line as a layer of options."""
    if key not in types:
        raise UserError(f"unknown option {key!r} (command line): {nearest(key, types)}")
    if "str" in str(types[key]):
        # Taken as it is written: YAML would make numbers of 007 and 1e-3, and a truth of `on`.
        value: Any = None if text in ("", "null") and "None" in str(types[key]) else text
        layer = OmegaConf.create({})
        OmegaConf.update(layer, key, value)
        return layer
    try:
        return OmegaConf.from_dotlist([f"{key}={text}"])
    except Exception as error:  # the YAML parser's errors have no common base with OmegaConf's
        raise UserError(f"option {key}={text} is not valid YAML: {_first_line(error)}") from None


def option_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """Every option of a schema as a dotted name, with its type."""
    types: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[item.name]):
            types.update(option_types(hints[item.name], f"{prefix}{item.name}."))
        else:
            types[prefix + item.name] = hints[item.name]
    return types


def to_yaml(options: Any) -> str:
    """The resolved options as YAML, in schema order."""
    return OmegaConf.to_yaml(OmegaConf.structured(options))


def flatten(options: Any) -> dict[str, Any]:
    """Resolved options as ``{dotted name: value}``; lists and free-form values stay whole."""
    flat: dict[str, Any] = {}

    def walk(value: dict[str, Any], prefix: str) -> None:
        for key, inner in value.items():
            if isinstance(inner, dict):
                walk(inner, f"{prefix}{key}.")
            else:
                flat[prefix + key] = inner

    walk(dataclasses.asdict(options) if dataclasses.is_dataclass(options) else options, "")  # type: ignore[arg-type]
    return flat


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
    if not options.data.cache_gb > 0:
        raise UserError(f"data.cache_gb={options.data.cache_gb}: it must be positive")
    if not options.run.name or "/" in options.run.name or options.run.name.startswith("."):
        raise UserError(f"run.name={options.run.name!r}: it must be a plain folder name")
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


def _set_url(url: str) -> str:
    return url.removesuffix("/index.json").rstrip("/") or "/"


def _read_yaml(file: str, types: dict[str, Any]) -> DictConfig:
    try:
        layer = OmegaConf.load(io.StringIO(storage.read_bytes(file).decode()))
    except storage.NotFoundError:
        raise UserError(f"configuration file {file} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file: {error.reason}") from None
    except PhysioError:
        raise
    except Exception as error:  # yaml.YAMLError, whose package is OmegaConf's dependency and not ours
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(layer, DictConfig):
        raise UserError(f"{file} must hold options by name, not a list")
    for section in {name.split(".")[0] for name in types if "." in name} & {str(key) for key in layer}:
        if layer[section] is None:  # all of its lines are commented out
            del layer[section]
        elif not isinstance(layer[section], DictConfig):
            raise UserError(f"{file}: {section} must hold options by name, not {layer[section]!r}")
    return layer


def _merge(base: Any, layer: Any, types: dict[str, Any], where: str) -> Any:
    try:
        return OmegaConf.merge(base, layer)
    except ConfigKeyError as error:
        key = str(error.full_key)
        inside = [name for name in types if name.startswith(f"{key.split('.')[0]}.")]
        known = inside or {name.split(".")[0] for name in types}
        raise UserError(f"unknown option {key!r} ({where}): {nearest(key, known)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"option {error.full_key or ''} ({where}): {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        hint = closest(value, allowed)
        raise UserError(f"{name}={value}: it must be one of {', '.join(allowed)}{'; ' if hint else ''}{hint}")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise UserError(f"{name}={value}: it must lie between {low:g} and {high:g}")
