"""What the system tests share: a simulated shard set and undisturbed runs to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.clusters import ray_nodes as ray_nodes
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
    folder = tmp_path_factory.mktemp("undisturbed")
    made: dict[tuple[str, ...], Run] = {}

    def get(*options: str) -> Run:
        if options not in made:
            run = Run(folder, f"run-{len(made)}", simulated, options)
            assert run() == 0, run.said()
            made[options] = run
        return made[options]

    return get


@pytest.fixture()
def new_run(simulated: str, tmp_path: Path) -> Callable[..., Run]:
    """A run in a folder of its own; whatever of it still lives at the end is a failure."""
    runs: list[Run] = []

    def make(*options: str, name: str = "run") -> Run:
        runs.append(Run(tmp_path, name, simulated, options))
        return runs[-1]

    return make
