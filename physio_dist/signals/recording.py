"""What a reader hands on: one recording, its signals in microvolts, its person and its labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class RecordError(Exception):
    """One record is unfit or unreadable.

    ``str(error)`` is the reason that goes into ``rejects.jsonl``, so it never holds free text from a file
    header: a header may name the patient. ``person`` is the id in the source, where it is known by then, so that
    whoever writes the reason down can leave the id out of it.
    """

    person: str | None = None


@dataclass(frozen=True)
class Signal:
    """The channels of one modality, sampled together.

    ``data`` is float32 ``[channel, time]`` in microvolts with NaN where the source has no value, ``rate`` is in
    samples a second, ``channels`` are the names as the file spells them.
    """

    data: NDArray[np.float32]
    rate: float
    channels: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.data.ndim != 2 or self.data.shape[0] != len(self.channels):
            raise ValueError(f"data of shape {self.data.shape} does not fit {len(self.channels)} channel names")

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return float(self.data.shape[1] / self.rate)


@dataclass(frozen=True)
class Recording:
    """One record of a source.

    ``signals`` maps a modality (``"ecg"``, ``"eeg"``) to its signal; all of them start at the same moment.
    ``person`` is the source's own id, or None where people are not identified; ``labels`` holds JSON scalars and
    lists of them.
    """

    record: str
    signals: dict[str, Signal]
    person: str | None
    labels: dict[str, Any]
