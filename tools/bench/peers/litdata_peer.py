"""LitData, on chunks of NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import litdata
import numpy as np
import numpy.typing as npt
import torch
from serve import Epoch, batched, peer


class Taken:
    """Sample by number; a class, because it goes to another process."""

    def __init__(self, samples: npt.NDArray[np.int16], as_tensor: bool) -> None:
        self._samples, self._as_tensor = samples, as_tensor

    def __call__(self, index: int) -> npt.NDArray[np.int16] | torch.Tensor:
        sample = np.array(self._samples[index])
        return torch.from_numpy(sample) if self._as_tensor else sample


def prepare(samples: npt.NDArray[np.int16], folder: Path) -> None:
    """Write the chunks twice, of arrays and of tensors, which it stores differently."""
    for name in ("arrays", "tensors"):
        litdata.optimize(
            fn=Taken(samples, name == "tensors"), inputs=list(range(len(samples))), output_dir=str(folder / name),
            chunk_bytes="64MB", num_workers=1,
        )  # fmt: skip


def ways(folder: Path, batch: int) -> Mapping[str, Epoch]:
    """Its own loader in this process, with its collation and with a plain one, and no loader at all."""
    found: dict[str, Epoch] = {}
    for name, stack in (("arrays", np.stack), ("tensors", torch.stack)):
        found |= _ways(name, str(folder / name), stack, batch)
    return found


def _ways(name: str, folder: str, stack: Callable[[Any], Any], batch: int) -> dict[str, Epoch]:
    # A loader changes the settings of its data set, so each way has one of its own.
    loader, stacking = (
        litdata.StreamingDataLoader(
            litdata.StreamingDataset(folder, shuffle=True), batch_size=batch, num_workers=0, shuffle=True, **options
        )
        for options in ({}, {"collate_fn": stack})
    )
    data = litdata.StreamingDataset(folder, shuffle=True)
    return {
        f"{name}, StreamingDataLoader": lambda: iter(loader),
        f"{name}, StreamingDataLoader, stack": lambda: iter(stacking),
        f"{name}, iteration, stack": lambda: batched(data, batch, stack),
    }


if __name__ == "__main__":
    peer(prepare, ways)
