"""The index of a shard set.

``index.json`` is a ``wids-shard-index-v1`` document: the ``wids`` package reads its ``shardlist``. Our additions stand
under the key ``physio_dist``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from physio_dist import storage
from physio_dist.errors import DataError, UserError
from physio_dist.runtime.arrays import Int64Array

FORMAT = 2
INDEX = "index.json"
SAMPLE_TABLE = "samples.safetensors"
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
        sample_table_sha256: hash of the sample table.
        fingerprint: one hash over all of it (shards, signals, sample table).
        made_by: what made it.
        base_url: folder of its tars, if that is another set's: then this one is a resplit of it, with an index and a
            sample table of its own.
    """

    url: str
    shards: tuple[ShardInfo, ...]
    signals: dict[str, SignalInfo]
    rate: float
    splits: dict[str, int]
    people: int
    simulated: bool
    sources: tuple[str, ...]
    sample_table_sha256: str
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
        """URL of a tar."""
        return storage.join(self.data_url, self.shards[shard].url)

    def shard_starts(self) -> Int64Array:
        """int64 ``[shard + 1]``: the first sample of every shard, and the number of samples."""
        return np.concatenate([[0], np.cumsum([shard.nsamples for shard in self.shards])]).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """The index document. A resplit's names each shard as it is found from the resplit, as ``wids`` reads it."""
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
                "sidecar": {"url": SAMPLE_TABLE, "sha256": self.sample_table_sha256},
                "fingerprint": self.fingerprint,
                "made_by": self.made_by,
                **({"of": pointer} if pointer else {}),
            },
        }


def fingerprint_of(shards: Sequence[ShardInfo], signals: dict[str, SignalInfo], rate: float, table: str) -> str:
    """One hash over a set's content; its location and origin do not count."""
    content = {
        "shards": [[shard.nsamples, shard.sha256] for shard in shards],
        "signals": {name: asdict(info) for name, info in signals.items()},
        "rate": float(rate),
        "sidecar": table,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_set(url: str) -> ShardSet:
    """Read ``index.json`` of a shard set, and of the set it is a resplit of.

    Raises:
        UserError: there is no index, it is not one of ours, or a later version wrote it; or the set that it is a
            resplit of is not there.
        DataError: it contradicts itself, or the set that it is a resplit of.
    """
    opened = _open(url)
    if opened.base_url:
        _check_resplit(opened)
    return opened


def _check_resplit(resplit: ShardSet) -> None:
    """A resplit may name no file but those that a shard set lists as its own, else an index could have any file read.

    Raises:
        UserError: there is no shard set where the resplit says.
        DataError: there is one, with other shards.
    """
    try:
        base = _open(resplit.base_url)
    except storage.StorageError:
        raise
    except UserError:
        raise UserError(
            f"{resplit.url} is a resplit of the shards in {resplit.base_url}, where there is no finished shard set; "
            "move both together, or make the resplit again (`physio-dist folds`)"
        ) from None
    if base.base_url or (base.shards, base.signals, base.rate) != (resplit.shards, resplit.signals, resplit.rate):
        raise DataError(
            f"{resplit.url} is a resplit of {resplit.base_url}, which holds other shards than the resplit was made of; "
            "make it again"
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
            sample_table_sha256=str(ours["sidecar"]["sha256"]), fingerprint=str(ours["fingerprint"]),
            made_by=dict(ours["made_by"]), base_url=of,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{where} is damaged: {type(error).__name__} {error}") from None
    for shard in shards:
        if "/" in shard.url or shard.url.startswith("."):
            raise DataError(f"{where} names a shard outside its own folder: {shard.url!r}")
    if opened.fingerprint != fingerprint_of(shards, signals, opened.rate, opened.sample_table_sha256):
        raise DataError(f"{where} was altered: its fingerprint does not fit its content")
    return opened
