"""Where ranks are placed on a Ray cluster, and what is done when some are lost: the options under ``cluster``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from physio_dist.config.loader import between, one_of
from physio_dist.errors import UserError

# For what a driver waits.
LONGEST_S = 1e6


@dataclass
class ClusterOptions:
    """Where ``launch.py`` places the ranks; ``pretrain.py`` takes no notice of it."""

    # Ranks: a number, or [min, max] for as many as the cluster has room for.
    workers: Any = 1
    # With [min, max]: seconds between two looks whether there is room for more.
    resize_s: float = 60.0
    # Restarts after a lost worker before the run is given up.
    max_failures: int = 3
    # Restarts after a node that was announced to go; -1 for any number, because nothing is wrong with the run.
    max_preemptions: int = -1
    # Of each rank; a GPU for each where the cluster has GPUs, unless told otherwise (auto, true, false).
    cpus_per_worker: float = 1.0
    gpu: str = "auto"
    # Seconds to wait for nodes that an autoscaler may bring, where the cluster is too small at first.
    placement_timeout_s: float = 0.0


def check_cluster(cluster: ClusterOptions) -> None:
    """Refuse values with which no rank could be placed.

    Raises:
        UserError: names the option.
    """
    workers(cluster)
    if cluster.max_failures < 0:
        raise UserError(f"cluster.max_failures={cluster.max_failures}: it must not be negative")
    if cluster.max_preemptions < -1:
        raise UserError(f"cluster.max_preemptions={cluster.max_preemptions}: it must be at least 0, or -1 for no limit")
    for name in ("cpus_per_worker", "resize_s"):
        if not 0 < getattr(cluster, name) < math.inf:
            raise UserError(f"cluster.{name}={getattr(cluster, name):g}: it must be a positive number")
    between("cluster.placement_timeout_s", cluster.placement_timeout_s, 0.0, LONGEST_S)
    gpu(cluster)


def gpu(cluster: ClusterOptions) -> str:
    """``cluster.gpu`` as ``auto``, ``true`` or ``false``; of a truth in a YAML file Python's word arrives.

    Raises:
        UserError: it is none of them.
    """
    given = cluster.gpu.lower() if cluster.gpu in ("True", "False") else cluster.gpu
    one_of("cluster.gpu", given, ("auto", "true", "false"))
    return given


def workers(cluster: ClusterOptions) -> tuple[int, int]:
    """``cluster.workers`` as (least, most).

    Raises:
        UserError: neither a positive number nor ``[min, max]``.
    """
    given = cluster.workers
    pair = given if isinstance(given, list) else [given, given]
    whole = len(pair) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    if not whole or not 1 <= pair[0] <= pair[1]:
        raise UserError(f"cluster.workers={given}: it must be a number of ranks, or [min, max]")
    return pair[0], pair[1]
