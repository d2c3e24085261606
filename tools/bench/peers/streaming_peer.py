"""MosaicML Streaming, on MDS shards of arrays of a fixed shape."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from serve import Epoch, batched, peer

try:
    import torchvision  # noqa: F401
except RuntimeError:
    # PyPI's torchvision does not fit a CPU build of torch: it asks for operators that could not be loaded. Streaming
    # imports it for image data sets alone, so the operators' names are enough.
    _library = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _library.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from streaming import MDSWriter, StreamingDataset


def prepare(samples: npt.NDArray[np.int16], folder: Path) -> None:
    """Write the shards, of its own default size."""
    shape = ",".join(map(str, samples.shape[1:]))
    with MDSWriter(out=str(folder), columns={"ecg": f"ndarray:int16:{shape}"}) as out:
        for sample in samples:
            out.write({"ecg": np.ascontiguousarray(sample)})


def stacked(samples: list[dict[str, Any]]) -> npt.NDArray[np.int16]:
    """A batch of samples."""
    return np.stack([sample["ecg"] for sample in samples])


def ways(folder: Path, batch: int) -> Mapping[str, Epoch]:
    """A DataLoader in this process, with torch's collation and with a plain one, and no DataLoader at all."""
    data = StreamingDataset(local=str(folder), shuffle=True, batch_size=batch)
    torchs = torch.utils.data.DataLoader(data, batch_size=batch, num_workers=0)
    numpys = torch.utils.data.DataLoader(data, batch_size=batch, num_workers=0, collate_fn=stacked)
    return {
        "DataLoader": lambda: (found["ecg"] for found in torchs),
        "DataLoader, np.stack": lambda: iter(numpys),
        "iteration, np.stack": lambda: batched(data, batch, stacked),
    }


if __name__ == "__main__":
    peer(prepare, ways)
