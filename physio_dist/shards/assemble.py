"""Spooled windows to one published shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from physio_dist import storage
from physio_dist.shards import tar
from physio_dist.shards.convert import WindowFacts
from physio_dist.shards.index import ShardInfo


@dataclass(frozen=True)
class Kept:
    """A window that goes into a shard: where its samples are spooled, and its facts."""

    part: int
    row: int
    facts: WindowFacts


def part_path(spool: Path, number: int) -> Path:
    """Where a part is spooled."""
    return spool / f"part-{number:06d}.safetensors"


def signals_of(spool: Path, part: int) -> list[str]:
    """Names of the signals in a spooled part."""
    with safe_open(part_path(spool, part), framework="numpy") as file:
        return sorted(name for name in file.keys() if "." not in name)  # noqa: SIM118 (safe_open is no mapping)


def make_shard(
    source: str, group: Sequence[Kept], spool: str, out: str, name: str, digest: str
) -> tuple[ShardInfo, list[tar.Places]]:
    """Write one shard from spooled parts and publish it; a shard that an earlier try published is not sent again."""
    note = Path(spool) / f"{name}-{digest[:8]}.json"
    url = storage.join(out, name)
    if note.is_file():
        told = json.loads(note.read_text())
        if storage.exists(url) and storage.size(url) == told["info"]["filesize"]:
            return ShardInfo(**told["info"]), told["offsets"]
    local = Path(spool) / name
    try:
        with local.open("wb") as file:
            offsets = tar.write(_samples(source, group, Path(spool)), file)
    except OSError as error:
        raise storage.explain(str(local), "write", error) from error
    info = ShardInfo(name, len(group), local.stat().st_size, sha256_of(local))
    storage.put_file(local, url)
    storage.write_json(str(note), {"info": asdict(info), "offsets": offsets})
    local.unlink()
    return info, offsets


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _samples(source: str, group: Sequence[Kept], spool: Path) -> Iterator[tar.Sample]:
    opened: tuple[int, dict[str, Any]] | None = None
    for item in group:
        if opened is None or opened[0] != item.part:
            with safe_open(part_path(spool, item.part), framework="numpy") as file:
                opened = (item.part, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        tensors, facts = opened[1], item.facts
        signals = [name for name in tensors if "." not in name]
        yield tar.Sample(
            key=facts.key,
            signals={name: tensors[name][item.row] for name in signals},
            facts={
                "record": facts.record,
                "person": f"{facts.person:016x}",
                "source": source,
                "start_s": facts.start_s,
                "labels": facts.labels,
                "quality": {"fit": facts.fit, "reasons": facts.reasons},
                "valid": {name: tensors[f"valid.{name}"][item.row].tolist() for name in signals},
                "simulated": bool(facts.labels.get("simulated", False)),
            },
        )
