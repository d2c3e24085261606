"""Every shard against the index: hash, count, shape, place and range; and an index for shards of others."""

from __future__ import annotations

import hashlib
import io
import math
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from physio_dist import __version__, storage
from physio_dist.config.options import Range, option
from physio_dist.data.format import tar
from physio_dist.data.format.index import (
    INDEX,
    KEY_PATTERN,
    SPLITS,
    ShardInfo,
    ShardSet,
    SignalInfo,
    fingerprint_of,
    open_set,
)
from physio_dist.data.format.people import pseudonym, split_of
from physio_dist.data.format.sample_table import SampleTable, key_table, publish, read_sample_table
from physio_dist.errors import DataError, UserError
from physio_dist.runtime.progress import Progress
from physio_dist.signals.montage import ECG_12, identity_error

# Samples that are looked at for the order of their leads, and what their limb leads may miss of their identities.
_JUDGED = 50
_IDENTITY_ERROR = 0.05
_POSITIVE = Range(0.0, math.inf, "it must be positive", open_low=True, open_high=True)


def verify(url: str) -> Iterator[str]:
    """Faults of a shard set, one sentence each.

    Raises:
        UserError: there is no shard set.
        DataError: the index or the sample table themselves are damaged.
    """
    shards = open_set(url)
    table = read_sample_table(shards)
    starts = shards.shard_starts()
    present = storage.names(shards.data_url)
    for name in sorted({name for name in present if name.endswith(".tar")} - {s.url for s in shards.shards}):
        yield f"{name}: lies beside the shards but is not in the index"
    keys = table.keys(np.arange(shards.nsamples))
    for key in sorted(key for key, count in Counter(keys).items() if count > 1):
        yield f"key {key!r} stands in the set more than once"
    for number, info in enumerate(shards.shards):
        if info.url not in present:
            yield f"{info.url}: missing"
            continue
        data = storage.read_bytes(shards.shard_url(number))
        rows = slice(int(starts[number]), int(starts[number + 1]))
        yield from _shard_faults(info, data, shards, table, keys[rows], rows)


def _shard_faults(
    info: ShardInfo, data: bytes, shards: ShardSet, table: SampleTable, keys: list[str], rows: slice
) -> Iterator[str]:
    as_told = False
    if len(data) != info.filesize:
        yield f"{info.url}: {len(data)} bytes, the index says {info.filesize}"
    elif not (as_told := hashlib.sha256(data).hexdigest() == info.sha256):
        yield f"{info.url}: its sha256 disagrees with the index"
    try:
        members = tar.scan(io.BytesIO(data), info.url)
    except DataError as error:
        yield str(error)
        return
    if [member.key for member in members] != keys:
        yield f"{info.url}: holds {len(members)} samples, or other keys, than the {len(keys)} of the index"
        return
    for i, member in enumerate(members):
        if member.facts is None:
            # Shards of others may do without; see adopt().
            if shards.made_by.get("reader") != "index":
                yield f"{info.url}: sample {member.key} has no json"
        elif bool(member.facts.get("simulated")) and not shards.simulated:
            yield f"{info.url}: sample {member.key} is simulated, which the index does not say"
        for name, signal in shards.signals.items():
            shape = (len(signal.channels), signal.samples)
            if member.shape.get(name) != shape or member.dtype.get(name) != np.int16:
                found = f"{member.dtype[name]} {member.shape[name]}" if name in member.shape else "no such array"
                yield f"{info.url}: sample {member.key}: {name} is {found} instead of int16 {shape}"
            elif member.offset[name] != table.offset[name][rows.start + i]:
                yield f"{info.url}: sample {member.key} stands elsewhere than the sample table says"
            else:
                start = member.offset[name]
                check = zlib.crc32(memoryview(data)[start : start + signal.nbytes])
                if as_told and check != table.check[name][rows.start + i]:
                    yield f"{info.url}: sample {member.key} {name} disagrees with its check in the sample table"
                yield from _range_faults(info, data, member, name, signal, table.valid[name][rows.start + i])


def _range_faults(
    info: ShardInfo, data: bytes, member: tar.Member, name: str, signal: SignalInfo, valid: npt.NDArray[np.bool_]
) -> Iterator[str]:
    flat, railed = _dead(data, member.offset[name], (len(signal.channels), signal.samples))
    for what, leads in (("constant", flat & valid), ("at the end of the range", railed & valid)):
        for lead in np.flatnonzero(leads):
            yield f"{info.url}: sample {member.key} {name} lead {signal.channels[lead]} is {what} but marked valid"


def _dead(
    data: bytes, offset: int, shape: tuple[int, int]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:  # fmt: skip
    """Which channels are no signal: constant, or at the end of the range for half their time."""
    values = np.frombuffer(data, "<i2", shape[0] * shape[1], offset).reshape(shape)
    low, high = values.min(axis=1), values.max(axis=1)
    return low == high, np.mean((values <= -32767) | (values >= 32767), axis=1) > 0.5


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


def index_existing(url: str, options: IndexOptions) -> ShardSet:
    """Write an index and a sample table for a WebDataset that somebody else wrote.

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
    found = _Adopted()
    with Progress(len(tars), "shards", "reading") as bar:
        for name in tars:
            _adopt_shard(name, storage.read_bytes(storage.join(url, name)), channels, options, found)
            bar.update()
    if found.signal is None:
        raise UserError(f"{url}: its tars hold no samples")
    if options.person is not None and not any(found.people):
        raise UserError(f"person={options.person}: no sample of {url} has such a field in its json")
    twice, count = Counter(found.keys).most_common(1)[0]
    if count > 1:
        raise UserError(f"{url}: key {twice!r} stands in it more than once; keys must be unique")
    return _publish_adopted(url, options, found.signal, found)


@dataclass
class _Adopted:
    """What has been found in the tars so far; people are None where a sample does not tell its person."""

    kind: str = ""
    signal: SignalInfo | None = None
    simulated: bool = False
    infos: list[ShardInfo] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    checks: list[int] = field(default_factory=list)
    people: list[str | None] = field(default_factory=list)
    valid: list[npt.NDArray[np.bool_]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def _is_ours(where: str) -> bool:
    """Whether an index is complete, or the bare one that `widsindex` makes, which has no room for what we need."""
    document = storage.read_json(where)
    return not (isinstance(document, dict) and "shardlist" in document and "physio_dist" not in document)


def _adopt_shard(name: str, data: bytes, channels: tuple[str, ...], options: IndexOptions, found: _Adopted) -> None:
    members = tar.scan(io.BytesIO(data), name)
    found.infos.append(ShardInfo(name, len(members), len(data), hashlib.sha256(data).hexdigest()))
    for member in members:
        found.kind = found.kind or _kind_of(member, name)
        if not channels:
            channels = found.signal.channels if found.signal else _standard_leads(name, data, members, found.kind)
        shape = member.shape.get(found.kind)
        if shape is None or len(shape) != 2 or member.dtype[found.kind] != np.dtype("<i2"):
            there = f"{member.dtype.get(found.kind)} {shape}" if shape is not None else "missing"
            raise UserError(f"{name}: sample {member.key}: {found.kind}.npy is {there}, not int16 [channel, time]")
        if 0 in shape:
            raise UserError(f"{name}: sample {member.key}: {found.kind}.npy holds no values (shape {list(shape)})")
        found.signal = found.signal or SignalInfo(channels, shape[1], options.uv_per_bit)
        if shape != (len(channels), found.signal.samples):
            raise UserError(
                f"{name}: sample {member.key} has shape {list(shape)}; expected "
                f"{[len(channels), found.signal.samples]} (channels={options.channels})"
            )
        if not KEY_PATTERN.fullmatch(member.key):
            raise UserError(f"{name}: key {member.key!r} has characters other than letters, digits, - and _")
        flat, railed = _dead(data, member.offset[found.kind], (shape[0], shape[1]))
        facts: dict[str, Any] = member.facts or {}
        person = facts.get(options.person or "person")
        start = member.offset[found.kind]
        found.offsets.append(start)
        found.checks.append(zlib.crc32(memoryview(data)[start : start + found.signal.nbytes]))
        found.keys.append(member.key)
        found.valid.append(~(flat | railed))
        found.people.append(None if person is None else str(person))
        found.simulated |= bool(facts.get("simulated"))


def _publish_adopted(url: str, options: IndexOptions, signal: SignalInfo, found: _Adopted) -> ShardSet:
    source, kind = url.rsplit("/", 1)[-1], found.kind
    people = [
        pseudonym(source, f"key {key}" if person is None else person)
        for person, key in zip(found.people, found.keys, strict=True)
    ]
    split = [split_of(person, options.val, options.test) for person in people]
    table = SampleTable(
        offset={kind: np.array(found.offsets, dtype=np.int64)},
        check={kind: np.array(found.checks, dtype=np.uint32)},
        valid={kind: np.stack(found.valid)},
        split=np.array(split, dtype=np.uint8), person=np.array(people, dtype=np.uint64),
        waveform=np.zeros(len(people), dtype=np.uint64), key=key_table(found.keys),
    )  # fmt: skip
    sample_table_sha256 = hashlib.sha256(table.to_bytes()).hexdigest()
    signals = {kind: signal}
    made = ShardSet(
        url=url, shards=tuple(found.infos), signals=signals, rate=options.rate,
        splits={name: split.count(code) for code, name in enumerate(SPLITS)}, people=len(set(people)),
        simulated=found.simulated, sources=(source,), sample_table_sha256=sample_table_sha256,
        fingerprint=fingerprint_of(found.infos, signals, options.rate, sample_table_sha256),
        made_by={"physio_dist": __version__, "reader": "index"},
    )  # fmt: skip
    publish(made, table)
    return made


def _standard_leads(name: str, data: bytes, members: list[tar.Member], kind: str) -> tuple[str, ...]:
    """The twelve leads in their standard order, where the first samples are such ECGs.

    Raises:
        UserError: they are not, or it cannot be told.
    """
    unnamed = UserError(
        f"{name}: nothing tells which lead each row is, and the rows do not obey the identities of limb leads in the "
        f"standard order; give channels={','.join(ECG_12)} or whatever they are"
    )
    errors = []
    for member in members[:_JUDGED]:
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
