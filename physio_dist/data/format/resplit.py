"""Views: a shard set under other splits, with an index and a sample table of its own, and no copy of a shard."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from physio_dist import storage
from physio_dist.data.format.index import INDEX, SAMPLE_TABLE, SPLITS, ShardSet, fingerprint_of
from physio_dist.data.format.sample_table import SampleTable, publish
from physio_dist.errors import UserError
from physio_dist.runtime.arrays import UInt8Array

# Identifies an interrupted conversion; a resplit is no result of one.
_JOB = "job"


def with_splits(
    shards: ShardSet, table: SampleTable, split: UInt8Array, url: str, about: dict[str, Any]
) -> tuple[ShardSet, SampleTable]:
    """A resplit, not yet published.

    Args:
        shards, table: the set; a resplit of a resplit is one of the same shards.
        split: uint8 ``[sample]``, position in ``SPLITS``.
        url: where the resplit is going to be.
        about: what is noted of its making.

    Raises:
        UserError: an index at ``url`` could not name the shards.
    """
    if storage.pointed(storage.pointer(shards.data_url, url), url) is None:
        raise UserError(
            f"a resplit at {url} could not name the shards in {shards.data_url}, for who reads the one may not reach "
            "the other; give a place beside the shards, or a local folder"
        )
    other = replace(table, split=split)
    digest = hashlib.sha256(other.to_bytes()).hexdigest()
    made = replace(
        shards, url=url, base_url=shards.data_url, sample_table_sha256=digest,
        splits={name: int((split == code).sum()) for code, name in enumerate(SPLITS)},
        fingerprint=fingerprint_of(shards.shards, shards.signals, shards.rate, digest),
        made_by={**{name: value for name, value in shards.made_by.items() if name != _JOB}, "view": about},
    )  # fmt: skip
    return made, other


def publish_resplits(resplits: list[tuple[ShardSet, SampleTable]], out: str) -> int:
    """Write the resplits that are not there yet; all of them lie right below ``out``.

    Returns:
        How many were written.

    Raises:
        UserError: something else is there; nothing was written.
    """
    instead = "choose another --out, or delete it first"
    expected = {made.url.rsplit("/", 1)[-1] for made, _ in resplits}
    # What begins with a dot is a write that was killed, or the file system's own.
    if others := [name for name in storage.names(out) if name not in expected and not name.startswith(".")]:
        raise UserError(f"{out} holds something else than these {len(resplits)} resplits: {_some(others)}; {instead}")
    missing = []
    for made, table in resplits:
        names = [name for name in storage.names(made.url) if not name.startswith(".")]
        if others := [name for name in names if name not in (INDEX, SAMPLE_TABLE)]:
            raise UserError(f"{made.url} holds something else than a resplit: {_some(others)}; {instead}")
        if INDEX in names and storage.read_json(storage.join(made.url, INDEX)) != made.to_json():
            raise UserError(
                f"{made.url} holds another shard set, or a resplit made from other data or options; {instead}"
            )
        if len(names) < 2:
            missing.append((made, table))
    for made, table in missing:
        publish(made, table)
    return len(missing)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
