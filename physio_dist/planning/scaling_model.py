"""Scaling model: predicted duration of a step up to a thousand GPUs, from arithmetic, communication, data, checkpoints.

The sources of all constants are in docs/scaling.md. The model has not been validated on several GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from physio_dist.models.encoders.criss_cross import PATCH, count_flops, count_parameters, preset
from physio_dist.runtime.distributed import split_share
from physio_dist.training.throughput import PEAKS, training_flops

# Measured data rates of a rank in bytes per second: from the page cache (small pages), and from an S3 server on the
# same two cores (docs/benchmarks.md).
FEED_RATE = 4.8e9
FETCH_RATE = 9.0e8
# Model FLOPs utilization with a large enough batch; an assumption.
SHARE_OF_PEAK = 0.4
# Operations of a forward and a backward pass as torch's dispatcher counts them: 1,607 with tiny's 4 layers, 4,495 with
# base's 12.
_OPERATIONS, _OPERATIONS_A_LAYER = 163, 361
_FP32 = 4


@dataclass(frozen=True)
class Machines:
    """Hardware of a cluster; rates in bytes and FLOPs per second.

    Attributes:
        gpus: number per node.
        flops: achieved by a GPU with this model.
        operation_s: least duration of an operation in seconds.
        inside, between: bus bandwidth of a collective within a node, and of one across nodes.
        hop_s: latency of a collective in seconds, for each doubling of the ranks.
        feed: of a rank, from the page cache.
        disk: of a node's disk cache, shared by its ranks.
        fetch: of a rank, from the object store.
        net: of a node, from the object store.
        store: of the object store, in total.
        copy: of a rank's memory, device to host.
        put: of the first rank, to the object store.
    """

    gpus: int = 8
    flops: float = SHARE_OF_PEAK * PEAKS["H200"]
    operation_s: float = 2.5e-6
    inside: float = 360e9
    between: float = 320e9
    hop_s: float = 15e-6
    feed: float = FEED_RATE
    disk: float = 20e9
    fetch: float = FETCH_RATE
    net: float = 12.5e9
    store: float = 23e9
    copy: float = 10e9
    put: float = 2.5e8


@dataclass(frozen=True)
class Load:
    """Workload; names as of the options.

    Attributes:
        channels, patches: of a window.
        fetched: fraction of the bytes that come from the object store: 1 in a first epoch, 0 once the nodes cache
            everything.
    """

    preset: str = "base"
    global_batch: int = 256
    micro_batch: int = 256
    stage: int = 1
    save_every: int = 1000
    channels: int = 12
    patches: int = 10
    fetched: float = 0.0

    @property
    def parameters(self) -> int:
        """Number of parameters of the encoder."""
        return count_parameters(preset(self.preset))

    @property
    def window_flops(self) -> int:
        """FLOPs of a window's forward and backward pass."""
        return training_flops(count_flops(preset(self.preset), self.channels, self.patches))

    @property
    def window_bytes(self) -> int:
        """Bytes of a window as stored, int16."""
        return 2 * self.channels * self.patches * PATCH


@dataclass(frozen=True)
class Step:
    """Duration of a step, in seconds.

    Attributes:
        arithmetic: of the widest rank.
        launches: of launching its operations, concurrent with the arithmetic.
        exchange: of gradients and weights, after the passes.
        feed: of reading data by source, concurrent with everything else.
        checkpoint: time the loop is blocked, averaged over the steps between two checkpoints.
        windows: in the global batch.
    """

    arithmetic: float
    launches: float
    exchange: float
    feed: dict[str, float]
    checkpoint: float
    windows: int

    @property
    def passes(self) -> float:
        """Duration of the forward and backward passes."""
        return max(self.arithmetic, self.launches)

    @property
    def total(self) -> float:
        """Duration of the whole step."""
        return max(self.passes + self.exchange, *self.feed.values()) + self.checkpoint

    @property
    def rate(self) -> float:
        """Windows per second."""
        return self.windows / self.total

    @property
    def limit(self) -> str:
        """The bottleneck: arithmetic, launches, exchange, checkpoint, or a data source."""
        source = max(self.feed, key=lambda name: self.feed[name])
        if self.feed[source] > self.passes + self.exchange:
            parts = {source: self.feed[source]}
        else:
            parts = {"launches" if self.launches > self.arithmetic else "arithmetic": self.passes}
            parts["exchange"] = self.exchange
        parts["checkpoint"] = self.checkpoint
        return max(parts, key=lambda name: parts[name])


def step(load: Load, world: int, machines: Machines) -> Step:
    """Predict a step on ``world`` ranks, one per GPU.

    Raises:
        ValueError: more ranks than windows in a batch.
    """
    if world > load.global_batch:
        raise ValueError(f"{world} ranks cannot share a batch of {load.global_batch}")
    micro, passes = split_share(load.global_batch, world, load.micro_batch)
    layers = preset(load.preset).layers
    launches = passes * (_OPERATIONS + _OPERATIONS_A_LAYER * layers) * machines.operation_s
    arithmetic = passes * micro * load.window_flops / machines.flops
    exchange = exchange_s(load, world, passes, machines)
    batch_bytes = load.global_batch * load.window_bytes
    widest = micro * passes * load.window_bytes
    feed = {
        "feed": widest / machines.feed,
        # All ranks of the largest node.
        "disk": min(world, machines.gpus) * widest / machines.disk,
        "fetching": load.fetched * max(widest / machines.fetch, min(world, machines.gpus) * widest / machines.net),
        "object store": load.fetched * batch_bytes / machines.store,
    }
    step_s = max(max(arithmetic, launches) + exchange, *feed.values())
    return Step(arithmetic, launches, exchange, feed, checkpoint_s(load, world, step_s, machines), load.global_batch)


def exchange_bytes(load: Load, world: int, passes: int) -> float:
    """Bytes that each rank sends in a step.

    Gradients and weights are fp32 at every precision. Stage 0 all-reduces gradients once per step; stage 1 too, and
    gathers the weights; stage 2 reduces the gradients of every pass; stage 3 gathers the weights for both directions of
    every pass, and scatters the gradients.
    """
    ring = (world - 1) / world * _FP32 * load.parameters
    return ring * {0: 2.0, 1: 3.0, 2: 2.0 * passes + 1.0, 3: 3.0 * passes}[load.stage]


def exchange_s(load: Load, world: int, passes: int, machines: Machines) -> float:
    """Seconds of communication: bytes over the bus bandwidth, plus a latency of each collective.

    The latency grows with each doubling of the ranks. The small all-reduces of norm and summary count as one more
    collective. Stage 3 gathers layer by layer.
    """
    if world == 1:
        return 0.0
    layers = preset(load.preset).layers
    collectives = {0: 1, 1: 2, 2: passes + 1, 3: 3 * passes * layers}[load.stage] + 1
    width = machines.inside if world <= machines.gpus else min(machines.inside, machines.between)
    return exchange_bytes(load, world, passes) / width + collectives * 2 * math.log2(world) * machines.hop_s


def checkpoint_bytes(load: Load) -> int:
    """Bytes of weights and two moments, fp32."""
    return 3 * _FP32 * load.parameters


def checkpoint_s(load: Load, world: int, step_s: float, machines: Machines) -> float:
    """Seconds per step that checkpoints block the loop: copying, and waiting for the previous upload.

    Tensors that the stage partitions are gathered one by one, copied, and uploaded by the first rank in the background.
    """
    size = checkpoint_bytes(load)
    gathered = size / (machines.inside if world <= machines.gpus else min(machines.inside, machines.between))
    copying = size / machines.copy + (gathered if load.stage and world > 1 else 0.0)
    waiting = max(size / machines.put - load.save_every * step_s, 0.0)
    return (copying + waiting) / load.save_every


def windows_to_saturate(load: Load, machines: Machines) -> int:
    """Windows per pass from which on arithmetic takes longer than launching operations."""
    layers = preset(load.preset).layers
    launches = (_OPERATIONS + _OPERATIONS_A_LAYER * layers) * machines.operation_s
    return math.ceil(launches * machines.flops / load.window_flops)
