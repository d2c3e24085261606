"""An index and a sample table for a WebDataset that another program wrote."""

from __future__ import annotations

import hashlib
import io
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from physio_dist import __version__, storage
from physio_dist.config.shard import IndexOptions
from physio_dist.data.format import tar
from physio_dist.data.format.index import (
    INDEX,
    KEY_PATTERN,
    SPLITS,
    ShardInfo,
    ShardSet,
    SignalInfo,
    fingerprint_of,
)
from physio_dist.data.format.people import pseudonym, split_of
from physio_dist.data.format.sample_table import SampleTable, key_table, publish
from physio_dist.data.verify import dead_channels
from physio_dist.errors import UserError
from physio_dist.runtime.arrays import BoolArray
from physio_dist.runtime.progress import Progress
from physio_dist.signals.montage import ECG_12, identity_error

# Samples whose lead order is checked, and what their limb leads may miss of their identities.
_CHECKED_SAMPLES = 50
_IDENTITY_ERROR = 0.05


def index_existing(url: str, options: IndexOptions) -> ShardSet:
    """Write an index and a sample table for a WebDataset that another program wrote.

    Its samples have int16 ``[channel, time]`` arrays ``{key}.ecg.npy`` or ``{key}.eeg.npy`` of one shape, row by row.

    Raises:
        UserError: no tars, an index is there already, or samples that do not have that form.
        DataError: a damaged tar.
    """
    url = storage.absolute(url)
    channels = options.names()
    names = storage.names(url)
    if INDEX in names and _is_ours(storage.join(url, INDEX)):
        raise UserError(f"{url} has an {INDEX} already; `physio-dist verify {url}` checks it")
    tars = [name for name in names if name.endswith(".tar")]
    if not tars:
        raise UserError(f"{url} holds no .tar files; it has: {', '.join(names[:5]) or 'nothing'}")
    scan = _Scan()
    with Progress(len(tars), "shards", "reading") as bar:
        for name in tars:
            _scan_shard(name, storage.read_bytes(storage.join(url, name)), channels, options, scan)
            bar.update()
    if scan.signal is None:
        raise UserError(f"{url}: its tars hold no samples")
    if options.person is not None and not any(scan.people):
        raise UserError(f"person={options.person}: no sample of {url} has such a field in its json")
    key, count = Counter(scan.keys).most_common(1)[0]
    if count > 1:
        raise UserError(f"{url}: key {key!r} stands in it more than once; keys must be unique")
    return _publish(url, options, scan.signal, scan)


@dataclass
class _Scan:
    """Facts of the tars read so far; a person is None where a sample names none."""

    kind: str = ""
    signal: SignalInfo | None = None
    simulated: bool = False
    infos: list[ShardInfo] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    people: list[str | None] = field(default_factory=list)
    valid: list[BoolArray] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def _is_ours(url: str) -> bool:
    """True for a complete index, false for the bare one that `widsindex` makes, which lacks our additions."""
    document = storage.read_json(url)
    return not (isinstance(document, dict) and "shardlist" in document and "physio_dist" not in document)


def _scan_shard(name: str, data: bytes, channels: tuple[str, ...], options: IndexOptions, scan: _Scan) -> None:
    members = tar.scan(io.BytesIO(data), name)
    scan.infos.append(ShardInfo(name, len(members), len(data), hashlib.sha256(data).hexdigest()))
    for member in members:
        scan.kind = scan.kind or _kind_of(member, name)
        if not channels:
            channels = scan.signal.channels if scan.signal else _standard_leads(name, data, members, scan.kind)
        shape = member.shape.get(scan.kind)
        if shape is None or len(shape) != 2 or member.dtype[scan.kind] != np.dtype("<i2"):
            stored = f"{member.dtype.get(scan.kind)} {shape}" if shape is not None else "missing"
            raise UserError(f"{name}: sample {member.key}: {scan.kind}.npy is {stored}, not int16 [channel, time]")
        if 0 in shape:
            raise UserError(f"{name}: sample {member.key}: {scan.kind}.npy holds no values (shape {list(shape)})")
        scan.signal = scan.signal or SignalInfo(channels, shape[1], options.uv_per_bit)
        if shape != (len(channels), scan.signal.samples):
            raise UserError(
                f"{name}: sample {member.key} has shape {list(shape)}; expected "
                f"{[len(channels), scan.signal.samples]} (channels={options.channels})"
            )
        if not KEY_PATTERN.fullmatch(member.key):
            raise UserError(f"{name}: key {member.key!r} has characters other than letters, digits, - and _")
        flat, railed = dead_channels(data, member.offset[scan.kind], (shape[0], shape[1]))
        facts: dict[str, Any] = member.facts or {}
        person = facts.get(options.person or "person")
        start = member.offset[scan.kind]
        scan.offsets.append(start)
        scan.checks.append(zlib.crc32(memoryview(data)[start : start + scan.signal.nbytes]))
        scan.keys.append(member.key)
        scan.valid.append(~(flat | railed))
        scan.people.append(None if person is None else str(person))
        scan.simulated |= bool(facts.get("simulated"))


def _publish(url: str, options: IndexOptions, signal: SignalInfo, scan: _Scan) -> ShardSet:
    source, kind = url.rsplit("/", 1)[-1], scan.kind
    people = [
        pseudonym(source, f"key {key}" if person is None else person)
        for person, key in zip(scan.people, scan.keys, strict=True)
    ]
    split = [split_of(person, options.val, options.test) for person in people]
    table = SampleTable(
        offset={kind: np.array(scan.offsets, dtype=np.int64)},
        check={kind: np.array(scan.checks, dtype=np.uint32)},
        valid={kind: np.stack(scan.valid)},
        split=np.array(split, dtype=np.uint8), person=np.array(people, dtype=np.uint64),
        waveform=np.zeros(len(people), dtype=np.uint64), key=key_table(scan.keys),
    )  # fmt: skip
    sample_table_sha256 = hashlib.sha256(table.to_bytes()).hexdigest()
    signals = {kind: signal}
    made = ShardSet(
        url=url, shards=tuple(scan.infos), signals=signals, rate=options.rate,
        splits={name: split.count(code) for code, name in enumerate(SPLITS)}, people=len(set(people)),
        simulated=scan.simulated, sources=(source,), sample_table_sha256=sample_table_sha256,
        fingerprint=fingerprint_of(scan.infos, signals, options.rate, sample_table_sha256),
        made_by={"physio_dist": __version__, "reader": "index"},
    )  # fmt: skip
    publish(made, table)
    return made


def _standard_leads(name: str, data: bytes, members: list[tar.Member], kind: str) -> tuple[str, ...]:
    """The twelve leads in their standard order, where the first samples are such ECGs.

    Raises:
        UserError: they are not, or it cannot be decided.
    """
    unnamed = UserError(
        f"{name}: nothing tells which lead each row is, and the rows do not obey the identities of limb leads in the "
        f"standard order; give channels={','.join(ECG_12)} or whatever they are"
    )
    errors = []
    for member in members[:_CHECKED_SAMPLES]:
        shape = member.shape.get(kind, ())
        if kind != "ecg" or len(shape) != 2 or shape[0] != len(ECG_12) or member.dtype[kind] != np.dtype("<i2"):
            raise unnamed
        values = np.frombuffer(data, "<i2", shape[0] * shape[1], member.offset[kind]).reshape(shape)
        if values[:6].any():
            errors.append(identity_error(values.astype(np.float64), ECG_12))
    if not errors or np.median(errors) > _IDENTITY_ERROR:
        raise unnamed
    return ECG_12


def _kind_of(member: tar.Member, shard: str) -> str:
    for kind in ("ecg", "eeg"):
        if kind in member.shape:
            return kind
    arrays = ", ".join(f"{name}.npy" for name in member.shape) or "no arrays"
    raise UserError(f"{shard}: sample {member.key} has {arrays}; expected ecg.npy or eeg.npy")
