"""LitData, on chunks of NumPy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import litdata
import numpy as np
import numpy.typing as npt
from serve import Epoch, batched, peer


class Taken:
    """Sample by number; a class, because it goes to another process."""

    def __init__(self, samples: npt.NDArray[np.int16]) -> None:
        self._samples = samples

    def __call__(self, index: int) -> npt.NDArray[np.int16]:
        return np.array(self._samples[index])


def prepare(samples: npt.NDArray[np.int16], folder: Path) -> None:
    """Write the chunks, of its own usual size. (Chunks of torch tensors are read several times slower.)"""
    inputs = list(range(len(samples)))
    litdata.optimize(fn=Taken(samples), inputs=inputs, output_dir=str(folder), chunk_bytes="64MB", num_workers=1)


def ways(folder: Path, batch: int) -> Mapping[str, Epoch]:
    """Its own loader in this process, with its collation and with a plain one, and no loader at all."""
    # A loader changes the settings of its data set, so each way has one of its own.
    data, one, other = (litdata.StreamingDataset(str(folder), shuffle=True) for _ in range(3))
    options = {"batch_size": batch, "num_workers": 0, "shuffle": True}
    loader = litdata.StreamingDataLoader(one, **options)
    stacking = litdata.StreamingDataLoader(other, **options, collate_fn=np.stack)
    return {
        "StreamingDataLoader": lambda: iter(loader),
        "StreamingDataLoader, np.stack": lambda: iter(stacking),
        "iteration, np.stack": lambda: batched(data, batch, np.stack),
    }


if __name__ == "__main__":
    peer(prepare, ways)
