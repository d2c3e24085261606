"""Resource planner: storage traffic, data rate, memory and time of a pretraining run, from the shard sets' indexes."""

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

# Least and largest number of epochs that are simulated; later ones are like the last of them.
_SIMULATED_EPOCHS = (2, 12)
_SIMULATED_SAMPLES = 2**28
_GB = 1e9


@dataclass(frozen=True)
class Cluster:
    """Hardware of a plan.

    Attributes:
        nodes, gpus: number of nodes, and of GPUs in each.
        gpu: name of the GPU, a key of `throughput.PEAKS`.
        gpu_gb: its memory in GB.
        samples_per_s: measured throughput of all GPUs together; None to take that of `scaling_model`.
    """

    nodes: int
    gpus: int
    gpu: str = "H100"
    gpu_gb: float = 80.0
    samples_per_s: float | None = None

    @property
    def world(self) -> int:
        """Number of ranks, one per GPU."""
        return self.nodes * self.gpus


def plan(options: PretrainConfig, cluster: Cluster) -> dict[str, Any]:
    """Everything that ``physio-dist plan`` reports, as JSON values.

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
    window = len(info.channels), info.samples
    tables = [read_sample_table(shard_set) for shard_set in sets]
    order = order_of(sets, tables, [source.weight for source in sources], "train", batch, options.run.seed)
    rate = cluster.samples_per_s
    modelled = modelled_step(options, cluster, window)
    if rate is None:
        rate = batch / (modelled.passes + modelled.exchange)
    samples = [part.total for part in order.sets]
    report: dict[str, Any] = {
        "nodes": cluster.nodes, "gpus_per_node": cluster.gpus, "world": cluster.world,
        "global_batch": batch, "steps": options.train.steps, "samples": samples,
        "epochs": options.train.steps * batch / sum(samples),
        "samples_per_s": rate, "samples_per_s_assumed": cluster.samples_per_s is None,
        "step_s": batch / rate, "hours": options.train.steps * batch / rate / 3600,
        "feed": feed(options, cluster, order, sets, rate),
        "memory": memory(options, cluster, window),
    }  # fmt: skip
    return {**report, "warnings": list(_warnings(options, cluster, report, sets, modelled))}


def modelled_step(options: PretrainConfig, cluster: Cluster, window: tuple[int, int]) -> scaling_model.Step:
    """Duration of a step by `scaling_model`; data and checkpoints are planned separately."""
    load = scaling_model.Load(
        options.model.preset, options.train.global_batch, options.train.micro_batch, options.zero.stage,
        options.train.save_every, window[0], window[1] // PATCH,
    )  # fmt: skip
    machines = scaling_model.Machines(cluster.gpus, scaling_model.SHARE_OF_PEAK * PEAKS[cluster.gpu])
    return scaling_model.step(load, cluster.world, machines)


def feed(
    options: PretrainConfig, cluster: Cluster, order: Mixture, sets: list[ShardSet], rate: float
) -> dict[str, Any]:
    """Bytes that the nodes fetch, and the rates of it at ``rate`` samples per second."""
    info = sets[0].signals[options.data.signal]
    sample_bytes = 2 * len(info.channels) * info.samples
    sizes: list[Int64Array] = [
        np.array([shard.filesize for shard in shard_set.shards], dtype=np.int64) for shard_set in sets
    ]
    epoch = order.sets[0].steps_per_epoch
    fewest, most = _SIMULATED_EPOCHS
    simulated_epochs = min(max(_SIMULATED_SAMPLES // max(order.sets[0].total, 1), fewest), most)
    steps = min(options.train.steps, simulated_epochs * epoch)
    nodes: list[Traffic] = []
    for node in range(cluster.nodes):
        slots = node_slice(order.batch, node * cluster.gpus, (node + 1) * cluster.gpus, cluster.world)
        nodes.append(node_traffic(order, sizes, sample_bytes, slots, options.data.cache_gb * _GB, steps))
    by_epoch = [sum(node.epochs[e] for node in nodes) for e in range(len(nodes[0].epochs))]
    complete = by_epoch if steps % epoch == 0 or len(by_epoch) == 1 else by_epoch[:-1]
    table_bytes = sum(storage.size(storage.join(shard_set.url, SAMPLE_TABLE)) for shard_set in sets)
    used_bytes = sum(int(size[part.counts > 0].sum()) for size, part in zip(sizes, order.sets, strict=True))
    # No node fetches more than everything once, unless its cache is too small to keep it.
    later = max(options.train.steps - steps, 0) / epoch * complete[-1]
    if options.data.cache_gb * _GB >= sum(int(size.sum()) for size in sizes):
        later = min(later, cluster.nodes * used_bytes - sum(by_epoch))
    epoch_s = epoch * order.batch / rate
    pieces = np.concatenate([-(-size // storage.PIECE) for size in sizes])
    requests = sum(node.shards for node in nodes) * float(pieces.mean()) + sum(node.singles for node in nodes)
    return {
        "shards": sum(len(shard_set.shards) for shard_set in sets), "bytes_of_shards": used_bytes,
        "node_bytes_first_epoch": _spread([node.epochs[0] for node in nodes]),
        "node_bytes_later_epoch": complete[-1] / cluster.nodes if len(complete) > 1 else None,
        # How often all nodes together fetch the shards they need, in the epoch that fetches most.
        "amplification": max(complete) / (used_bytes * min(1.0, steps / epoch)),
        "run_bytes": round(sum(by_epoch) + later), "sample_table_bytes": table_bytes * cluster.nodes,
        "cache_needed_gb": max(node.cache_needed for node in nodes) / _GB, "cache_gb": options.data.cache_gb,
        "singles": sum(node.singles for node in nodes),
        "local": all(storage.is_local(shard_set.data_url) for shard_set in sets),
        "storage_bytes_per_s": max(complete) / min(epoch_s, steps * order.batch / rate),
        "storage_requests_per_s": requests / (steps * order.batch / rate),
        "rank_bytes_per_s": rate * sample_bytes / cluster.world,
    }  # fmt: skip


def _spread(values: list[int]) -> dict[str, float]:
    return {"least": min(values), "mean": sum(values) / len(values), "most": max(values)}


def memory(options: PretrainConfig, cluster: Cluster, window: tuple[int, int]) -> dict[str, Any]:
    """Memory of each GPU in GB by ZeRO stage, at the run's micro batch; ``window`` is (channels, samples).

    Weights, gradients and the two moments of AdamW are fp32 at every precision; stages 1 and 2 hold another fp32 copy
    of their partition of the weights.
    """
    encoder = preset(options.model.preset, options.model.dropout)
    count, world = 4 * count_parameters(encoder), cluster.world
    micro, passes = split_share(options.train.global_batch, world, options.train.micro_batch)
    activations = micro * saved_bytes(options, encoder, window)
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


def saved_bytes(options: PretrainConfig, encoder: EncoderConfig, window: tuple[int, int]) -> int:
    """Bytes that one window's forward pass saves for the backward pass, measured on the CPU.

    With activation checkpointing these are the inputs of all layers, and the tensors within one layer.
    """
    one_layer, two_layers = (
        _saved_bytes(replace(encoder, layers=n), window, options.train.precision) for n in (1, 2)
    )  # fmt: skip
    layer_input = 4 * encoder.d * window[0] * (window[1] // PATCH)
    per_layer = layer_input if options.model.preset in CHECKPOINTED else two_layers - one_layer
    return one_layer + (encoder.layers - 1) * per_layer


def _saved_bytes(encoder: EncoderConfig, window: tuple[int, int], precision: str) -> int:
    sizes: dict[int, int] = {}

    def record(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if not isinstance(tensor, torch.nn.Parameter):
            sizes[memory.data_ptr()] = memory.nbytes()
        return tensor

    model = MaskedModel(encoder)
    x = torch.zeros(1, window[0], window[1] // PATCH, PATCH)
    weights = sum(4 * p.numel() for p in model.parameters())
    low = precision != "fp32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float16
    with (
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
        torch.autocast("cpu", dtype, enabled=low),
    ):
        model(x, torch.zeros(x.shape[:3], dtype=torch.bool)).float().sum()
    # Autocast keeps the weights it has cast, once for all windows.
    return max(sum(sizes.values()) - (weights // 2 if low else 0), 0)


def _data_warnings(options: PretrainConfig, cluster: Cluster, report: dict[str, Any]) -> Iterator[str]:
    data = report["feed"]
    if not data["local"] and data["cache_needed_gb"] > options.data.cache_gb:
        yield (
            f"cache: up to {data['cache_needed_gb']:.1f} GB of shards are in use on a node at the same time, more than "
            f"data.cache_gb={options.data.cache_gb:g} holds: {data['singles']} samples would be read one by one, or "
            "shards fetched again; raise data.cache_gb or use more nodes"
        )
    if (needed := data["rank_bytes_per_s"]) > scaling_model.FEED_RATE:
        yield (
            f"feed: {report['samples_per_s'] / cluster.world:,.0f} samples/s a GPU are {_bytes(needed)}/s; a rank's "
            f"feed was measured at {_bytes(scaling_model.FEED_RATE)}/s"
        )
    if not data["local"] and (needed := data["storage_bytes_per_s"] / cluster.world) > scaling_model.FETCH_RATE:
        yield (
            f"storage: {_bytes(needed)}/s for each rank while an epoch is fetched; a rank was measured to fetch "
            f"{_bytes(scaling_model.FETCH_RATE)}/s, so that epoch waits for storage"
        )
    if not data["local"] and data["amplification"] > 1.5:
        yield (
            f"shards: each is fetched {data['amplification']:.1f} times in an epoch, because nodes share lanes or "
            f"lanes share shards; a number of nodes that divides {min(options.train.global_batch, LANES)}, or smaller "
            "shards, make it less"
        )


def _warnings(
    options: PretrainConfig, cluster: Cluster, report: dict[str, Any], sets: list[ShardSet],
    modelled: scaling_model.Step,
) -> Iterator[str]:  # fmt: skip
    yield from _data_warnings(options, cluster, report)
    mem = report["memory"]
    batch, world = options.train.global_batch, cluster.world
    if report["samples_per_s_assumed"] and modelled.launches > modelled.arithmetic:
        yield (
            f"speed: a GPU is busier with starting operations ({modelled.launches * 1e3:.1f} ms a step) than with what "
            f"they do ({modelled.arithmetic * 1e3:.1f} ms): more windows a pass (train.micro_batch, "
            "train.global_batch) or fewer GPUs; measure it and give --samples-per-s"
        )
    if (needed := mem["by_stage_gb"][str(options.zero.stage)]) > 0.9 * cluster.gpu_gb:
        yield (
            f"memory: about {needed:.1f} GB at train.micro_batch={mem['micro_batch']} and "
            f"zero.stage={options.zero.stage}, a GPU has {cluster.gpu_gb:g} GB; lower train.micro_batch"
        )
    if waste := -(-batch // world) * world / batch - 1:
        yield (
            f"batch: {batch} samples on {world} ranks are {-(-batch // world)} on the widest and {batch // world} on "
            f"the narrowest: {waste:.0%} more time than with a multiple of {world}"
        )
    if report["epochs"] < 1:
        yield f"steps: the run ends after {report['epochs']:.2f} epochs and never sees all of the data"
    samples = sets[0].signals[options.data.signal].samples
    if samples % PATCH or sets[0].rate != PATCH:
        yield f"data: {samples} samples at {sets[0].rate:g} Hz are not whole patches of one second at {PATCH} Hz"


def format_plan(report: dict[str, Any]) -> Iterator[str]:
    """Format the result of `plan` as lines of text."""
    data, mem = report["feed"], report["memory"]
    share = f"{scaling_model.SHARE_OF_PEAK:.0%} of the peak"
    assumed = f" (on paper, with at most {share}; --samples-per-s tells)" * report["samples_per_s_assumed"]
    yield (
        f"{report['nodes']} nodes x {report['gpus_per_node']} GPUs = {report['world']} ranks, global batch "
        f"{report['global_batch']}"
    )
    yield f"  speed       {report['samples_per_s']:,.0f} samples/s{assumed}, {report['step_s'] * 1e3:.1f} ms a step"
    yield (
        f"  time        {_time(report['hours'])} for {report['steps']:,} steps, {report['epochs']:.1f} epochs of "
        f"{sum(report['samples']):,} samples"
    )
    if data["local"]:
        yield f"  data        {_bytes(data['bytes_of_shards'])} in {data['shards']} shards, read where they lie"
    else:
        first, later = data["node_bytes_first_epoch"], data["node_bytes_later_epoch"]
        yield (
            f"  fetched     {_bytes(first['mean'])} a node in the first epoch ({_bytes(first['least'])} to "
            f"{_bytes(first['most'])})" + (f", {_bytes(later)} in later ones" if later is not None else "")
            + f"; {_bytes(data['run_bytes'])} in the whole run"
        )  # fmt: skip
        total = _bytes(data["bytes_of_shards"])
        yield f"  amplified   {data['amplification']:.3f} x the {total} of {data['shards']} shards"
        yield (
            f"  cache       {data['cache_needed_gb']:.1f} GB a node fetch each shard once an epoch; "
            f"data.cache_gb={data['cache_gb']:g}"
        )
        yield (
            f"  storage     {_bytes(data['storage_bytes_per_s'])}/s and {data['storage_requests_per_s']:,.1f} "
            "requests/s for all nodes, while an epoch is fetched"
        )
    yield f"  feed        {_bytes(data['rank_bytes_per_s'])}/s to each GPU"
    stages = ", ".join(f"{stage}: {gb:.2f}" for stage, gb in mem["by_stage_gb"].items())
    yield (
        f"  memory      GB a GPU by ZeRO stage: {stages} (of {mem['gpu_gb']:g}), {mem['activations_gb']:.2f} of them "
        f"for the activations of {mem['micro_batch']} windows; {mem['passes']} pass(es) a step"
    )
    yield f"  checkpoint  {mem['checkpoint_gb']:.2f} GB, {mem['parameters'] / 1e6:.1f} M parameters"
    for warning in report["warnings"]:
        yield f"warning: {warning}"
    if not report["warnings"]:
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
