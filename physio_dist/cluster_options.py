"""Where ranks are placed on a Ray cluster, and what is done when some are lost: the options under ``cluster``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from physio_dist.errors import UserError
from physio_dist.options import one_of


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
    wait_s: float = 0.0


def check_cluster(cluster: ClusterOptions) -> None:
    """Refuse values with which no rank could be placed.

    Raises:
        UserError: names the option.
    """
    workers(cluster)
    if cluster.max_failures < 0 or not cluster.cpus_per_worker > 0 or cluster.wait_s < 0:
        raise UserError(
            "cluster.max_failures and cluster.wait_s must not be negative, cluster.cpus_per_worker has to be positive"
        )
    if cluster.max_preemptions < -1:
        raise UserError(f"cluster.max_preemptions={cluster.max_preemptions}: it must be at least 0, or -1 for no limit")
    if not cluster.resize_s > 0:
        raise UserError(f"cluster.resize_s={cluster.resize_s:g}: it must be above 0")
    one_of("cluster.gpu", cluster.gpu, ("auto", "true", "false"))


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
