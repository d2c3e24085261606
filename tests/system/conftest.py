"""Fixtures of the system tests: a simulated shard set and undisturbed runs to compare with."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.clusters import ray_nodes as ray_nodes
from tests.system.clusters import ray_run as ray_run
from tests.system.clusters import with_node as with_node
from tests.system.hosts import network as network
from tests.system.launching import Run, physio


@pytest.fixture(scope="session")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A simulated shard set of several shards."""
    out = tmp_path_factory.mktemp("shards") / "sim"
    done = physio("shard", "simulate", "people=30,windows=6,seed=3", "--out", str(out), "samples_per_shard=40")
    assert done.returncode == 0, done.stderr
    return str(out)


@pytest.fixture(scope="session")
def undisturbed(simulated: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Runs that nothing disturbed, made once for each set of options."""
    made: dict[frozenset[str], Run] = {}

    def get(*options: str) -> Run:
        # What the configuration says anyway makes no other run.
        given = frozenset(options) - {"zero.stage=1", "train.precision=fp32"}
        if given not in made:
            run = Run(tmp_path_factory.mktemp("undisturbed"), "run", simulated, tuple(sorted(given)))
            assert run() == 0, run.said()
            made[given] = run
        return made[given]

    return get


@pytest.fixture()
def new_run(simulated: str, tmp_path: Path) -> Callable[..., Run]:
    """A run in a folder of its own; whatever of it still lives at the end is a failure."""
    runs: list[Run] = []

    def make(*options: str, name: str = "run") -> Run:
        runs.append(Run(tmp_path, name, simulated, options))
        return runs[-1]

    return make


@pytest.fixture(scope="session")
def real_words(data_dir: Path) -> list[str]:
    """A conversion of real recordings in 30 parts and three shards."""
    folder = data_dir / "cinc2011-set-a"
    words = ["unusable=keep", f"labels={folder / 'labels.csv'}", "samples_per_shard=400"]
    return ["shard", "wfdb", str(folder), *words]


@pytest.fixture(scope="session")
def real(
    real_words: list[str], tmp_path_factory: pytest.TempPathFactory,
    cli: Callable[..., subprocess.CompletedProcess[str]],
) -> Path:  # fmt: skip
    """The set that nothing disturbed, made on this machine alone."""
    out = tmp_path_factory.mktemp("real") / "set"
    done = cli(*real_words, "--out", out, "workers=2")
    assert done.returncode == 0, done.stderr
    first, people, speed, index = done.stdout.splitlines()
    assert first.startswith("941 windows of 941 people from 941 records in 3 shards")
    assert "SIMULATED" not in first
    assert people.startswith("  each record counts as a person")
    assert re.fullmatch(r"  \d+\.\d records/s", speed)
    assert index == f"{out}/index.json"
    return out
