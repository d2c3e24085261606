"""Throughput of two ranks on one core each, relative to one rank on one core: ``python tools/bench/ranks.py``.

docs/benchmarks.md says what is measured and how. The table and, as the last line, one JSON object go to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import BenchError, finish, free_port, interleave, last_line, say, table

from physio_dist.models.encoders.criss_cross import PRESETS
from physio_dist.runtime import processes

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
PEER = "one rank"
# Steps before the measured ones: caches fill, the allocator settles.
WARM_UP = 2


def make_set(folder: Path) -> Path:
    """Simulated windows to train on."""
    words = [BIN / "physio-dist", "shard", "simulate", "people=64,windows=8,seed=0", "--out", folder / "set"]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode != 0:
        raise BenchError(f"no data to train on:\n{done.stderr}")
    return folder / "set"


def rate(options: argparse.Namespace, data: Path, folder: Path, name: str, cores: list[int]) -> float:
    """Windows/s of one run with a rank a core, started by the DeepSpeed launcher: the median of its steps."""
    run = folder / name
    words = [
        BIN / "deepspeed", "--num_gpus", len(cores), "--master_port", free_port(), ROOT / "physio_dist" / "pretrain.py",
        "--config", ROOT / "configs" / "pretrain" / "quickstart.yaml", f"run.dir={folder}", f"run.name={name}",
        f"data.index={data}", f"model.preset={options.preset}", f"train.precision={options.precision}",
        f"train.micro_batch={options.windows}", f"train.global_batch={options.windows * len(cores)}",
        f"train.steps={options.steps + WARM_UP}", "train.warmup_steps=1", "train.threads=1", "train.log_every=1",
        "train.val_every=100000", "train.save_every=100000", f"zero.stage={options.stage}",
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in words], capture_output=True, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    if done.returncode != 0:
        raise BenchError(f"the run with {len(cores)} rank(s) ended with {done.returncode}:\n{done.stderr[-2000:]}")
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    return statistics.median(float(step["samples_per_s"]) for step in steps)


def run(options: argparse.Namespace) -> str:
    """All measures; prints the table.

    Returns:
        The last line.
    """
    cores = sorted(os.sched_getaffinity(0))[: options.ranks]
    if len(cores) < options.ranks:
        raise BenchError(f"{options.ranks} ranks of one core each need as many cores; there are {len(cores)}")
    with tempfile.TemporaryDirectory(prefix="physio-dist-bench-") as temporary:
        folder = Path(temporary)
        say("simulates windows")
        data, count = make_set(folder), iter(range(10_000))

        def measure(rank_cores: list[int]) -> float:
            return rate(options, data, folder, f"run-{next(count)}", rank_cores)

        ours = f"{options.ranks} ranks"
        rates = interleave(options.repeats, {ours: lambda: measure(cores), PEER: lambda: measure(cores[:1])})
    title = (
        f"Training of {options.preset} in {options.precision}, ZeRO stage {options.stage}, {options.windows} windows a "
        "rank and step, one core a rank"
    )
    print(table(title, "windows/s", rates))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return last_line("ranks", "windows/s", options.repeats, medians[ours], {PEER: medians[PEER]}, {})


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--preset", default="base", choices=sorted(PRESETS))
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--stage", type=int, default=1, help="of ZeRO")
    parser.add_argument("--ranks", type=int, default=processes.cores(), help="beside one; all cores")
    parser.add_argument("--windows", type=int, default=32, help="of a rank and step")
    parser.add_argument("--steps", type=int, default=10, help="of a run")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if min(options.windows, options.steps, options.repeats) < 1 or options.ranks < 2:
        parser.error("--windows, --steps and --repeats must be at least 1, --ranks at least 2")
    return finish(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
