"""How many trials a minute a sweep makes beside one that computes features in each: ``python tools/bench/sweep.py``.

docs/benchmarks.md says what is measured and how. The table and, as the last line, one JSON object go to stdout.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from common import BenchError, finish, interleave, last_line, rounded, say, table

from physio_dist.config import TuneConfig
from physio_dist.config import loader as configuration
from physio_dist.data.format.index import open_set
from physio_dist.data.handle import open_handle
from physio_dist.evaluation import study
from physio_dist.evaluation.backbones import open_backbone
from physio_dist.evaluation.features import embed, open_features
from physio_dist.evaluation.label_table import LabelTable
from physio_dist.evaluation.search_space import sample_configs
from physio_dist.evaluation.splits import folds_of
from physio_dist.evaluation.trials import MODALITIES, SEARCHED, EncoderRole, InputKey, Study, reductions_of, train
from physio_dist.models.encoders.criss_cross import PRESETS, CrissCrossEncoder, preset
from physio_dist.models.export import save_encoder
from physio_dist.models.fusion.pooling import pool

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CONFIG = str(ROOT / "configs" / "tune" / "eegmat.yaml")
PEER = "features in each trial"
SIGNALS = ("ecg", "eeg")
# Of the study whose features are weighed: as many features a modality, so many people.
_FEATURES, _PEOPLE = 1024, 24


def command(words: Sequence[object]) -> float:
    """Seconds that a command of ours takes, as a whole process."""
    began = time.perf_counter()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        raise BenchError(f"{words[0]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - began


def make_encoder(folder: Path, data: str, signal: str, name: str) -> str:
    """An export of random weights: what an encoder has learnt makes it neither slower nor faster."""
    shards, out = open_set(data), folder / signal
    torch.manual_seed(0)
    about: dict[str, Any] = {
        "signal": signal, "rate": shards.rate, "unit_uv": 100.0, "channels": list(shards.signals[signal].channels),
        "simulated": shards.simulated, "sources": [],
    }  # fmt: skip
    out.mkdir()
    for file, content in save_encoder(CrissCrossEncoder(preset(name)), about).items():
        (out / file).write_bytes(content)
    return str(out)


class Sweeps:
    """Sweeps of one data set with one pair of encoders, all features in one place.

    Args:
        given: the command line.
        folder: for everything.
    """

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self._folder, self._number = folder, itertools.count()
        # A trial is one configuration on one row.
        self._configurations: int = -(-given.trials // len(SEARCHED))
        data = given.data
        if not data:
            say("simulates people")
            data = str(folder / "set")
            words = ["simulate", f"people={given.people},trials=6,windows=4,seed=0", "--out", data, "signals=ecg,eeg"]
            command([BIN / "physio-dist", "shard", *words])
        self._encoders = {signal: make_encoder(folder, data, signal, given.preset) for signal in SIGNALS}
        self._features = str(folder / "features")
        words = [
            f"tune.data={data}", f"tune.task={given.task}", f"tune.label={given.label}", f"run.dir={folder / 'runs'}",
            *(f"tune.encoders.{signal}={url}" for signal, url in self._encoders.items()),
            f"tune.folds={given.folds}", "tune.protocol=grouped_kfold", f"tune.feature_cache={self._features}",
            f"tune.trials={self._configurations}", f"tune.scheduler={given.scheduler}",
        ]  # fmt: skip
        self._words = words
        self._options = configuration.load(TuneConfig, CONFIG, [*words, "run.name=peer"])
        say("computes features once")
        handle = open_handle(self._options.tune.data, self._options.data)
        self.study = study.prepare(self._options, handle, self._features, lambda text: None)

    def ours(self) -> float:
        """Trials a minute of the whole command: Ray's start, all folds and the table at the end included."""
        words = [*self._words, f"run.name=run-{next(self._number)}"]
        seconds = command([sys.executable, "-m", "physio_dist.tune", "--config", CONFIG, *words])
        return 60 * self._configurations * len(SEARCHED) / seconds

    def peer(self) -> float:
        """Trials a minute where each computes the features that its row needs, on all cores, and nothing else."""
        row, config = "fused", sample_configs(self._options)[next(self._number) % self._configurations]
        began = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=self._folder) as features:
            inputs = {}
            handle = open_handle(self._options.tune.data, self._options.data)
            for signal in MODALITIES[row]:
                backbone, where = open_backbone(self._encoders[signal], signal), f"{features}/{signal}"
                embed(backbone, handle, where, lambda text: None)
                found = open_features(where)
                pooled = pool(found.values, found.valid, config["pooling"]).numpy()
                key = InputKey(signal, backbone.sha256, config["pooling"])
                inputs[key] = pooled[self.study.table.sample]
            reductions = reductions_of(inputs, self.study.encoders, self.study.folds, config["components"])
            for _ in train(replace(self.study, inputs=inputs, reductions=reductions), row, config):
                pass
        return 60 / (time.perf_counter() - began)


def synthetic(given: argparse.Namespace, gigabytes: float) -> Study:
    """A study whose pooled features take so much memory."""
    windows = int(gigabytes * 1e9 / (4 * _FEATURES * len(SIGNALS))) // _PEOPLE * _PEOPLE
    rng = np.random.default_rng(0)
    person = np.repeat(np.arange(_PEOPLE, dtype=np.uint64), windows // _PEOPLE)
    numbers = np.arange(windows, dtype=np.int64)
    those = LabelTable([], numbers, person, numbers, numbers % 2, ("a", "b"), np.zeros(windows, np.uint8), True)
    made = configuration.load(
        TuneConfig, CONFIG,
        ["tune.data=none", "tune.encoders.ecg=none", "tune.encoders.eeg=none", "tune.max_epochs=2"])  # fmt: skip
    folds = tuple(folds_of(those, "grouped_kfold", 2, 2, 0))
    roles = [EncoderRole(signal, pretrained) for signal in SIGNALS for pretrained in (True, False)]
    encoders: dict[EncoderRole, tuple[str, ...]] = dict.fromkeys(roles, ("x", "x"))
    inputs = {InputKey(s, "x", "mean"): rng.standard_normal((windows, _FEATURES), dtype=np.float32) for s in SIGNALS}
    return Study(made, those, folds, encoders, inputs, {}, reductions_of(inputs, encoders, folds, 32))


def private_bytes(given: argparse.Namespace, gigabytes: float) -> float:
    """Most private memory of an actor while it trains one configuration on that much of features."""
    config = {
        "pooling": "mean", "components": 32, "depth": 1, "width": 64, "dropout": 0.2, "label_smoothing": 0.0,
        "lr": 1e-3, "weight_decay": 1e-2,
    }  # fmt: skip

    class Worker:
        def most(self, of_all: Study) -> float:
            process, seen = psutil.Process(), []
            for _ in train(of_all, "fused", config):
                seen.append(process.memory_full_info().uss)
            return float(max(seen))

    made = synthetic(given, gigabytes)
    actor = ray.remote(num_cpus=1)(Worker).remote()
    most: float = ray.get(actor.most.remote(ray.put(made)))
    ray.kill(actor)
    return most


def memory(given: argparse.Namespace) -> dict[str, float]:
    """What so many gigabytes of features add to a worker's private memory, beside a hundredth of them."""
    say(f"weighs a trial on {given.gigabytes:g} GB of features")
    # Ray wants some 80 MB at least.
    room = int(2e8 + given.gigabytes * 1.5e9)
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools' / 'bench'}"}
    ray.init("local", num_cpus=1, object_store_memory=room, log_to_driver=False, runtime_env={"env_vars": env})
    small, whole = (private_bytes(given, share * given.gigabytes) for share in (0.01, 1.0))
    ray.shutdown()
    return {"features_gb": given.gigabytes, "added_gb": round((whole - small) / 1e9, 3)}


def run(given: argparse.Namespace) -> str:
    """All measures; prints the table.

    Returns:
        The last line.
    """
    weighed = memory(given) if given.gigabytes else {}
    with tempfile.TemporaryDirectory(prefix="physio-dist-bench-") as folder:
        sweeps = Sweeps(given, Path(folder))
        found = interleave(given.repeats, {"ours": sweeps.ours, PEER: sweeps.peer})
        windows = len(sweeps.study.table.label)
    trials = -(-given.trials // len(SEARCHED)) * len(SEARCHED)
    title = f"{trials} trials on {windows} windows, {given.folds} folds, {given.preset} encoders"
    print(table(title, "trials/min", found))
    medians = {name: statistics.median(values) for name, values in found.items()}
    also: dict[str, object] = {
        "trials": trials, "windows": windows, "seconds_of_a_sweep": rounded(60 * trials / medians["ours"]), **weighed
    }  # fmt: skip
    return last_line("sweep", "trials/min", given.repeats, medians["ours"], {PEER: medians[PEER]}, also)


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--data", default="", help="a paired shard set; simulated people otherwise")
    parser.add_argument("--task", default="labels")
    parser.add_argument("--label", default="arousal")
    parser.add_argument("--people", type=int, default=36, help="to simulate, 24 windows each")
    parser.add_argument("--folds", type=int, default=12)
    parser.add_argument("--preset", default="tiny", choices=sorted(PRESETS), help="of the encoders")
    parser.add_argument("--trials", type=int, default=200, help="of a sweep: configurations times rows")
    parser.add_argument("--scheduler", default="fifo", choices=("fifo", "asha"))
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of features to weigh a trial on; 0: none")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    if min(given.people, given.trials, given.repeats) < 1 or given.folds < 2 or given.gigabytes < 0:
        parser.error("--people, --trials, --repeats must be at least 1, --folds at least 2, --gigabytes not negative")
    return finish(lambda: run(given))


if __name__ == "__main__":
    sys.exit(main())
