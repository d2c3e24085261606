"""One or several shard sets that a run reads as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from physio_dist.data.format.index import SPLITS, ShardSet, open_set
from physio_dist.data.format.sample_table import SampleTable
from physio_dist.data.loading.order import Mixture, mixture
from physio_dist.errors import UserError
from physio_dist.runtime.arrays import Int64Array


def open_sets(urls: Sequence[str], signal: str) -> list[ShardSet]:
    """Open sets with the same channels, rate and length of a signal.

    Raises:
        UserError: a set that is not there, lacks the signal, or does not fit the first one.
        DataError: a damaged index.
    """
    sets = [open_set(url) for url in urls]
    check_compatible(sets, signal)
    return sets


def check_compatible(sets: Sequence[ShardSet], signal: str) -> None:
    """Check that sets can be mixed.

    Raises:
        UserError: a set lacks the signal, or its rate, window length or channels differ from the first one's.
    """
    for shards in sets:
        if signal not in shards.signals:
            raise UserError(f"{shards.url} holds no {signal} signal; it has: {', '.join(shards.signals)}")
        _agree(sets[0], shards, signal)


def members(table: SampleTable, split: str) -> Int64Array:
    """The samples of a split, in storage order."""
    return np.flatnonzero(table.split == SPLITS.index(split)).astype(np.int64)


def order_of(
    sets: Sequence[ShardSet], tables: Sequence[SampleTable], weights: Sequence[float], split: str, global_batch: int,
    seed: int,
) -> Mixture:  # fmt: skip
    """The order in which a run visits a split.

    Raises:
        UserError: a split with fewer samples than its part of one global batch.
    """
    counts = [
        np.diff(np.searchsorted(members(table, split), shards.shard_starts()))
        for shards, table in zip(sets, tables, strict=True)
    ]
    names = [f"{shards.fingerprint}/{split}" for shards in sets]
    labels = [f"{shards.url}: split {split}" for shards in sets]
    return mixture(counts, weights, names, global_batch, seed, labels)


def _agree(first: ShardSet, other: ShardSet, signal: str) -> None:
    ours, theirs = first.signals[signal], other.signals[signal]
    for name, a, b in (
        ("rate", first.rate, other.rate),
        ("window length", ours.samples, theirs.samples),
        ("channels", ours.channels, theirs.channels),
    ):
        if a != b:
            raise UserError(f"{other.url} and {first.url} cannot be mixed: {name} {b} against {a}")
