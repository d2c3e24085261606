"""Recordings as readers return them: signals in microvolts, person and labels."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from physio_dist.runtime.arrays import Float32Array

MICROVOLTS = {"v": 1e6, "mv": 1e3, "uv": 1.0, "µv": 1.0, "μv": 1.0, "nv": 1e-3}
"""Microvolts in one unit, by the unit's lower-case name; micro sign and Greek mu are different characters."""


class RecordError(Exception):
    """One record is unusable or unreadable.

    ``str(error)`` is the reason that goes into ``rejects.jsonl``, so it never holds free text from a file
    header: a header may name the patient. ``person`` is the id in the source, where it is known by then, so that
    the caller can leave the id out of the reason.
    """

    person: str | None = None


@dataclass(frozen=True)
class Signal:
    """The channels of one modality, sampled together.

    ``data`` is float32 ``[channel, time]`` in microvolts with NaN where the source has no value, ``rate`` is in
    samples a second, ``channels`` are the names as the file spells them.
    """

    data: Float32Array
    rate: float
    channels: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.data.ndim != 2 or self.data.shape[0] != len(self.channels):
            raise ValueError(f"data of shape {self.data.shape} does not fit {len(self.channels)} channel names")

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return float(self.data.shape[1] / self.rate)


class LazySignals(Mapping[str, Signal]):
    """Signals that are made once, at their first use; their names are known without making any."""

    def __init__(self, makers: Mapping[str, Callable[[], Signal]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, Signal] = {}

    def __getitem__(self, modality: str) -> Signal:
        if modality not in self._made:
            self._made[modality] = self._makers[modality]()
        return self._made[modality]

    def __contains__(self, modality: object) -> bool:
        # Mapping's own asks for the value.
        return modality in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


@dataclass(frozen=True)
class Recording:
    """One record of a source.

    Attributes:
        record: id within the source.
        signals: by modality (``"ecg"``, ``"eeg"``); all of them start at the same moment.
        person: the source's own id, or None where people are not identified.
        labels: JSON scalars and lists of them.
        unused: names of other channels, for messages.
        identified_by: modalities that :func:`.windows.waveform_hash` covers; empty for all.
    """

    record: str
    signals: Mapping[str, Signal]
    person: str | None
    labels: dict[str, Any]
    unused: tuple[str, ...] = ()
    identified_by: tuple[str, ...] = ()


def label_value(text: str | None) -> str | int | float | bool | None:
    """A table's cell as a JSON scalar: empty is None, codes with leading zeros stay text, NaN and infinity are None."""
    text = (text or "").strip()
    if not text:
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    # A number with a leading zero is a code, and stays as it is written.
    if re.fullmatch(r"[+-]?(0|[1-9][0-9]*)", text):
        return int(text) if len(text) <= 18 else text
    if re.fullmatch(r"[+-]?(0|[1-9][0-9]*)?(\.[0-9]*)?([eE][+-]?[0-9]+)?|[+-]?(nan|inf(inity)?)", text, re.IGNORECASE):
        with contextlib.suppress(ValueError):
            value = float(text)
            # JSON has no word for NaN or infinity.
            return value if math.isfinite(value) else None
    return text
