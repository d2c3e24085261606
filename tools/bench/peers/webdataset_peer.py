"""Stock WebDataset, on the very tars that our feed reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import webdataset
from serve import Epoch, peer

# Samples of its shuffle buffer.
BUFFER = 1000


def prepare(samples: npt.NDArray[np.int16], folder: Path) -> None:
    """Nothing to do: the folder holds our tars."""


def ways(folder: Path, batch: int) -> Mapping[str, Epoch]:
    """As its manual has it, and without the members that nobody asked for."""
    urls = sorted(str(path) for path in folder.glob("*.tar"))

    def pipeline(**options: object) -> webdataset.WebDataset:
        data = webdataset.WebDataset(urls, shardshuffle=len(urls), **options)
        return data.shuffle(BUFFER).decode().to_tuple("ecg.npy").batched(batch)

    plain, arrays = pipeline(), pipeline(select_files=lambda name: name.endswith(".npy"))
    return {
        "decode, batched": lambda: (signal for (signal,) in plain),
        "select_files, decode, batched": lambda: (signal for (signal,) in arrays),
    }


if __name__ == "__main__":
    peer(prepare, ways)
