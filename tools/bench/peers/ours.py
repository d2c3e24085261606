"""Our feed: ``ours.py LOCAL BATCH`` or ``ours.py LOCAL BATCH REMOTE CACHE``, the same set on the disk and by URL."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from serve import hashes, serve, timed

from physio_dist.data.handle import open_dataset
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.loading.loader import LoaderPlan, PrefetchLoader

SEED = 0


class Epochs:
    """One epoch after the other of a set.

    Args:
        url: of the set.
        batch: samples in a batch.
        cache: folder of the shards that have been fetched.
    """

    def __init__(self, url: str, batch: int, cache: Path) -> None:
        self.source = open_dataset([(url, 1.0)], "ecg", ShardCache(str(cache), 1e15))
        self._order = self.source.order("train", batch, SEED)
        self._batch, self._done = batch, 0
        self._steps = self.source.sets[0].splits["train"] // batch

    def __call__(self) -> Iterator[npt.NDArray[np.int16]]:
        start = self._done * self._steps
        self._done += 1
        plan = LoaderPlan(self._order, "train", self._batch, start, start + self._steps)
        with PrefetchLoader(self.source, plan, lambda batch: batch) as feed:
            for batch in feed:
                yield batch.signal
                batch.release()


def remote(url: str, batch: int, cache: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """The commands for a set by URL: an epoch with nothing in the cache, then one with everything in it."""
    opened: list[Epochs] = []

    def cold() -> dict[str, Any]:
        shutil.rmtree(cache, ignore_errors=True)
        opened[:] = [Epochs(url, batch, cache)]
        return {**timed(opened[0]), "bytes": sum(path.stat().st_size for path in cache.rglob("*.tar"))}

    return {"cold": cold, "second": lambda: timed(opened[0])}


def main() -> None:
    """Answer until stdin ends."""
    local, batch = sys.argv[1], int(sys.argv[2])
    epochs = Epochs(local, batch, Path(local).parent / "no-cache")
    commands: dict[str, Callable[[], dict[str, Any]]] = {"epoch": lambda: timed(epochs)}
    if len(sys.argv) > 3:
        commands |= remote(sys.argv[3], batch, Path(sys.argv[4]))
    # The first epoch verifies the shards, so it warms up what the later ones use.
    serve({**commands, "check": lambda: {"hashes": hashes(epochs())}, "start": lambda: {"way": "Feed"}})


if __name__ == "__main__":
    main()
