"""Options of ``physio-dist shard``, their defaults and their checks."""

from __future__ import annotations

from dataclasses import dataclass, field

from physio_dist.config.cluster import LONGEST_S
from physio_dist.config.loader import between, one_of
from physio_dist.errors import UserError


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
    # keep: unusable windows are kept, and their json says so; drop: they are left out.
    unusable: str = "drop"
    split: SplitOptions = field(default_factory=SplitOptions)
    window: WindowOptions = field(default_factory=WindowOptions)
    # Comma-separated lead names, in the order they are stored; empty for the standard twelve.
    leads: str = ""
    eeg: EegOptions = field(default_factory=EegOptions)
    # reject: a record without one of the leads is left out; mask: it is kept, the lead marked invalid.
    missing_channels: str = "reject"
    # Leads that must be valid in a fit window (or all that a record has, if fewer).
    min_leads: int = 10
    # repair: two limb leads that bear each other's name are put right, and it is said; reject: left out.
    swapped_leads: str = "repair"
    # A CSV whose column `record` or `file` names records; the other columns become labels.
    labels: str | None = None
    # The CSV's column that tells people apart.
    person: str | None = None
    # Name of the corpus: people and records of two sources are never taken for the same.
    source: str | None = None
    # URL of a shard set (or several, comma-separated) whose recordings are left out here.
    exclude: str | None = None
    samples_per_shard: int = 1000
    # Worker processes; 0 takes every core.
    workers: int = 0
    # Address of a Ray cluster that does the work, or auto; empty for processes of this machine.
    ray: str = ""
    # Seconds to wait for nodes that an autoscaler may bring, where the Ray cluster has no CPU at first.
    placement_timeout_s: float = 0.0


def check_shard(options: ShardConfig) -> None:
    """Refuse options that no conversion could use."""
    one_of("unusable", options.unusable, ("keep", "drop"))
    one_of("missing_channels", options.missing_channels, ("reject", "mask"))
    one_of("swapped_leads", options.swapped_leads, ("repair", "reject"))
    for name, share in (("split.val", options.split.val), ("split.test", options.split.test)):
        between(name, share, 0.0, 1.0)
    if options.split.val + options.split.test > 1:
        raise UserError("split.val and split.test add up to more than 1")
    if options.person is not None and options.labels is None:
        raise UserError(f"person={options.person} names a column of a CSV: give labels=FILE.csv too")
    if options.samples_per_shard < 1 or options.workers < 0:
        raise UserError("samples_per_shard must be at least 1 and workers must not be negative")
    between("placement_timeout_s", options.placement_timeout_s, 0.0, LONGEST_S)
