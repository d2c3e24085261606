"""The index of a shard set and its sidecar.

``index.json`` is a ``wids-shard-index-v1`` document: the ``wids`` package reads its ``shardlist``. Our additions stand
under the key ``physio_dist``. What training needs of every sample (member offset, validity, split, person, key) stands
in a safetensors sidecar next to it, because parsing a JSON per sample would cost more than reading the signals.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from physio_dist import storage
from physio_dist.errors import DataError, UserError

FORMAT = 2
INDEX = "index.json"
SIDECAR = "samples.safetensors"
SPLITS = ("train", "val", "test")
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class ShardInfo:
    """One tar: its name beside the index, samples, bytes, and hash (sha256, hex)."""

    url: str
    nsamples: int
    filesize: int
    sha256: str


@dataclass(frozen=True)
class SignalInfo:
    """One signal of every sample: int16 ``[channel, samples]`` in units of ``uv_per_bit`` microvolts."""

    channels: tuple[str, ...]
    samples: int
    uv_per_bit: float

    @property
    def nbytes(self) -> int:
        """Bytes of one sample's values."""
        return 2 * len(self.channels) * self.samples


@dataclass(frozen=True)
class SampleTable:
    """Facts of every sample, in storage order (shard after shard).

    Attributes:
        offset: for each signal int64 ``[sample]``, where its first value stands in the tar.
        check: for each signal uint32 ``[sample]``, CRC-32 of its values, for samples that are read singly.
        valid: for each signal bool ``[sample, channel]``.
        split: uint8 ``[sample]``, position in ``SPLITS``.
        person: uint64 ``[sample]``, pseudonym.
        waveform: uint64 ``[sample]``, hash of the recording's waveform; 0 where unknown.
        key: ASCII keys, zero-padded uint8 ``[sample, longest]``.
    """

    offset: dict[str, npt.NDArray[np.int64]]
    check: dict[str, npt.NDArray[np.uint32]]
    valid: dict[str, npt.NDArray[np.bool_]]
    split: npt.NDArray[np.uint8]
    person: npt.NDArray[np.uint64]
    waveform: npt.NDArray[np.uint64]
    key: npt.NDArray[np.uint8]

    def keys(self, samples: npt.NDArray[np.int64]) -> list[str]:
        """Keys of the given samples."""
        return [row.tobytes().rstrip(b"\0").decode("ascii") for row in self.key[samples]]

    def to_bytes(self) -> bytes:
        """The sidecar file."""
        tensors: dict[str, npt.NDArray[Any]] = {
            "split": self.split, "person": self.person, "waveform": self.waveform, "key": self.key,
        }  # fmt: skip
        for signal, values in self.offset.items():
            tensors[f"offset.{signal}"] = values
        for signal, checks in self.check.items():
            tensors[f"check.{signal}"] = checks
        for signal, flags in self.valid.items():
            tensors[f"valid.{signal}"] = flags
        return save_safetensors({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})

    @staticmethod
    def from_bytes(data: bytes | bytearray, name: str) -> SampleTable:
        """Parse a sidecar file.

        Raises:
            DataError: it is damaged.
        """
        try:
            tensors = load_safetensors(bytes(data))
            return SampleTable(
                offset={k.removeprefix("offset."): v for k, v in tensors.items() if k.startswith("offset.")},
                check={k.removeprefix("check."): v for k, v in tensors.items() if k.startswith("check.")},
                valid={k.removeprefix("valid."): v for k, v in tensors.items() if k.startswith("valid.")},
                split=tensors["split"], person=tensors["person"], waveform=tensors["waveform"], key=tensors["key"],
            )  # fmt: skip
        except (SafetensorError, KeyError, TypeError) as error:
            raise DataError(f"{name} is damaged: {error}") from None


def key_table(keys: Sequence[str]) -> npt.NDArray[np.uint8]:
    """Keys as zero-padded uint8 ``[sample, longest]``."""
    width = max((len(key) for key in keys), default=1)
    packed = b"".join(key.encode("ascii").ljust(width, b"\0") for key in keys)
    return np.frombuffer(packed, dtype=np.uint8).reshape(len(keys), width).copy()


@dataclass(frozen=True)
class ShardSet:
    """An opened shard set.

    Attributes:
        url: the folder.
        shards: its tars, in order.
        signals: by name (``ecg``, ``eeg``).
        rate: Hz.
        splits: samples in each split.
        people: distinct pseudonyms.
        simulated: whether any of it comes from a simulator.
        sources: names of the corpora it was made from.
        sidecar_sha256: hash of the sidecar.
        fingerprint: one hash over all of it (shards, signals, sidecar).
        made_by: what made it.
        base_url: where its tars lie, if that is the folder of another set: then this one is a view of it, with an index
            and a sidecar of its own.
    """

    url: str
    shards: tuple[ShardInfo, ...]
    signals: dict[str, SignalInfo]
    rate: float
    splits: dict[str, int]
    people: int
    simulated: bool
    sources: tuple[str, ...]
    sidecar_sha256: str
    fingerprint: str
    made_by: dict[str, Any]
    base_url: str = ""

    @property
    def data_url(self) -> str:
        """The folder of its tars."""
        return self.base_url or self.url

    @property
    def nsamples(self) -> int:
        """Samples in all splits."""
        return sum(shard.nsamples for shard in self.shards)

    def shard_url(self, shard: int) -> str:
        """Where a tar lies."""
        return storage.join(self.data_url, self.shards[shard].url)

    def shard_starts(self) -> npt.NDArray[np.int64]:
        """int64 ``[shard + 1]``: the first sample of every shard, and the number of samples."""
        return np.concatenate([[0], np.cumsum([shard.nsamples for shard in self.shards])]).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """The index document. A view's names each shard as it is found from the view, as ``wids`` reads it."""
        pointer = storage.pointer(self.base_url, self.url) if self.base_url else ""
        return {
            "__kind__": "wids-shard-index-v1",
            "wids_version": 1,
            "name": self.sources[0] if self.sources else "shards",
            "shardlist": [{**asdict(shard), "url": storage.join(pointer, shard.url)} for shard in self.shards],
            "physio_dist": {
                "format": FORMAT,
                "rate": self.rate,
                "signals": {
                    name: {
                        "channels": list(info.channels),
                        "samples": info.samples,
                        "dtype": "int16",
                        "uv_per_bit": info.uv_per_bit,
                    }
                    for name, info in sorted(self.signals.items())
                },
                "window_s": next(iter(self.signals.values())).samples / self.rate,
                "splits": self.splits,
                "people": self.people,
                "simulated": self.simulated,
                "sources": list(self.sources),
                "sidecar": {"url": SIDECAR, "sha256": self.sidecar_sha256},
                "fingerprint": self.fingerprint,
                "made_by": self.made_by,
                **({"of": pointer} if pointer else {}),
            },
        }


def fingerprint_of(shards: Sequence[ShardInfo], signals: dict[str, SignalInfo], rate: float, sidecar: str) -> str:
    """One hash over a set's content; where it lies and what made it do not count."""
    content = {
        "shards": [[shard.nsamples, shard.sha256] for shard in shards],
        "signals": {name: asdict(info) for name, info in signals.items()},
        "rate": float(rate),
        "sidecar": sidecar,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_set(url: str) -> ShardSet:
    """Read ``index.json`` of a shard set, and of the set it is a view of.

    Raises:
        UserError: there is no index, it is not one of ours, or a later version wrote it; or a view's set is not there.
        DataError: it contradicts itself, or the set that it is a view of.
    """
    opened = _open(url)
    if opened.base_url:
        _check_resplit(opened)
    return opened


def _check_resplit(view: ShardSet) -> None:
    """A view may name no file but those that a shard set lists as its own, else an index could have any file read.

    Raises:
        UserError: there is no shard set where the view says.
        DataError: there is one, with other shards.
    """
    try:
        home = _open(view.base_url)
    except storage.StorageError:
        raise
    except UserError:
        raise UserError(
            f"{view.url} is a view of the shards in {view.base_url}, where there is no finished shard set; move both "
            "together, or make the view again (`physio-dist folds`)"
        ) from None
    if home.base_url or (home.shards, home.signals, home.rate) != (view.shards, view.signals, view.rate):
        raise DataError(
            f"{view.url} is a view of {view.base_url}, which holds other shards than the view was made of; make it "
            "again"
        )


def _open(url: str) -> ShardSet:
    url = url.removesuffix("/" + INDEX).rstrip("/")
    where = storage.join(url, INDEX)
    try:
        document = storage.read_json(where)
    except storage.NotFoundError:
        raise UserError(
            f"{url} holds no {INDEX}: it is not a finished shard set. `physio-dist shard` makes one; for a WebDataset "
            f"made by something else, `physio-dist index {url}` does"
        ) from None
    if not isinstance(document, dict) or document.get("__kind__") != "wids-shard-index-v1":
        raise UserError(f"{where} is not a wids-shard-index-v1 document")
    ours = document.get("physio_dist")
    if not isinstance(ours, dict):
        raise UserError(f"{where} lacks what training needs; `physio-dist index {url}` adds it")
    if (theirs := ours.get("format")) != FORMAT:
        older = isinstance(theirs, int) and theirs < FORMAT
        todo = "convert the recordings again, into a new folder" if older else "upgrade physio-dist"
        raise UserError(f"{where} has format {theirs!r}, this version of physio-dist reads format {FORMAT}; {todo}")
    pointer = str(ours.get("of", ""))
    of = storage.pointed(pointer, url) if pointer else ""
    if of is None:
        raise DataError(f"{where} has its shards at {storage.without_secrets(pointer)}, where no index may point")
    try:
        shards = tuple(
            ShardInfo(
                str(s["url"]).removeprefix(f"{pointer}/"), int(s["nsamples"]), int(s["filesize"]), str(s["sha256"])
            )
            for s in document["shardlist"]
        )
        signals = {
            str(name): SignalInfo(tuple(s["channels"]), int(s["samples"]), float(s["uv_per_bit"]))
            for name, s in ours["signals"].items()
        }
        opened = ShardSet(
            url=url, shards=shards, signals=signals, rate=float(ours["rate"]), splits=dict(ours["splits"]),
            people=int(ours["people"]), simulated=bool(ours["simulated"]), sources=tuple(ours["sources"]),
            sidecar_sha256=str(ours["sidecar"]["sha256"]), fingerprint=str(ours["fingerprint"]),
            made_by=dict(ours["made_by"]), base_url=of,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where} is damaged: {type(error).__name__} {error}") from None
    for shard in shards:
        if "/" in shard.url or shard.url.startswith("."):
            raise DataError(f"{where} names a shard outside its own folder: {shard.url!r}")
    if opened.fingerprint != fingerprint_of(shards, signals, opened.rate, opened.sidecar_sha256):
        raise DataError(f"{where} was altered: its fingerprint does not fit its content")
    return opened


def read_sample_table(shards: ShardSet, read: Callable[[str], bytes | bytearray] = storage.read_bytes) -> SampleTable:
    """Read and check the sidecar of a set.

    Args:
        shards: the set.
        read: gives the bytes at a URL.

    Raises:
        DataError: it is not there, or disagrees with the index.
    """
    where = storage.join(shards.url, SIDECAR)
    try:
        data = read(where)
    except storage.NotFoundError:
        raise DataError(f"{where} is missing; make the set again or fetch it again") from None
    if hashlib.sha256(data).hexdigest() != shards.sidecar_sha256:
        raise DataError(f"{where} disagrees with the index (sha256); make the set again or fetch it again")
    sidecar = SampleTable.from_bytes(data, where)
    if wrong := _contradictions(shards, sidecar):
        raise DataError(f"{where} contradicts the index: {', '.join(wrong)}")
    return sidecar


def _contradictions(shards: ShardSet, sidecar: SampleTable) -> list[str]:
    """What of a sidecar does not fit its index: the hash vouches for the bytes, not for whoever wrote both."""
    n, ends = shards.nsamples, np.repeat([s.filesize for s in shards.shards], [s.nsamples for s in shards.shards])
    wanted: dict[str, tuple[npt.NDArray[Any] | None, str, tuple[int, ...]]] = {
        "split": (sidecar.split, "uint8", (n,)),
        "person": (sidecar.person, "uint64", (n,)),
        "waveform": (sidecar.waveform, "uint64", (n,)),
    }
    for name, info in shards.signals.items():
        wanted[f"offset.{name}"] = (sidecar.offset.get(name), "int64", (n,))
        wanted[f"check.{name}"] = (sidecar.check.get(name), "uint32", (n,))
        wanted[f"valid.{name}"] = (sidecar.valid.get(name), "bool", (n, len(info.channels)))
    wrong = [
        name
        for name, (values, dtype, shape) in wanted.items()
        if values is None or values.dtype != dtype or values.shape != shape
    ]
    if sidecar.key.dtype != np.uint8 or sidecar.key.ndim != 2 or len(sidecar.key) != n:
        wrong.append("key")
    if wrong:
        return wrong
    counts = np.bincount(sidecar.split, minlength=len(SPLITS)).tolist()
    if counts != [shards.splits.get(name) for name in SPLITS]:
        wrong.append("splits")
    if len(np.unique(sidecar.person)) != shards.people:
        wrong.append("people")
    for name, info in shards.signals.items():
        offset = sidecar.offset[name]
        outside = np.flatnonzero((offset < 0) | (offset + info.nbytes > ends))
        if len(outside):
            shard = int(np.searchsorted(shards.shard_starts(), outside[0], side="right")) - 1
            key = sidecar.keys(outside[:1])[0]
            wrong.append(f"offset.{name} (sample {key} does not lie within {shards.shards[shard].url})")
    return wrong


def publish(shards: ShardSet, sidecar: SampleTable) -> None:
    """Write the sidecar, then the index: a set without an index is not there yet."""
    storage.write_bytes(storage.join(shards.url, SIDECAR), sidecar.to_bytes())
    storage.write_json(storage.join(shards.url, INDEX), shards.to_json())


def split_of(person: int, val: float, test: float) -> int:
    """Split of a person (position in ``SPLITS``): by hash, so that it is the same in every set and for ever."""
    digest = hashlib.sha256(b"physio-dist split %d" % person).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    if u < test:
        return 2
    return 1 if u < test + val else 0


def pseudonym(source: str, person: str) -> int:
    """64-bit pseudonym of a person of a corpus.

    It hides the id from a reader of the shards, not from somebody who holds the list of ids.
    """
    digest = hashlib.sha256(f"physio-dist person {source}\n{person}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
