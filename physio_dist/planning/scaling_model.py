"""A step on paper: what arithmetic, exchange, feed and checkpoints take of it, up to a thousand GPUs. Pure functions.

docs/scaling.md says where each number comes from. None of it has been held against several GPUs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from physio_dist.models.encoders.criss_cross import PATCH, count_flops, count_parameters, preset
from physio_dist.runtime.distributed import split_share
from physio_dist.training.throughput import PEAKS, training_flops

# What a rank's feed was measured to deliver, in bytes a second: out of the page cache where pages are small, and out of
# an S3 server that shared its two cores (docs/benchmarks.md).
FEED_RATE = 4.8e9
FETCH_RATE = 9.0e8
# Share of a GPU's peak that an encoder of this kind reaches where its batch is large enough; an assumption.
SHARE_OF_PEAK = 0.4
# Operations of a forward and a backward pass as torch's dispatcher counts them: 1,607 with tiny's 4 layers, 4,495 with
# base's 12.
_OPERATIONS, _OPERATIONS_A_LAYER = 163, 361
_FP32 = 4


@dataclass(frozen=True)
class Machines:
    """What a cluster is made of; bytes and FLOPs a second.

    Attributes:
        gpus: of a node.
        flops: that a GPU does of this model.
        operation_s: the least that an operation takes, however small.
        inside, between: bus bandwidth of a collective within a node, and of one that crosses nodes.
        hop_s: latency of a collective, for each doubling of the ranks.
        feed: of a rank, out of the page cache.
        disk: of a node's cache, read by all its ranks.
        fetch: of a rank, from the object store.
        net: of a node, from the object store.
        store: of the object store, to all nodes.
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
    """What is trained, by the names that the options have.

    Attributes:
        channels, patches: of a window.
        fetched: share of the bytes that come from the object store: 1 in a first epoch, 0 once the nodes hold all.
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
        """Of the encoder."""
        return count_parameters(preset(self.preset))

    @property
    def window_flops(self) -> int:
        """Forward and backward."""
        return training_flops(count_flops(preset(self.preset), self.channels, self.patches))

    @property
    def window_bytes(self) -> int:
        """As it is stored, int16."""
        return 2 * self.channels * self.patches * PATCH


@dataclass(frozen=True)
class Step:
    """Seconds of a step.

    Attributes:
        arithmetic: of the widest rank.
        launches: starting its operations, which hides the arithmetic or is hidden by it.
        exchange: of gradients and weights; after the passes, not beside them.
        feed: by place; beside all of it.
        checkpoint: the loop's waiting, spread over the steps between two of them.
        windows: of the global batch.
    """

    arithmetic: float
    launches: float
    exchange: float
    feed: dict[str, float]
    checkpoint: float
    windows: int

    @property
    def passes(self) -> float:
        """Forward and backward."""
        return max(self.arithmetic, self.launches)

    @property
    def total(self) -> float:
        """From one step to the next."""
        return max(self.passes + self.exchange, *self.feed.values()) + self.checkpoint

    @property
    def rate(self) -> float:
        """Windows a second."""
        return self.windows / self.total

    @property
    def limit(self) -> str:
        """What takes most of it: arithmetic, launches, exchange, checkpoint, or the feed's place."""
        place = max(self.feed, key=lambda name: self.feed[name])
        if self.feed[place] > self.passes + self.exchange:
            own = {place: self.feed[place]}
        else:
            own = {"launches" if self.launches > self.arithmetic else "arithmetic": self.passes}
            own["exchange"] = self.exchange
        own["checkpoint"] = self.checkpoint
        return max(own, key=lambda name: own[name])


def step(load: Load, world: int, machines: Machines) -> Step:
    """A step on ``world`` ranks, one a GPU.

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
        # The widest node's ranks, all of them.
        "disk": min(world, machines.gpus) * widest / machines.disk,
        "fetching": load.fetched * max(widest / machines.fetch, min(world, machines.gpus) * widest / machines.net),
        "object store": load.fetched * batch_bytes / machines.store,
    }
    paced = max(max(arithmetic, launches) + exchange, *feed.values())
    return Step(arithmetic, launches, exchange, feed, checkpoint_s(load, world, paced, machines), load.global_batch)


def exchange_bytes(load: Load, world: int, passes: int) -> float:
    """Bytes that each rank sends in a step.

    Gradients and weights are fp32 at every precision. Stage 0 all-reduces gradients once a step; stages 1 and 2 do too
    (DeepSpeed shares them out only then) and gather the weights, stage 2 with the gradients of every pass; stage 3
    gathers the weights for both directions of every pass, and scatters the gradients.
    """
    ring = (world - 1) / world * _FP32 * load.parameters
    return ring * {0: 2.0, 1: 3.0, 2: 2.0 * passes + 1.0, 3: 3.0 * passes}[load.stage]


def exchange_s(load: Load, world: int, passes: int, machines: Machines) -> float:
    """Seconds of that: bytes over the bus bandwidth, and a latency for each doubling of the ranks and each collective.

    The norm's and the step's small all-reduce are counted as one more collective. Stage 3 gathers layer by layer.
    """
    if world == 1:
        return 0.0
    layers = preset(load.preset).layers
    collectives = {0: 1, 1: 2, 2: passes + 1, 3: 3 * passes * layers}[load.stage] + 1
    width = machines.inside if world <= machines.gpus else min(machines.inside, machines.between)
    return exchange_bytes(load, world, passes) / width + collectives * 2 * math.log2(world) * machines.hop_s


def checkpoint_bytes(load: Load) -> int:
    """Weights and two moments, fp32."""
    return 3 * _FP32 * load.parameters


def checkpoint_s(load: Load, world: int, step_s: float, machines: Machines) -> float:
    """Seconds a step that checkpoints hold the loop up: the copy, and what the one before is not through with.

    Tensors are gathered one by one where the stage shares them out, copied, and sent by the first rank behind the loop.
    """
    size = checkpoint_bytes(load)
    gathered = size / (machines.inside if world <= machines.gpus else min(machines.inside, machines.between))
    held = size / machines.copy + (gathered if load.stage and world > 1 else 0.0)
    late = max(size / machines.put - load.save_every * step_s, 0.0)
    return (held + late) / load.save_every


def share_to_fill(load: Load, machines: Machines) -> int:
    """Windows a pass from which on a GPU computes rather than starts operations."""
    layers = preset(load.preset).layers
    launches = (_OPERATIONS + _OPERATIONS_A_LAYER * layers) * machines.operation_s
    return math.ceil(launches * machines.flops / load.window_flops)
