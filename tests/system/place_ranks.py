"""The driver of a run whose ranks only note where they are, and stay until a file ``go`` appears beside their notes.

Options as for ``physio_dist.launch``. The GPUs it is given are only declared, so that its ranks meet over gloo.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist

from physio_dist.ray_backend import train_driver
from physio_dist.runtime import exit_status


def note(given: dict[str, Any]) -> None:
    folder = Path(given["options"].run.dir)
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    assert rank == dist.get_rank() == ray.train.get_context().get_world_rank()
    node, visible = ray.get_runtime_context().get_node_id(), os.environ.get("CUDA_VISIBLE_DEVICES")
    facts = {"rank": rank, "local_rank": local, "node": node, "visible": visible}
    (folder / f"rank-{rank}.new").write_text(json.dumps(facts))
    (folder / f"rank-{rank}.new").rename(folder / f"rank-{rank}.json")
    while not (folder / "go").exists():
        time.sleep(0.1)


def without_gpus(**_: object) -> ray.train.torch.TorchConfig:
    return ray.train.torch.TorchConfig(backend="gloo")


train_driver.train_one_rank = note
train_driver.PreflightTorchConfig = without_gpus
exit_status.end_rank(exit_status.status_of(lambda: train_driver.main(sys.argv[1:])))
