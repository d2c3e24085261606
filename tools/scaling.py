"""Prints the tables of docs/scaling.md and draws its figure: ``python tools/scaling.py [--figure FILE.png]``.

``--gloo`` measures what the check against two ranks on CPUs needs: an all-reduce over this machine's loopback.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as processes

from physio_dist.planning import scaling_model
from physio_dist.planning.scaling_model import Load, Machines, Step, step

WORLDS = tuple(2**n for n in range(11))
# Of a node, bytes/s: eight ports of 400 Gbit/s, one of 100 Gbit/s, one of 25 Gbit/s; a collective reaches 80% of it.
NETWORKS = {"3.2 Tbit/s": 320e9, "100 Gbit/s": 10e9, "25 Gbit/s": 2.5e9}
# What one rank of base in bf16 made on one core of the machine of docs/benchmarks.md, windows/s, 32 a step, and two
# ranks beside it by ZeRO stage.
ONE_RANK, WINDOWS = 49.0, 32
TWO_RANKS = {0: 1.97, 1: 1.82}
# An all-reduce of 20 MB between two processes by gloo on that machine while others used it, as --gloo prints it.
GLOO = 0.47e9


def grown(preset: str, windows: int, **more: float) -> list[Load]:
    """A load for each of ``WORLDS``, with so many windows a rank."""
    load = Load(preset, windows, windows)
    return [replace(load, global_batch=windows * world, **more) for world in WORLDS]


def fixed(preset: str, batch: int, **more: float) -> list[Load]:
    """A load for each of ``WORLDS`` that can share the batch."""
    return [Load(preset, batch, batch, **more) for world in WORLDS if world <= batch]  # type: ignore[arg-type]


def steps(loads: Sequence[Load], machines: Machines) -> list[Step]:
    """Predicted steps, one load per world size."""
    return [step(load, world, machines) for load, world in zip(loads, WORLDS, strict=False)]


def efficiency(predictions: Sequence[Step]) -> list[float]:
    """Windows/s per rank of each world size, relative to one rank."""
    return [item.rate / world / predictions[0].rate for item, world in zip(predictions, WORLDS, strict=False)]


def first(predictions: Sequence[Step], limit: str) -> int | None:
    """Smallest world size whose bottleneck is ``limit``."""
    return next((world for item, world in zip(predictions, WORLDS, strict=False) if item.limit == limit), None)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def by_world(loads: Sequence[Load], machines: Machines) -> str:
    """Parts of a step's duration for some world sizes."""
    predictions = steps(loads, machines)
    rows = []
    for load, item, share, world in zip(loads, predictions, efficiency(predictions), WORLDS, strict=False):
        if world in (1, 8, 16, 64, 256, 1024):
            parts = (item.passes, item.exchange, max(item.feed.values()), item.checkpoint)
            milliseconds = [f"{1e3 * part:.2f}" for part in parts]
            rows.append(
                [world, f"{load.global_batch:,}", *milliseconds, f"{item.rate:,.0f}", f"{share:.0%}", item.limit]
            )
    heads = ["GPUs", "batch", "passes, ms", "exchange", "feed", "checkpoint", "windows/s", "ideal", "limit"]
    return table(heads, rows)


def takeovers() -> str:
    """Bottlenecks and efficiency by encoder and network."""
    rows = []
    for preset, windows in (("base", 256), ("base", 1024), ("large", 256), ("xl", 64)):
        for name, between in NETWORKS.items():
            machines = Machines(between=between)
            predictions = steps(grown(preset, windows), machines)
            share = efficiency(predictions)
            rows.append([
                preset, windows, name, predictions[0].limit, first(predictions, "exchange") or "-",
                f"{share[3]:.0%}", f"{share[-1]:.0%}",
            ])  # fmt: skip
    heads = ["preset", "windows a GPU", "network of a node", "limit of one GPU", "exchange from", "ideal, 8", "1,024"]
    return table(heads, rows)


def exchanged() -> str:
    """Megabytes that a rank sends in a step by stage, and size of a checkpoint."""
    rows = []
    for preset in ("tiny", "base", "large", "xl"):
        load = Load(preset)
        sent = [scaling_model.exchange_bytes(replace(load, stage=stage), 1024, 2) / 1e6 for stage in range(4)]
        rows.append([
            preset, f"{load.parameters / 1e6:.1f}", f"{load.window_flops / 1e9:.2f}", *(f"{mb:,.1f}" for mb in sent),
            f"{scaling_model.checkpoint_bytes(load) / 1e6:,.0f}",
            f"{scaling_model.windows_to_saturate(load, Machines()):,}",
        ])  # fmt: skip
    heads = ["preset", "M parameters", "GFLOP", "stage 0, MB", "1", "2", "3", "checkpoint, MB", "windows to fill a GPU"]
    return table(heads, rows)


def check(gloo: float) -> str:
    """Two ranks of one core each, measured and predicted."""
    rows = []
    for stage, measured in TWO_RANKS.items():
        load = Load("base", 2 * WINDOWS, WINDOWS, stage, save_every=10**9)
        cores = Machines(flops=ONE_RANK * load.window_flops, operation_s=0.0, inside=gloo, hop_s=1e-4)
        predicted = step(load, 2, cores).rate / ONE_RANK
        rows.append([stage, f"{predicted:.2f}", f"{measured:.2f}", f"{predicted / measured:.2f}"])
    return table(["ZeRO stage", "two ranks to one, model", "measured", "predicted : measured"], rows)


def tables(gloo: float = GLOO) -> list[str]:
    """All tables of docs/scaling.md, in its order."""
    ordinary = Machines(between=NETWORKS["100 Gbit/s"])
    kinds = grown("base", 1024), grown("base", 1024, fetched=1.0), fixed("base", 4096), grown("xl", 64)
    return [exchanged(), takeovers(), *(by_world(loads, ordinary) for loads in kinds), check(gloo)]


def figure(path: Path) -> None:
    """Windows/s over GPUs by network, for a batch that grows with the ranks and for one that does not."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(1, 3, figsize=(13, 4.2), constrained_layout=True)
    plots = (
        ("base, 1,024 windows a GPU", grown("base", 1024)), ("xl, 64 windows a GPU", grown("xl", 64)),
        ("base, 4,096 windows a batch", fixed("base", 4096)),
    )  # fmt: skip
    for axis, (title, loads) in zip(axes, plots, strict=True):
        worlds = WORLDS[: len(loads)]
        alone = step(loads[0], 1, Machines()).rate
        axis.plot(worlds, [alone * world for world in worlds], color="0.6", linestyle=":", label="ideal")
        for name, between in NETWORKS.items():
            predictions = steps(loads, Machines(between=between))
            axis.plot(worlds, [item.rate for item in predictions], marker="o", markersize=3, label=f"{name} a node")
        fresh = steps([replace(load, fetched=1.0) for load in loads], Machines())
        axis.plot(worlds, [item.rate for item in fresh], color="0.2", linestyle="--", label="all of it from S3")
        axis.set(xscale="log", yscale="log", title=title, xlabel="GPUs", ylabel="windows/s")
        axis.set_xticks([1, 8, 64, 1024], ["1", "8", "64", "1,024"])
        axis.grid(alpha=0.3)
    axes[0].legend()
    drawn.savefig(path, dpi=110)


def _reduce(rank: int, port: int, count: int, times: list[float]) -> None:
    import torch

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    gradient = torch.ones(count)
    for _ in range(12):
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(gradient)
        times.append(time.perf_counter() - began)
    dist.destroy_process_group()


def measure_gloo(count: int) -> float:
    """Bus bandwidth in bytes/s of an all-reduce of so many fp32 numbers between two processes of this machine."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with processes.Manager() as manager:
        times = manager.list()
        processes.spawn(_reduce, (port, count, times), nprocs=2)
        # With two ranks the bus carries what each rank has. The fastest, because others may use the machine.
        return 4 * count / min(times)


def main() -> int:
    """Parse, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--figure", type=Path, help="PNG to draw")
    parser.add_argument("--gloo", action="store_true", help="measure an all-reduce here and check with it")
    options = parser.parse_args()
    gloo = GLOO
    if options.gloo:
        gloo = measure_gloo(Load("base").parameters)
        print(f"gloo over loopback: {gloo / 1e9:.2f} GB/s\n")
    print(*tables(gloo), sep="\n\n")
    if options.figure:
        figure(options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
