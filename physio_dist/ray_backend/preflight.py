"""Preflight check of all ranks on a Ray cluster: the same versions everywhere, and a GPU where one was assigned.

A mismatch would otherwise surface minutes later, as a collective that hangs or a missing kernel.
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

# Packages by which ranks exchange tensors.
_SAME_VERSION = ("torch", "deepspeed")


@dataclass(frozen=True)
class RankEnv:
    """Environment of a rank.

    Attributes:
        node: IP address of the node.
        version: of physio-dist.
        versions: of the packages that must be the same on all ranks; an empty string if one is missing.
        cuda: whether torch finds a GPU.
        visible: ``CUDA_VISIBLE_DEVICES`` of the worker.
    """

    node: str
    version: str
    versions: dict[str, str]
    cuda: bool
    visible: str


def collect_env() -> RankEnv:
    """Return the environment of this process."""
    import torch

    versions = {name: _version(name) for name in _SAME_VERSION}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return RankEnv(ray.util.get_node_ip_address(), __version__, versions, torch.cuda.is_available(), visible)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def check_env(ranks: Sequence[RankEnv], version: str, gpu: bool) -> str | None:
    """Return why these ranks cannot train together and what to do, or None if they can.

    Args:
        ranks: environments by rank.
        version: physio-dist's version where the command was started.
        gpu: whether each rank was assigned a GPU.
    """
    for number, rank in enumerate(ranks):
        if rank.version != version:
            return (
                f"physio-dist is {rank.version} on node {rank.node} and {version} where the command was started: "
                "install the same on every node, or bring yours along with `ray job submit --working-dir . -- python "
                "-m physio_dist.launch ...`"
            )
        for name in _SAME_VERSION:
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
    """Ray's set-up of the process group, preceded by the preflight check.

    Attributes:
        coordinator: receives the error, which ends the run.
        gpu: whether each rank was assigned a GPU.
        version: version of physio-dist where the command was started.
    """

    coordinator: Any = None
    gpu: bool = False
    version: str = __version__

    @property
    def backend_cls(self) -> type:
        """Class that Ray instantiates when all workers have started."""
        return _Backend


class _Backend(ray.train.torch.TorchConfig().backend_cls):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: PreflightTorchConfig) -> None:
        error = check_env(worker_group.execute(collect_env), backend_config.version, backend_config.gpu)
        if error is not None:
            ray.get(backend_config.coordinator.report_end.remote(EXIT_USER, error, True))
            raise UserError(error)
        super().on_start(worker_group, backend_config)
