"""What a pretraining run would need of storage, feed, memory and time, worked out from the shard sets' indexes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from physio_dist import storage
from physio_dist.config import PretrainConfig
from physio_dist.data.format.index import SAMPLE_TABLE, ShardSet
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.data.loading.mixture import open_sets, order_of
from physio_dist.data.loading.order import LANES, Mixture, node_slice, rank_slice
from physio_dist.errors import UserError
from physio_dist.models.encoders.criss_cross import (
    CHECKPOINTED,
    PATCH,
    EncoderConfig,
    MaskedModel,
    count_parameters,
    preset,
)
from physio_dist.planning import scaling_model
from physio_dist.planning.traffic import Traffic, node_traffic
from physio_dist.runtime.arrays import Int64Array
from physio_dist.runtime.distributed import split_share
from physio_dist.training.throughput import PEAKS

# Epochs that are played through, fewer where they are long; later ones are like the last of them.
_PLAYED = (2, 12)
_PLAYED_SAMPLES = 2**28
_GB = 1e9


@dataclass(frozen=True)
class Cluster:
    """The machines of a plan.

    Attributes:
        nodes, gpus: how many nodes, and GPUs in each.
        gpu: name of the GPU, a key of ``meters.PEAKS``.
        gpu_gb: its memory.
        samples_per_s: of all GPUs together; None to take it from ``scaling.py``, which assumes a share of their peak.
    """

    nodes: int
    gpus: int
    gpu: str = "H100"
    gpu_gb: float = 80.0
    samples_per_s: float | None = None

    @property
    def world(self) -> int:
        """Ranks, one a GPU."""
        return self.nodes * self.gpus


def plan(options: PretrainConfig, cluster: Cluster) -> dict[str, Any]:
    """Everything that ``physio-dist plan`` tells.

    Raises:
        UserError: no such shard set, more ranks than samples in a batch, an unknown GPU.
        DataError: a damaged index or sample table.
    """
    if min(cluster.nodes, cluster.gpus) < 1:
        raise UserError("--nodes and --gpus-per-node must be at least 1")
    if cluster.gpu not in PEAKS:
        raise UserError(f"--gpu {cluster.gpu}: its peak is not known; known are {', '.join(PEAKS)}")
    batch = options.train.global_batch
    rank_slice(batch, 0, cluster.world)
    sources = options.data.index
    sets = open_sets([source.url for source in sources], options.data.signal)
    info = sets[0].signals[options.data.signal]
    signal = len(info.channels), info.samples
    tables = [read_sample_table(one) for one in sets]
    order = order_of(sets, tables, [source.weight for source in sources], "train", batch, options.run.seed)
    rate = cluster.samples_per_s
    alone = on_paper(options, cluster, signal)
    if rate is None:
        rate = batch / (alone.passes + alone.exchange)
    told: dict[str, Any] = {
        "nodes": cluster.nodes, "gpus_per_node": cluster.gpus, "world": cluster.world,
        "global_batch": batch, "steps": options.train.steps, "samples": [one.total for one in order.sets],
        "epochs": options.train.steps * batch / sum(one.total for one in order.sets),
        "samples_per_s": rate, "samples_per_s_assumed": cluster.samples_per_s is None,
        "step_s": batch / rate, "hours": options.train.steps * batch / rate / 3600,
        "feed": feed(options, cluster, order, sets, signal, rate),
        "memory": memory(options, cluster, signal),
    }  # fmt: skip
    return {**told, "warnings": list(_warnings(options, cluster, told, sets, signal, alone))}


def on_paper(options: PretrainConfig, cluster: Cluster, signal: tuple[int, int]) -> scaling_model.Step:
    """A step as ``scaling.py`` has it; feed and checkpoints are looked at apart."""
    load = scaling_model.Load(
        options.model.preset, options.train.global_batch, options.train.micro_batch, options.zero.stage,
        options.train.save_every, signal[0], signal[1] // PATCH,
    )  # fmt: skip
    machines = scaling_model.Machines(cluster.gpus, scaling_model.SHARE_OF_PEAK * PEAKS[cluster.gpu])
    return scaling_model.step(load, cluster.world, machines)


def feed(
    options: PretrainConfig, cluster: Cluster, order: Mixture, sets: list[ShardSet], signal: tuple[int, int],
    rate: float,
) -> dict[str, Any]:  # fmt: skip
    """What the nodes fetch, and how fast."""
    sizes: list[Int64Array] = [np.array([shard.filesize for shard in one.shards], dtype=np.int64) for one in sets]
    epoch = order.sets[0].steps_per_epoch
    fewest, most = _PLAYED
    played = min(max(_PLAYED_SAMPLES // max(order.sets[0].total, 1), fewest), most)
    steps = min(options.train.steps, played * epoch)
    sample = 2 * signal[0] * signal[1]
    nodes: list[Traffic] = []
    for node in range(cluster.nodes):
        slots = node_slice(order.batch, node * cluster.gpus, (node + 1) * cluster.gpus, cluster.world)
        nodes.append(node_traffic(order, sizes, sample, slots, options.data.cache_gb * _GB, steps))
    by_epoch = [sum(one.epochs[e] for one in nodes) for e in range(len(nodes[0].epochs))]
    whole = by_epoch if steps % epoch == 0 or len(by_epoch) == 1 else by_epoch[:-1]
    tables = sum(storage.size(storage.join(one.url, SAMPLE_TABLE)) for one in sets)
    once = sum(int(size[one.counts > 0].sum()) for size, one in zip(sizes, order.sets, strict=True))
    # No node fetches more than all, unless its cache is too small to keep it.
    later = max(options.train.steps - steps, 0) / epoch * whole[-1]
    if options.data.cache_gb * _GB >= sum(int(size.sum()) for size in sizes):
        later = min(later, cluster.nodes * once - sum(by_epoch))
    epoch_s = epoch * order.batch / rate
    pieces = np.concatenate([-(-size // storage.PIECE) for size in sizes])
    requests = sum(one.shards for one in nodes) * float(pieces.mean()) + sum(one.singles for one in nodes)
    return {
        "shards": sum(len(one.shards) for one in sets), "bytes_of_shards": once,
        "node_bytes_first_epoch": _spread([one.epochs[0] for one in nodes]),
        "node_bytes_later_epoch": whole[-1] / cluster.nodes if len(whole) > 1 else None,
        # How often the run's nodes together fetch what they need of the set, in the epoch that fetches most.
        "amplification": max(whole) / (once * min(1.0, steps / epoch)),
        "run_bytes": round(sum(by_epoch) + later), "sample_table_bytes": tables * cluster.nodes,
        "cache_needed_gb": max(one.cache_needed for one in nodes) / _GB, "cache_gb": options.data.cache_gb,
        "singles": sum(one.singles for one in nodes), "local": all(storage.is_local(one.data_url) for one in sets),
        "storage_bytes_per_s": max(whole) / min(epoch_s, steps * order.batch / rate),
        "storage_requests_per_s": requests / (steps * order.batch / rate),
        "rank_bytes_per_s": rate * sample / cluster.world,
    }  # fmt: skip


def _spread(values: list[int]) -> dict[str, float]:
    return {"least": min(values), "mean": sum(values) / len(values), "most": max(values)}


def memory(options: PretrainConfig, cluster: Cluster, signal: tuple[int, int]) -> dict[str, Any]:
    """Bytes on each GPU by ZeRO stage, in GB, at the run's micro batch.

    Weights, gradients and the two moments of AdamW are fp32 at every precision; stages 1 and 2 hold another fp32 copy
    of the weights they are in charge of.
    """
    encoder = preset(options.model.preset, options.model.dropout)
    count, world = 4 * count_parameters(encoder), cluster.world
    micro, passes = split_share(options.train.global_batch, world, options.train.micro_batch)
    activations = micro * saved_bytes(options, encoder, signal)
    moments = 2 * count
    stages = {
        "0": count + count + moments,
        "1": count + count + (count + moments) / world,
        "2": count + (2 * count + moments) / world,
        "3": (2 * count + count + moments) / world,
    }
    return {
        "micro_batch": micro, "passes": passes, "parameters": count // 4, "activations_gb": activations / _GB,
        "by_stage_gb": {stage: (state + activations) / _GB for stage, state in stages.items()},
        "gpu_gb": cluster.gpu_gb, "stage": options.zero.stage, "checkpoint_gb": (count + moments) / _GB,
    }  # fmt: skip


def saved_bytes(options: PretrainConfig, encoder: EncoderConfig, signal: tuple[int, int]) -> int:
    """Bytes that one window's forward pass keeps for the backward pass, counted by running it once on the CPU.

    With activation checkpointing that is what lies between layers, and one layer's own.
    """
    one, two = (_kept(replace(encoder, layers=n), signal, options.train.precision) for n in (1, 2))
    between = 4 * encoder.d * signal[0] * (signal[1] // PATCH)
    return one + (encoder.layers - 1) * (between if options.model.preset in CHECKPOINTED else two - one)


def _kept(encoder: EncoderConfig, signal: tuple[int, int], precision: str) -> int:
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage_ = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            seen[storage_.data_ptr()] = storage_.nbytes()
        return tensor

    model = MaskedModel(encoder)
    x = torch.zeros(1, signal[0], signal[1] // PATCH, PATCH)
    weights = sum(4 * p.numel() for p in model.parameters())
    low = precision != "fp32"
    kind = torch.bfloat16 if precision == "bf16" else torch.float16
    with torch.autograd.graph.saved_tensors_hooks(note, lambda kept: kept), torch.autocast("cpu", kind, enabled=low):
        model(x, torch.zeros(x.shape[:3], dtype=torch.bool)).float().sum()
    # Autocast keeps the weights it has cast, once for all windows.
    return max(sum(seen.values()) - (weights // 2 if low else 0), 0)


def _warnings(
    options: PretrainConfig, cluster: Cluster, told: dict[str, Any], sets: list[ShardSet], signal: tuple[int, int],
    alone: scaling_model.Step,
) -> Iterator[str]:  # fmt: skip
    fed, room = told["feed"], told["memory"]
    batch, world = options.train.global_batch, cluster.world
    if not fed["local"] and fed["cache_needed_gb"] > options.data.cache_gb:
        yield (
            f"cache: up to {fed['cache_needed_gb']:.1f} GB of shards are in use on a node at the same time, more than "
            f"data.cache_gb={options.data.cache_gb:g} holds: {fed['singles']} samples would be read one by one, or "
            "shards fetched again; raise data.cache_gb or use more nodes"
        )
    if (wanted := fed["rank_bytes_per_s"]) > scaling_model.FEED_RATE:
        yield (
            f"feed: {told['samples_per_s'] / world:,.0f} samples/s a GPU are {_bytes(wanted)}/s; a rank's feed was "
            f"measured at {_bytes(scaling_model.FEED_RATE)}/s"
        )
    if not fed["local"] and (wanted := fed["storage_bytes_per_s"] / world) > scaling_model.FETCH_RATE:
        yield (
            f"storage: {_bytes(wanted)}/s for each rank while an epoch is fetched; a rank was measured to fetch "
            f"{_bytes(scaling_model.FETCH_RATE)}/s, so that epoch waits for storage"
        )
    if not fed["local"] and fed["amplification"] > 1.5:
        yield (
            f"shards: each is fetched {fed['amplification']:.1f} times in an epoch, because nodes share lanes or lanes "
            f"share shards; a number of nodes that divides {min(batch, LANES)}, or smaller shards, make it less"
        )
    if told["samples_per_s_assumed"] and alone.launches > alone.arithmetic:
        yield (
            f"speed: a GPU is busier with starting operations ({alone.launches * 1e3:.1f} ms a step) than with what "
            f"they do ({alone.arithmetic * 1e3:.1f} ms): more windows a pass (train.micro_batch, train.global_batch) "
            "or fewer GPUs; measure it and give --samples-per-s"
        )
    if (needed := room["by_stage_gb"][str(options.zero.stage)]) > 0.9 * cluster.gpu_gb:
        yield (
            f"memory: about {needed:.1f} GB at train.micro_batch={room['micro_batch']} and "
            f"zero.stage={options.zero.stage}, a GPU has {cluster.gpu_gb:g} GB; lower train.micro_batch"
        )
    if waste := -(-batch // world) * world / batch - 1:
        yield (
            f"batch: {batch} samples on {world} ranks are {-(-batch // world)} on the widest and {batch // world} on "
            f"the narrowest: {waste:.0%} more time than with a multiple of {world}"
        )
    if told["epochs"] < 1:
        yield f"steps: the run ends after {told['epochs']:.2f} epochs and never sees all of the data"
    if signal[1] % PATCH or sets[0].rate != PATCH:
        yield f"data: {signal[1]} samples at {sets[0].rate:g} Hz are not whole patches of one second at {PATCH} Hz"


def tell(told: dict[str, Any]) -> Iterator[str]:
    """The plan, line by line."""
    fed, room = told["feed"], told["memory"]
    share = f"{scaling_model.SHARE_OF_PEAK:.0%} of the peak"
    assumed = f" (on paper, with at most {share}; --samples-per-s tells)" * told["samples_per_s_assumed"]
    yield (
        f"{told['nodes']} nodes x {told['gpus_per_node']} GPUs = {told['world']} ranks, global batch "
        f"{told['global_batch']}"
    )
    yield f"  speed       {told['samples_per_s']:,.0f} samples/s{assumed}, {told['step_s'] * 1e3:.1f} ms a step"
    yield (
        f"  time        {_time(told['hours'])} for {told['steps']:,} steps, {told['epochs']:.1f} epochs of "
        f"{sum(told['samples']):,} samples"
    )
    if fed["local"]:
        yield f"  data        {_bytes(fed['bytes_of_shards'])} in {fed['shards']} shards, read where they lie"
    else:
        first, later = fed["node_bytes_first_epoch"], fed["node_bytes_later_epoch"]
        yield (
            f"  fetched     {_bytes(first['mean'])} a node in the first epoch ({_bytes(first['least'])} to "
            f"{_bytes(first['most'])})" + (f", {_bytes(later)} in later ones" if later is not None else "")
            + f"; {_bytes(fed['run_bytes'])} in the whole run"
        )  # fmt: skip
        whole = _bytes(fed["bytes_of_shards"])
        yield f"  amplified   {fed['amplification']:.3f} x the {whole} of {fed['shards']} shards"
        yield (
            f"  cache       {fed['cache_needed_gb']:.1f} GB a node fetch each shard once an epoch; "
            f"data.cache_gb={fed['cache_gb']:g}"
        )
        yield (
            f"  storage     {_bytes(fed['storage_bytes_per_s'])}/s and {fed['storage_requests_per_s']:,.1f} requests/s "
            "for all nodes, while an epoch is fetched"
        )
    yield f"  feed        {_bytes(fed['rank_bytes_per_s'])}/s to each GPU"
    stages = ", ".join(f"{stage}: {gb:.2f}" for stage, gb in room["by_stage_gb"].items())
    yield (
        f"  memory      GB a GPU by ZeRO stage: {stages} (of {room['gpu_gb']:g}), {room['activations_gb']:.2f} of them "
        f"for the activations of {room['micro_batch']} windows; {room['passes']} pass(es) a step"
    )
    yield f"  checkpoint  {room['checkpoint_gb']:.2f} GB, {room['parameters'] / 1e6:.1f} M parameters"
    for warning in told["warnings"]:
        yield f"warning: {warning}"
    if not told["warnings"]:
        yield "all of it holds"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"
        count /= 1000
    raise AssertionError


def _time(hours: float) -> str:
    if not math.isfinite(hours):
        return "for ever"
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes"
