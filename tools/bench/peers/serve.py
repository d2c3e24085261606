"""The side of a measured process: commands come in on stdin, one JSON line a command goes out on stdout.

It runs in the peers' environments too and needs NumPy alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Epoch = Callable[[], Iterable[Any]]


def serve(commands: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
    """Do what stdin says until it ends."""
    # Libraries print what they like; the answers keep stdout for themselves.
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(commands[line.strip()]()), file=out, flush=True)


def timed(epoch: Epoch) -> dict[str, Any]:
    """Consume an epoch's batches and do nothing with them."""
    start = time.perf_counter()
    count = 0
    for batch in epoch():
        count += len(batch)
    return {"seconds": time.perf_counter() - start, "samples": count}


def batched(samples: Iterable[Any], batch: int, stack: Callable[[list[Any]], Any]) -> Iterator[Any]:
    """Batches of an iterable of single samples, with as little around them as Python allows."""
    found = []
    for sample in samples:
        found.append(sample)
        if len(found) == batch:
            yield stack(found)
            found = []
    if found:
        yield stack(found)


def hashes(batches: Iterable[Any]) -> list[int]:
    """A hash of every sample, in the order of delivery.

    Args:
        batches: int16 ``[sample, channel, time]``, NumPy or torch.
    """
    found: list[int] = []
    for batch in batches:
        values = np.asarray(batch)
        assert values.dtype == np.int16 and values.ndim == 3, f"a batch is {values.dtype} {values.shape}"
        found += _hashes(values).tolist()
    return found


def _hashes(values: npt.NDArray[np.int16]) -> npt.NDArray[np.uint64]:
    flat = np.ascontiguousarray(values).reshape(len(values), -1)
    factors = np.random.default_rng(0).integers(1, 2**63, flat.shape[1], dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    # Overflow wraps around, as it should. In a few rows at a time, because they grow fourfold.
    pieces = [flat[i : i + 64].astype(np.uint64) @ factors for i in range(0, len(flat), 64)]
    return np.concatenate(pieces)


def peer(
    prepare: Callable[[npt.NDArray[np.int16], Path], None],
    ways: Callable[[Path, int], Mapping[str, Epoch]],
) -> None:
    """Serve a library that is measured beside ours: ``X_peer.py SAMPLES.npy FOLDER BATCH``.

    Args:
        prepare: writes samples, int16 ``[sample, channel, time]``, into a folder in the library's own format.
        ways: the ways to iterate over an epoch of that folder in batches of a size. The fastest one is measured.
    """
    samples, folder, batch = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    known: dict[str, Epoch] = {}
    chosen: list[str] = []

    def start() -> dict[str, Any]:
        done = folder / "prepared"
        if not done.exists():
            prepare(np.load(samples, mmap_mode="r"), folder)
            done.touch()
        known.update(ways(folder, batch))
        rounds = [{name: timed(epoch)["seconds"] for name, epoch in known.items()} for _ in range(4)]
        seconds = {name: min(taken[name] for taken in rounds[1:]) for name in known}
        chosen.append(min(seconds, key=lambda name: seconds[name]))
        return {"way": chosen[0], "seconds": seconds}

    serve({
        "start": start,
        "check": lambda: {"hashes": hashes(known[chosen[0]]())},
        "epoch": lambda: timed(known[chosen[0]]),
    })  # fmt: skip
