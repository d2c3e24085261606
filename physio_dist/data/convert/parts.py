"""One part of a conversion: some records read, cut into windows and spooled.

A part is a fixed group of records, so its bytes depend on nothing but the records and the options, whichever process
makes it. Parts are what a killed conversion does not do again.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from safetensors.numpy import save as save_safetensors

from physio_dist import storage
from physio_dist.data.format.people import pseudonym
from physio_dist.errors import PhysioError
from physio_dist.signals.readers import reader as reader_named
from physio_dist.signals.recording import RecordError
from physio_dist.signals.windows import Window, WindowSpec, waveform_hash, windows_of

PART_RECORDS = 32
# Raised whenever the same records and options would give other bytes: spooled parts of before are then not used.
CONVERTER = 3


@dataclass(frozen=True)
class Job:
    """Input and options of a conversion; equal jobs give equal shards."""

    reader: str
    input: str
    source: str
    spec: WindowSpec
    records: tuple[str, ...]
    keys: tuple[str, ...]
    labels: dict[str, dict[str, Any]]
    people: dict[str, str]

    def digest(self) -> str:
        """Hash of everything that decides the bytes of the parts; the location of the recordings does not."""
        content = {**asdict(self), "converter": CONVERTER}
        # A simulator's input is no place: it says what is simulated.
        if not reader_named(self.reader).simulated:
            del content["input"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def parts(self) -> int:
        """Number of parts."""
        return -(-len(self.records) // PART_RECORDS)

    def part(self, number: int) -> Job:
        """The job of one part alone, small enough to be sent to another process."""
        rows = slice(number * PART_RECORDS, (number + 1) * PART_RECORDS)
        records = self.records[rows]
        return replace(
            self, records=records, keys=self.keys[rows],
            labels={record: self.labels[record] for record in records if record in self.labels},
            people={record: self.people[record] for record in records if record in self.people},
        )  # fmt: skip


@dataclass(slots=True)
class WindowFacts:
    """A window of a part, without its samples."""

    key: str
    record: str
    person: int
    waveform: int
    start_s: float
    usable: bool
    reasons: list[str]
    labels: dict[str, Any]


@dataclass
class Part:
    """Facts of a part: its windows in order, and the records that gave none."""

    windows: list[WindowFacts] = field(default_factory=list)
    rejects: list[dict[str, Any]] = field(default_factory=list)
    records: int = 0


def key_of(name: str) -> str:
    """A name in the characters that WebDataset keys may hold."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")


def record_keys(records: Sequence[str]) -> list[str]:
    """A key for every record: the last part of its name in the characters that WebDataset keys may hold.

    Folders are left out because they may be named after people. A hash of the whole name distinguishes records that end
    alike.
    """
    plain = [key_of(record.rsplit("/", 1)[-1]) for record in records]
    taken = Counter(plain)
    return [
        name if 0 < len(name) <= 60 and taken[name] == 1
        else f"{name[:47]}-{hashlib.sha256(record.encode()).hexdigest()[:12]}"
        for record, name in zip(records, plain, strict=True)
    ]  # fmt: skip


def make_part(job: Job, url: str, resume: bool = False, return_facts: bool = False) -> tuple[int, str | None]:
    """Convert the records of a part (:meth:`Job.part`) and publish them at ``url``.

    Args:
        job: of the part alone.
        url: in the spool.
        resume: whether an earlier attempt seems to have made it: if that is complete, nothing is converted.
        return_facts: whether to return its facts; otherwise :func:`spooled` reads them.

    Returns:
        The number of records read, and the facts, as :func:`part_of` takes them.

    Raises:
        StorageError: the input's disk fails, or the spool cannot be written, a full disk among the reasons.
    """
    if resume and (facts := spooled(url)) is not None:
        return 0, facts if return_facts else None
    part = Part()
    windows: list[Window] = []
    reader = reader_named(job.reader)
    for record, key in zip(job.records, job.keys, strict=True):
        part.records += 1
        person = job.people.get(record)
        try:
            recording = reader.read(job.input, record)
            if person is None:
                person = recording.person
            cut = windows_of(recording, job.spec)
        except Exception as error:
            if storage.is_transient(error):
                raise storage.to_storage_error(storage.join(job.input, record), "read", error) from error
            if isinstance(error, PhysioError | MemoryError):
                raise
            # A record that crashes a library must not stop the conversion. The message is left out: it may quote
            # the file.
            reason = f"cannot be read ({type(error).__name__})"
            if isinstance(error, RecordError):
                person = person if person is not None else error.person
                # It may name a file that is called after the person.
                reason = hide_person(str(error), job.source, person)
            public = key if reader.simulated else without_person(key, job.source, person)
            part.rejects.append({"record": public, "reason": reason})
            continue
        pseudonym_ = pseudonym(job.source, person if person is not None else f"record {record}")
        name = key if reader.simulated else without_person(key, job.source, person)
        waveform = int(waveform_hash(recording)[:16], 16)
        labels = {**recording.labels, **job.labels.get(record, {})}
        for i, window in enumerate(cut):
            part.windows.append(
                WindowFacts(
                    key=f"{name}-{i:05d}", record=name, person=pseudonym_, waveform=waveform, start_s=window.start_s,
                    usable=window.usable, reasons=list(window.reasons), labels=labels,
                )
            )  # fmt: skip
        windows += cut
    facts = json.dumps(asdict(part), sort_keys=True)
    storage.write_bytes(url, _pack(facts, windows))
    return part.records, facts if return_facts else None


def hide_person(text: str, source: str, person: str | None) -> str:
    """Replace the person's id by the pseudonym where it is a word of its own."""
    if not person:
        return text
    # MIMIC writes p10000032 in one place and 10000032 in another; keys have other characters replaced.
    bare = person.lstrip("pP") or person
    hidden = f"{pseudonym(source, person):016x}"
    for word in {bare, key_of(bare)} - {""}:
        text = re.sub(rf"(?<![A-Za-z0-9])[pP]?{re.escape(word)}(?![A-Za-z0-9])", hidden, text)
    return text


def without_person(name: str, source: str, person: str | None) -> str:
    """A record's key without the person's id."""
    found = hide_person(name, source, person)
    if len(found) <= 70 or person is None:
        return found
    return f"{pseudonym(source, person):016x}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _pack(facts: str, windows: Sequence[Window]) -> bytes:
    tensors = {}
    for signal in sorted(windows[0].data) if windows else []:
        tensors[signal] = np.stack([window.data[signal] for window in windows])
        tensors[f"valid.{signal}"] = np.stack([window.valid[signal] for window in windows])
    return save_safetensors(tensors, {"part": facts})


def spooled(url: str) -> str | None:
    """The facts of a spooled part, of which only the head is read; None where it is missing or damaged.

    Raises:
        StorageError: the spool cannot be read.
    """
    try:
        size = storage.size(url)
        # The format of safetensors: the length of a JSON header in 8 bytes, the header, the values.
        head = storage.read_bytes(url, 0, 8) if size > 8 else b""
        start = 8 + int.from_bytes(head, "little")
        if not 8 < start <= size:
            return None
        header = json.loads(storage.read_bytes(url, 8, start))
        facts: str = header.pop("__metadata__")["part"]
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
    except (storage.NotFoundError, KeyError, TypeError, ValueError):
        return None
    return facts if start + end == size else None


def part_of(facts: str) -> Part:
    """The part with those facts."""
    content = json.loads(facts)
    return Part(
        windows=[WindowFacts(**window) for window in content["windows"]],
        rejects=content["rejects"],
        records=content["records"],
    )
