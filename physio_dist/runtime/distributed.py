"""Position of a process among the ranks, and its share of a batch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch

from physio_dist.errors import UserError


@dataclass(frozen=True)
class DistInfo:
    """Position of this process among the ranks."""

    rank: int
    world: int
    local_rank: int
    local_world: int

    @property
    def node(self) -> tuple[int, int]:
        """The ranks of this node, half-open; launchers number a node's ranks one after the other."""
        first = self.rank - self.local_rank
        return first, first + self.local_world


@dataclass(frozen=True)
class BatchShare:
    """This rank's share of every step.

    Attributes:
        rank, world: of this process.
        micro: windows a forward pass.
        micro_steps: forward passes a step.
        flops: of one window's forward pass.
    """

    rank: int
    world: int
    micro: int
    micro_steps: int
    flops: int


def init_dist_env() -> DistInfo:
    """Make the environment of a rank complete: a process started by plain ``python`` is a world of one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(alone, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    world = int(os.environ["WORLD_SIZE"])
    # torchrun and the DeepSpeed launcher name it differently.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world)
    return DistInfo(int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", 0)), local)


def choose_accelerator() -> None:
    """Tell DeepSpeed, before it is imported, what this process computes on."""
    if not torch.cuda.is_available():
        # Without this DeepSpeed probes for accelerators of every vendor.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("DS_LOG_LEVEL", "error")


def check_precision(precision: str) -> None:
    """Refuse what this process's device cannot compute, or only by emulation.

    Raises:
        UserError: names the device and what it can do.
    """
    if precision == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(False):
        raise UserError(
            f"train.precision=bf16: {torch.cuda.get_device_name()} has no bf16 arithmetic; take fp16 or fp32"
        )


def split_share(global_batch: int, world: int, most: int) -> tuple[int, int]:
    """Windows a forward pass and forward passes a step, for the widest share of a rank."""
    share = -(-global_batch // world)
    passes = -(-share // most)
    return -(-share // passes), passes
