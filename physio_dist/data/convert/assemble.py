"""Spooled windows to one published shard."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, cast

from safetensors.numpy import load as load_safetensors

from physio_dist import storage
from physio_dist.data.convert.parts import WindowFacts
from physio_dist.data.format import tar
from physio_dist.data.format.index import ShardInfo


@dataclass(frozen=True)
class WindowRef:
    """A window of a shard: the part and row that its samples are spooled in, and its facts."""

    part: int
    row: int
    facts: WindowFacts


@dataclass(frozen=True)
class ShardResult:
    """A published shard, with the offsets and the valid channels of each sample's signals."""

    info: ShardInfo
    places: list[tar.Places]
    valid: list[dict[str, list[bool]]]


def part_url(spool: str, number: int) -> str:
    """URL of a spooled part."""
    return storage.join(spool, f"part-{number:06d}.safetensors")


def receipt_url(spool: str, name: str, digest: str) -> str:
    """URL of the receipt of a published shard."""
    return storage.join(spool, f"{name}-{digest[:8]}.json")


def read_receipt(url: str) -> ShardResult:
    """Read the receipt of a published shard.

    Raises:
        StorageError: there is none, or it cannot be read.
    """
    receipt = storage.read_json(url)
    return ShardResult(ShardInfo(**receipt["info"]), receipt["places"], receipt["valid"])


def make_shard(
    source: str, group: Sequence[WindowRef], spool: str, out: str, name: str, digest: str, return_result: bool = False
) -> ShardResult | None:
    """Write one shard from spooled parts and publish it, unless an earlier attempt has published it.

    Args:
        source: name of the corpus.
        group: windows of the shard, those of a part one after the other.
        spool: URL of the folder of the parts.
        out: URL of the shard set.
        name: of the shard.
        digest: of the conversion.
        return_result: whether to return the result; otherwise only the receipt has it.

    Raises:
        StorageError: a part cannot be read, the shard not be written.
    """
    receipt, url = receipt_url(spool, name, digest), storage.join(out, name)
    # A receipt of another version may lack fields.
    with contextlib.suppress(storage.NotFoundError, KeyError, TypeError):
        result = read_receipt(receipt)
        if storage.size(url) == result.info.filesize:
            return result if return_result else None
    local = storage.local_path(spool) if storage.is_local(spool) else Path(tempfile.gettempdir())
    valid: list[dict[str, list[bool]]] = []
    try:
        # A name of its own: a worker that was given up for lost may still be writing the same shard.
        with tempfile.NamedTemporaryFile(dir=local, prefix=f"{name[:-4]}-", suffix=".tar") as file:
            places = tar.write(_samples(source, group, spool, valid), cast(BinaryIO, file))
            file.flush()
            path = Path(file.name)
            info = ShardInfo(name, len(group), path.stat().st_size, storage.sha256_of(path))
            storage.put_file(path, url)
    except OSError as error:
        raise storage.to_storage_error(str(local / name), "write", error) from error
    result = ShardResult(info, places, valid)
    storage.write_json(receipt, asdict(result))
    return result if return_result else None


def _samples(
    source: str, group: Sequence[WindowRef], spool: str, valid: list[dict[str, list[bool]]]
) -> Iterator[tar.Sample]:
    """The samples of a shard; their valid channels are appended to ``valid``."""
    for part, items in itertools.groupby(group, key=lambda item: item.part):
        tensors = load_safetensors(storage.read_bytes(part_url(spool, part)))
        signals = [name for name in tensors if "." not in name]
        for item in items:
            facts = item.facts
            valid.append({name: tensors[f"valid.{name}"][item.row].tolist() for name in signals})
            yield tar.Sample(
                key=facts.key,
                signals={name: tensors[name][item.row] for name in signals},
                facts={
                    "record": facts.record,
                    "person": f"{facts.person:016x}",
                    "source": source,
                    "start_s": facts.start_s,
                    "labels": facts.labels,
                    "quality": {"fit": facts.usable, "reasons": facts.reasons},
                    "valid": valid[-1],
                    "simulated": bool(facts.labels.get("simulated", False)),
                },
            )
