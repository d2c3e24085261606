"""Options of ``physio-dist shard`` and ``physio-dist index``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from physio_dist.config.cluster import MAX_WAIT_S
from physio_dist.config.options import OneOf, Range, inside, option
from physio_dist.errors import UserError

_POSITIVE = Range(0.0, math.inf, "it must be positive", open_low=True, open_high=True)


@dataclass
class SplitOptions:
    """Shares of subjects held out, by hash."""

    val: float = option(0.1, "Share of the subjects in the validation split.", inside(0.0, 1.0))
    test: float = option(0.1, "Share of the subjects in the test split.", inside(0.0, 1.0))


@dataclass
class WindowOptions:
    """Windows, and the ECG's pass band; :class:`physio_dist.signals.windows.WindowSpec` checks them together."""

    rate: int = option(200, "Sampling rate of the windows in Hz.")
    seconds: float = option(10.0, "Length of a window in seconds.")
    low: float = option(0.5, "Lower edge of the ECG's pass band in Hz.")
    high: float = option(45.0, "Upper edge of the ECG's pass band in Hz.")
    uv_per_bit: float = option(1.0, "Microvolts of one unit of the stored ECG.")


@dataclass
class EegOptions:
    """Channels and pass band of the EEG."""

    channels: str = option(
        "", "Electrode names, comma-separated, in storage order; empty for the 19 of the 10-20 system."
    )
    low: float = option(0.3, "Lower edge of the EEG's pass band in Hz.")
    high: float = option(75.0, "Upper edge in Hz, lowered where a recording's sampling rate does not allow it.")
    uv_per_bit: float = option(0.1, "Microvolts of one unit of the stored EEG.")


@dataclass
class ShardConfig:
    """The ``key=value`` options of ``physio-dist shard``."""

    signals: str = option("ecg", "`ecg`, `eeg`, or `ecg,eeg`: every record needs all of them.")
    unusable: str = option(
        "drop", "`keep` unusable windows, marked in their json, or `drop` them.", OneOf(("keep", "drop"))
    )
    split: SplitOptions = field(default_factory=SplitOptions)
    window: WindowOptions = field(default_factory=WindowOptions)
    leads: str = option("", "ECG lead names, comma-separated, in storage order; empty for the standard twelve.")
    eeg: EegOptions = field(default_factory=EegOptions)
    missing_channels: str = option(
        "reject", "A record without one of the leads is left out (`reject`), or kept with the lead marked invalid.",
        OneOf(("reject", "mask")),
    )  # fmt: skip
    min_leads: int = option(10, "Leads that must be valid in a usable window (or all of a record's, if fewer).")
    swapped_leads: str = option(
        "repair", "Two limb leads with exchanged names are put right (`repair`), or the record is left out.",
        OneOf(("repair", "reject")),
    )  # fmt: skip
    labels: str | None = option(
        None, "CSV whose column `record` or `file` names records; the other columns become labels."
    )
    person: str | None = option(None, "Column of that CSV that identifies the subject.")
    source: str | None = option(
        None, "Name of the corpus: subjects and records of two sources are never taken for the same."
    )
    exclude: str | None = option(None, "Shard sets, comma-separated URLs, whose recordings are left out here.")
    samples_per_shard: int = option(1000, "Windows of a shard.")
    workers: int = option(0, "Worker processes; 0 takes every core.")
    ray: str = option("", "Address of a Ray cluster that does the work, or `auto`; empty for local processes.")
    placement_timeout_s: float = option(
        0.0, "Seconds to wait for nodes that an autoscaler may add if the Ray cluster has no CPU at first.",
        inside(0.0, MAX_WAIT_S),
    )  # fmt: skip

    def validate(self) -> None:
        """Refuse options that do not go together.

        Raises:
            UserError: names the option.
        """
        if self.split.val + self.split.test > 1:
            raise UserError("split.val and split.test add up to more than 1")
        if self.person is not None and self.labels is None:
            raise UserError(f"person={self.person} names a column of a CSV: give labels=FILE.csv too")
        if self.samples_per_shard < 1 or self.workers < 0:
            raise UserError("samples_per_shard must be at least 1 and workers must not be negative")


@dataclass
class IndexOptions:
    """The ``key=value`` options of ``physio-dist index``."""

    channels: str = option(
        "",
        "Names of the arrays' rows, comma-separated, in their order; empty for the twelve standard leads of an ECG, if "
        "the limb leads fulfil their identities.",
    )
    rate: float = option(200.0, "Sampling rate in Hz.", _POSITIVE)
    uv_per_bit: float = option(1.0, "Microvolts of one unit of the arrays.", _POSITIVE)
    person: str | None = option(None, "Field of the samples' json that identifies the subject; default `person`.")
    val: float = option(0.1, "Share of the subjects in the validation split.")
    test: float = option(0.1, "Share of the subjects in the test split.")

    def validate(self) -> None:
        """Refuse options that do not go together.

        Raises:
            UserError: names the option.
        """
        names = self.names()
        if not all(names) or len(set(names)) < len(names):
            raise UserError(f"channels={self.channels}: it must name every row of the arrays, each only once")
        if not (self.val >= 0 and self.test >= 0 and self.val + self.test <= 1):
            raise UserError(f"val={self.val} and test={self.test}: shares of people, together at most 1")

    def names(self) -> tuple[str, ...]:
        """Names of the arrays' rows; none where the options leave them open."""
        return tuple(word.strip() for word in self.channels.split(",")) if self.channels else ()
