"""Every shard against the index: hash, count, shape, place and range; and an index for shards of others."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from physio_dist import __version__, storage
from physio_dist.errors import DataError, UserError
from physio_dist.shards import tar
from physio_dist.shards.index import (
    INDEX,
    KEY_PATTERN,
    SPLITS,
    ShardInfo,
    ShardSet,
    Sidecar,
    SignalInfo,
    fingerprint_of,
    key_table,
    open_set,
    pseudonym,
    publish,
    read_sidecar,
    split_of,
)


def verify(url: str) -> Iterator[str]:
    """Faults of a shard set, one sentence each.

    Raises:
        UserError: there is no shard set.
        DataError: the index or the sidecar themselves are damaged.
    """
    shards = open_set(url)
    sidecar = read_sidecar(shards)
    starts = shards.shard_starts()
    present = storage.names(shards.url)
    for name in sorted({name for name in present if name.endswith(".tar")} - {s.url for s in shards.shards}):
        yield f"{name}: lies beside the shards but is not in the index"
    keys = sidecar.keys(np.arange(shards.nsamples))
    for key in sorted(key for key, count in Counter(keys).items() if count > 1):
        yield f"key {key!r} stands in the set more than once"
    for number, info in enumerate(shards.shards):
        if info.url not in present:
            yield f"{info.url}: missing"
            continue
        data = storage.read_bytes(shards.shard_url(number))
        rows = slice(int(starts[number]), int(starts[number + 1]))
        yield from _shard_faults(info, data, shards, sidecar, keys[rows], rows)


def _shard_faults(
    info: ShardInfo, data: bytes, shards: ShardSet, sidecar: Sidecar, keys: list[str], rows: slice
) -> Iterator[str]:
    if len(data) != info.filesize:
        yield f"{info.url}: {len(data)} bytes, the index says {info.filesize}"
    elif hashlib.sha256(data).hexdigest() != info.sha256:
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
            yield f"{info.url}: sample {member.key} has no json"
        for name, signal in shards.signals.items():
            shape = (len(signal.channels), signal.samples)
            if member.shape.get(name) != shape or member.dtype.get(name) != np.int16:
                yield f"{info.url}: sample {member.key} has {name} {member.shape.get(name)} instead of int16 {shape}"
            elif member.offset[name] != sidecar.offset[name][rows.start + i]:
                yield f"{info.url}: sample {member.key} stands elsewhere than the sidecar says"
            else:
                yield from _range_faults(info, data, member, name, signal, sidecar.valid[name][rows.start + i])


def _range_faults(
    info: ShardInfo, data: bytes, member: tar.Member, name: str, signal: SignalInfo, valid: npt.NDArray[np.bool_]
) -> Iterator[str]:
    """A lead said to be valid must be a signal: no constant, and not at the end of the range for half its time."""
    values = np.frombuffer(data, "<i2", len(signal.channels) * signal.samples, member.offset[name])
    values = values.reshape(len(signal.channels), signal.samples)
    flat = (np.ptp(values.astype(np.int32), axis=1) == 0) & valid
    railed = (np.mean(np.abs(values.astype(np.int32)) >= 32767, axis=1) > 0.5) & valid
    for what, leads in (("constant", flat), ("at the end of the range", railed)):
        for lead in np.flatnonzero(leads):
            yield f"{info.url}: sample {member.key} {name} lead {signal.channels[lead]} is {what} but marked valid"


@dataclass
class IndexOptions:
    """The ``key=value`` options of ``physio-dist index``.

    Attributes:
        channels: comma-separated, in the order of the arrays' rows.
        rate: Hz.
        uv_per_bit: microvolts of one unit of the arrays.
        person: field of the samples' json that tells people apart.
        val, test: shares of people held out.
    """

    channels: str = "???"
    rate: float = 200.0
    uv_per_bit: float = 1.0
    person: str = "person"
    val: float = 0.1
    test: float = 0.1


def adopt(url: str, options: IndexOptions) -> ShardSet:
    """Write an index and a sidecar for a WebDataset that somebody else wrote.

    Its samples have int16 ``[channel, time]`` arrays ``{key}.ecg.npy`` or ``{key}.eeg.npy`` of one shape, row by row.

    Raises:
        UserError: no tars, an index is there already, or samples that do not have that form.
        DataError: a damaged tar.
    """
    url = storage.absolute(url)
    names = storage.names(url)
    if INDEX in names:
        raise UserError(f"{url} has an {INDEX} already; `physio-dist verify {url}` checks it")
    tars = [name for name in names if name.endswith(".tar")]
    if not tars:
        raise UserError(f"{url} holds no .tar files; it has: {', '.join(names[:5]) or 'nothing'}")
    channels = tuple(word.strip() for word in options.channels.split(","))
    infos: list[ShardInfo] = []
    signal: SignalInfo | None = None
    kind = ""
    offsets, people, valid, keys = [], [], [], []
    for name in tars:
        data = storage.read_bytes(storage.join(url, name))
        members = tar.scan(io.BytesIO(data), name)
        infos.append(ShardInfo(name, len(members), len(data), hashlib.sha256(data).hexdigest()))
        for member in members:
            kind = kind or _kind_of(member, name)
            shape = member.shape.get(kind)
            if shape is None or len(shape) != 2 or member.dtype[kind] != np.dtype("<i2"):
                told = f"{member.dtype.get(kind)} {shape}"
                raise UserError(f"{name}: sample {member.key}: {kind}.npy is {told}, not int16 [channel, time]")
            signal = signal or SignalInfo(channels, shape[1], options.uv_per_bit)
            if shape != (len(channels), signal.samples):
                raise UserError(
                    f"{name}: sample {member.key} has shape {list(shape)}; expected {[len(channels), signal.samples]} "
                    f"(channels={options.channels})"
                )
            if not KEY_PATTERN.fullmatch(member.key):
                raise UserError(f"{name}: key {member.key!r} has characters other than letters, digits, - and _")
            values = np.frombuffer(data, "<i2", shape[0] * shape[1], member.offset[kind]).reshape(shape)
            offsets.append(member.offset[kind])
            keys.append(member.key)
            valid.append(np.ptp(values.astype(np.int32), axis=1) > 0)
            facts: dict[str, Any] = member.facts or {}
            people.append(pseudonym(url.rsplit("/", 1)[-1], str(facts.get(options.person, f"key {member.key}"))))
    if signal is None:
        raise UserError(f"{url}: its tars hold no samples")
    if len(set(keys)) != len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise UserError(f"{url}: key {twice!r} stands in it more than once; keys must be unique")
    return _publish_adopted(url, infos, kind, signal, options, offsets, people, valid, keys)


def _publish_adopted(
    url: str, infos: list[ShardInfo], kind: str, signal: SignalInfo, options: IndexOptions, offsets: list[int],
    people: list[int], valid: list[npt.NDArray[np.bool_]], keys: list[str],
) -> ShardSet:  # fmt: skip
    split = [split_of(person, options.val, options.test) for person in people]
    sidecar = Sidecar(
        offset={kind: np.array(offsets, dtype=np.int64)}, valid={kind: np.stack(valid)},
        split=np.array(split, dtype=np.uint8), person=np.array(people, dtype=np.uint64),
        waveform=np.zeros(len(keys), dtype=np.uint64), key=key_table(keys),
    )  # fmt: skip
    sidecar_sha256 = hashlib.sha256(sidecar.to_bytes()).hexdigest()
    signals = {kind: signal}
    made = ShardSet(
        url=url, shards=tuple(infos), signals=signals, rate=options.rate,
        splits={name: split.count(code) for code, name in enumerate(SPLITS)}, people=len(set(people)),
        simulated=False, sources=(url.rsplit("/", 1)[-1],), sidecar_sha256=sidecar_sha256,
        fingerprint=fingerprint_of(infos, signals, options.rate, sidecar_sha256),
        made_by={"physio_dist": __version__, "reader": "index"},
    )  # fmt: skip
    publish(made, sidecar)
    return made


def _kind_of(member: tar.Member, shard: str) -> str:
    for kind in ("ecg", "eeg"):
        if kind in member.shape:
            return kind
    arrays = ", ".join(f"{name}.npy" for name in member.shape) or "no arrays"
    raise UserError(f"{shard}: sample {member.key} has {arrays}; expected ecg.npy or eeg.npy")
