"""Handles of opened shard sets: a command opens each set once and passes the handle on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

from physio_dist import storage
from physio_dist.data.format.index import ShardSet, open_set
from physio_dist.data.format.sample_table import SampleTable, read_sample_table
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.loading.dataset import ShardDataset


class CacheOptions(Protocol):
    """Options of the node cache, as ``data.cache_dir`` and ``data.cache_gb`` give them."""

    @property
    def cache_dir(self) -> str:
        """Folder of the cache."""

    @property
    def cache_gb(self) -> float:
        """Limit of the cached shards' size, in GB."""


class ShardSetHandle:
    """An opened shard set: its index, sample table and cache, each made once.

    Args:
        url: the shard set, with or without ``/index.json``.
        cache: opens the shards; shared by all handles of a command.

    Attributes:
        index: the parsed index.
        cache: the cache.

    Raises:
        UserError: there is no shard set at ``url``.
        DataError: the index is damaged.
    """

    def __init__(self, url: str, cache: ShardCache) -> None:
        self.index: ShardSet = open_set(url)
        self.cache = cache

    @cached_property
    def sample_table(self) -> SampleTable:
        """The table of all samples, read at its first use.

        Raises:
            DataError: it is missing, damaged, or disagrees with the index.
        """
        if storage.is_local(self.index.url):
            return read_sample_table(self.index)
        return read_sample_table(self.index, lambda _: self.cache.sample_table(self.index))

    def dataset(self, signal: str) -> ShardDataset:
        """The samples of one signal.

        Raises:
            UserError: the set lacks the signal.
        """
        return ShardDataset([self], signal)


def open_cache(options: CacheOptions) -> ShardCache:
    """The node cache that the options describe.

    Raises:
        UserError: its folder cannot be made.
    """
    return ShardCache(options.cache_dir, options.cache_gb * 1e9)


def open_handle(url: str, options: CacheOptions) -> ShardSetHandle:
    """Open a shard set with a cache of its own. Raises as :class:`ShardSetHandle` and :func:`open_cache` do."""
    return ShardSetHandle(url, open_cache(options))


def open_dataset(parts: Sequence[tuple[str, float]], signal: str, cache: ShardCache) -> ShardDataset:
    """Open one or several shard sets as one dataset.

    Args:
        parts: (URL, weight) of each set.
        signal: ``ecg`` or ``eeg``.
        cache: opens the shards.

    Raises:
        UserError: a set that is not there, lacks the signal, or does not fit the first one.
        DataError: a damaged index or sample table.
    """
    handles = [ShardSetHandle(url, cache) for url, _ in parts]
    return ShardDataset(handles, signal, [weight for _, weight in parts])
