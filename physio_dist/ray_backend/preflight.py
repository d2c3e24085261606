"""A look at every rank on a Ray cluster before the ranks meet: the same versions everywhere, a GPU where one was given.

What is found here would otherwise surface minutes later, as a collective that hangs or a kernel that is missing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import ray
import ray.train.torch

from physio_dist import __version__
from physio_dist.errors import EXIT_USER, UserError

# What ranks exchange tensors with has to be the same on all of them.
_ALIKE = ("torch", "deepspeed")


@dataclass(frozen=True)
class RankEnv:
    """What a rank says of itself.

    Attributes:
        node: address of its machine.
        version: of physio-dist.
        versions: of the packages that have to be alike on all ranks, by name; empty where one is missing.
        cuda: whether torch finds a GPU.
        visible: ``CUDA_VISIBLE_DEVICES`` there.
    """

    node: str
    version: str
    versions: dict[str, str]
    cuda: bool
    visible: str


def collect_env() -> RankEnv:
    """What this process would be as a rank."""
    import torch

    versions = {name: _version(name) for name in _ALIKE}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return RankEnv(ray.util.get_node_ip_address(), __version__, versions, torch.cuda.is_available(), visible)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def check_env(ranks: Sequence[RankEnv], version: str, gpu: bool) -> str | None:
    """Why these ranks cannot train together, and what to do; None where they can.

    Args:
        ranks: in their order.
        version: of physio-dist where the command was started.
        gpu: whether each was given one.
    """
    for number, rank in enumerate(ranks):
        if rank.version != version:
            return (
                f"physio-dist is {rank.version} on node {rank.node} and {version} where the command was started: "
                "install the same on every node, or bring yours along with `ray job submit --working-dir . -- python "
                "-m physio_dist.launch ...`"
            )
        for name in _ALIKE:
            if not rank.versions[name]:
                return f"node {rank.node} has no {name}: install on it what physio-dist needs"
            if rank.versions[name] != ranks[0].versions[name]:
                return (
                    f"{name} is {ranks[0].versions[name]} on node {ranks[0].node} and {rank.versions[name]} on node "
                    f"{rank.node}: install the same version on every node"
                )
        if gpu and not rank.cuda:
            return (
                f"rank {number} on node {rank.node} was given a GPU (CUDA_VISIBLE_DEVICES={rank.visible}), but torch "
                f"{rank.versions['torch']} finds none there: install NVIDIA's driver and a build of torch for CUDA on "
                "that node, or train on CPUs with cluster.gpu=false"
            )
    return None


@dataclass
class PreflightTorchConfig(ray.train.torch.TorchConfig):  # type: ignore[misc]
    """Ray's own set-up of the process group, after the roll call.

    Attributes:
        coordinator: is told what is wrong, which ends the run.
        gpu: whether each rank was given one.
        version: of physio-dist where the command was started.
    """

    coordinator: Any = None
    gpu: bool = False
    version: str = __version__

    @property
    def backend_cls(self) -> type:
        """What Ray calls when all workers are there."""
        return _Backend


class _Backend(ray.train.torch.TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: PreflightTorchConfig) -> None:
        wrong = check_env(worker_group.execute(collect_env), backend_config.version, backend_config.gpu)
        if wrong is not None:
            ray.get(backend_config.coordinator.tell_end.remote(EXIT_USER, wrong, True))
            raise UserError(wrong)
        super().on_start(worker_group, backend_config)
