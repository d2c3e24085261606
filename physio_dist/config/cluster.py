"""Options under ``cluster``: where ranks are placed on a Ray cluster, and what follows the loss of some."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from physio_dist.config.options import POSITIVE, Range, inside, option
from physio_dist.errors import UserError

# Longest time that a driver waits for nodes, in seconds.
MAX_WAIT_S = 1e6


@dataclass(frozen=True)
class WorkerRange:
    """Number of ranks of a run.

    Attributes:
        min: fewest ranks with which the run starts.
        max: most ranks; above ``min``, the run grows while the cluster has room.
    """

    min: int
    max: int


def _parse_workers(name: str, value: Any) -> WorkerRange:
    pair = value if isinstance(value, list) else [value, value]
    integers = len(pair) == 2 and all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
    if not integers or not 1 <= pair[0] <= pair[1]:
        raise UserError(f"{name}={value}: it must be a number of ranks, or [min, max]")
    return WorkerRange(pair[0], pair[1])


def _plain_workers(workers: WorkerRange) -> int | list[int]:
    return workers.min if workers.min == workers.max else [workers.min, workers.max]


def _parse_gpu(name: str, value: Any) -> bool | None:
    words = {"auto": None, "true": True, "false": False}
    # YAML reads true, on and yes as a truth value, and quoted words as text.
    word = str(value).lower() if isinstance(value, bool) else value
    if word not in words:
        raise UserError(f"{name}={value}: it must be one of {', '.join(words)}")
    return words[word]


def _plain_gpu(gpu: bool | None) -> bool | str:
    return "auto" if gpu is None else gpu


@dataclass
class ClusterOptions:
    """Placement of ranks by ``launch.py``; ``pretrain.py`` ignores it."""

    workers: WorkerRange = option(
        WorkerRange(1, 1), "Number of ranks, or `[min, max]` for as many as the cluster has room for.",
        parse=_parse_workers, plain=_plain_workers,
    )  # fmt: skip
    resize_s: float = option(
        60.0, "With `[min, max]` workers: seconds between two checks for room for more ranks.", POSITIVE
    )
    max_failures: int = option(
        3, "Restarts after a lost worker before the run is given up.", Range(0, math.inf, "it must not be negative")
    )
    max_preemptions: int = option(
        -1, "Restarts after a node was announced to go; -1 for any number.",
        Range(-1, math.inf, "it must be at least 0, or -1 for no limit"),
    )  # fmt: skip
    cpus_per_worker: float = option(1.0, "CPUs reserved for each rank.", POSITIVE)
    gpu: bool | None = option(
        None, "`true` or `false`: whether each rank gets a GPU; `auto`: if the cluster has any.",
        parse=_parse_gpu, plain=_plain_gpu,
    )  # fmt: skip
    placement_timeout_s: float = option(
        0.0, "Seconds to wait for nodes that an autoscaler may add to a cluster that is too small at first.",
        inside(0.0, MAX_WAIT_S),
    )  # fmt: skip
