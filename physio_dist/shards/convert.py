"""One part of a conversion: some records read, cut into windows and spooled.

A part is a fixed group of records, so its bytes depend on nothing but the records and the options, whichever process
makes it. Parts are what a killed conversion does not do again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_safetensors

from physio_dist import storage
from physio_dist.shards.index import pseudonym
from physio_dist.signals.readers import reader as reader_named
from physio_dist.signals.recording import RecordError
from physio_dist.signals.windows import Window, WindowSpec, waveform_hash, windows_of

PART_RECORDS = 32
# Raised whenever the same records and options would give other bytes: spooled parts of before are then not used.
CONVERTER = 1


@dataclass(frozen=True)
class Job:
    """What is converted, and how; equal jobs give equal shards."""

    reader: str
    input: str
    source: str
    spec: WindowSpec
    records: tuple[str, ...]
    keys: tuple[str, ...]
    labels: dict[str, dict[str, Any]]
    people: dict[str, str]

    def digest(self) -> str:
        """Hash of everything that decides the bytes of the parts; where the input lies does not."""
        content = {**asdict(self), "converter": CONVERTER}
        del content["input"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def parts(self) -> int:
        """How many parts there are."""
        return -(-len(self.records) // PART_RECORDS)


@dataclass
class WindowFacts:
    """A window of a part, without its samples."""

    key: str
    record: str
    person: int
    waveform: int
    start_s: float
    fit: bool
    reasons: list[str]
    labels: dict[str, Any]


@dataclass
class Part:
    """What a part holds beside the samples: its windows in order, and the records that gave none."""

    windows: list[WindowFacts] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    records: int = 0


def record_keys(records: Sequence[str]) -> list[str]:
    """A key for every record: its name in the characters that WebDataset keys may hold, made unique by a hash."""
    plain = [re.sub(r"[^A-Za-z0-9_-]+", "_", record).strip("_") for record in records]
    taken: dict[str, int] = {}
    for name in plain:
        taken[name] = taken.get(name, 0) + 1
    return [
        name if 0 < len(name) <= 60 and taken[name] == 1
        else f"{name[:50]}-{hashlib.sha256(record.encode()).hexdigest()[:12]}"
        for record, name in zip(records, plain, strict=True)
    ]  # fmt: skip


def make_part(job: Job, number: int, path: str) -> None:
    """Convert the records of part ``number`` and publish them at ``path``.

    Raises:
        StorageError: the spool cannot be written, a full disk among the reasons.
    """
    part = Part()
    windows: list[Window] = []
    reader = reader_named(job.reader)
    first = number * PART_RECORDS
    for record, key in zip(job.records[first:], job.keys[first : first + PART_RECORDS], strict=False):
        part.records += 1
        try:
            recording = reader.read(job.input, record)
            cut = windows_of(recording, job.spec)
        except RecordError as error:
            part.rejects.append({"record": record, "reason": str(error)})
            continue
        waveform = int(waveform_hash(recording)[:16], 16)
        person = job.people.get(record, recording.person)
        shown = _without_person(record, person)
        labels = {**recording.labels, **job.labels.get(record, {})}
        for i, window in enumerate(cut):
            part.windows.append(
                WindowFacts(
                    key=f"{key}-{i:05d}", record=shown,
                    person=pseudonym(job.source, person if person is not None else f"record {record}"),
                    waveform=waveform, start_s=window.start_s, fit=window.fit, reasons=list(window.reasons),
                    labels=labels,
                )
            )  # fmt: skip
        windows += cut
    storage.write_bytes(path, _pack(part, windows))


def _without_person(record: str, person: str | None) -> str:
    """The record's name, with folders named after the person (as MIMIC has them) left out."""
    if person is None:
        return record
    return "/".join(step for step in record.split("/") if step.lstrip("pP") != person.lstrip("pP") or step == record)


def _pack(part: Part, windows: Sequence[Window]) -> bytes:
    tensors = {}
    for signal in sorted(windows[0].data) if windows else []:
        tensors[signal] = np.stack([window.data[signal] for window in windows])
        tensors[f"valid.{signal}"] = np.stack([window.valid[signal] for window in windows])
    return save_safetensors(tensors, {"part": json.dumps(asdict(part), sort_keys=True)})


def read_part(path: Path) -> Part | None:
    """The facts of a spooled part; None where it is missing or damaged, so that it is made again."""
    try:
        with safe_open(path, framework="numpy") as file:
            content = json.loads(file.metadata()["part"])
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
        return None
    return Part(
        windows=[WindowFacts(**window) for window in content["windows"]],
        rejects=content["rejects"],
        records=content["records"],
    )

