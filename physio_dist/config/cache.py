"""Options of the node cache of shards: the section ``data`` of every command that reads a shard set."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from physio_dist.config.options import Range, one_url, option
from physio_dist.storage.user_cache import user_cache_dir


@dataclass
class CacheOptions:
    """The node's cache of shards."""

    cache_dir: str = option(
        lambda: str(user_cache_dir()),
        "Local folder in which each node caches shards.",
        urls=one_url,
        shown="~/.cache/physio-dist",
    )
    cache_gb: float = option(
        50.0, "Size of that cache in GB.", Range(0.0, math.inf, "it must be positive", open_low=True)
    )


@dataclass
class EmbedConfig:
    """Options of ``physio-dist embed``."""

    data: CacheOptions = field(default_factory=CacheOptions)

    def validate(self) -> None:
        """Accept all combinations."""
