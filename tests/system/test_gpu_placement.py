"""Placement of ranks on nodes that declare GPUs. There are none: CUDA itself is not tested here."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.clusters import Cluster, RayRun
from tests.system.launching import CONFIG, end_session, wait_until

pytestmark = pytest.mark.xdist_group("ray")

PLACE = Path(__file__).with_name("place_ranks.py")


@pytest.fixture(scope="module")
def gpu_nodes() -> Iterator[Cluster]:
    """Two nodes of two GPUs each."""
    cluster = Cluster({}, cpus=2, gpus=2, addresses=True)
    try:
        cluster.add_node()
        yield cluster
    finally:
        cluster.end()


class Placed:
    """Ranks that are held where they were placed."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str) -> None:
        self.folder, self.log = folder, folder / "log.txt"
        where = (f"run.dir={folder}", "run.name=held", f"data.index={folder}", f"data.cache_dir={folder}")
        words = [sys.executable, str(PLACE), "--config", CONFIG, *where, *options]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                words, env={**os.environ, "TMPDIR": str(folder), **cluster.env}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def facts(self, ranks: int) -> list[dict[str, Any]]:
        """Notes of the ranks, in order."""

        def there() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return len(list(self.folder.glob("rank-*.json"))) == ranks

        wait_until(there, "the ranks", 240)
        return [json.loads((self.folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]

    def end(self) -> int:
        """Let them go; the driver's exit status."""
        (self.folder / "go").touch()
        return self.process.wait(timeout=120)


@contextlib.contextmanager
def placed(cluster: Cluster, folder: Path, *options: str) -> Iterator[Placed]:
    ranks = Placed(cluster, folder, *options)
    try:
        yield ranks
    finally:
        end_session(ranks.process)


def test_each_rank_gets_one_gpu_and_further_runs_are_refused(gpu_nodes: Cluster, tmp_path: Path) -> None:
    with placed(gpu_nodes, tmp_path, "cluster.workers=4") as ranks:
        facts = ranks.facts(4)
        # Those of a node come one after the other, which is what a node's cache goes by.
        assert [fact["local_rank"] for fact in facts] == [0, 1, 0, 1]
        assert facts[0]["node"] == facts[1]["node"] != facts[2]["node"] == facts[3]["node"]
        # Each sees those of its node, and takes the one of its local rank.
        assert [sorted(fact["visible"].split(",")) for fact in facts] == [["0", "1"]] * 4
        other = RayRun(tmp_path, "other", str(tmp_path), cluster=gpu_nodes)
        # auto: there are GPUs.
        assert other(1) == 2, other.said()
        assert "asked for 1 worker(s) of 1 CPU(s) and 1 GPU(s)" in other.told()[-1]
        assert "0 GPU(s) of them free; others are using it" in other.told()[-1]
        same = RayRun(tmp_path, "held", str(tmp_path), run_dir=str(tmp_path), cluster=gpu_nodes)
        same.log.unlink(missing_ok=True)
        assert same(1) == 2, same.said()
        assert f"the run at {same.url} is live: another job on this cluster is at it" in same.told()[-1]
        assert "another run.name" in same.told()[-1]
        assert ranks.end() == 0, ranks.log.read_text()


def test_cpu_ranks_share_node_and_see_no_gpu(gpu_nodes: Cluster, tmp_path: Path) -> None:
    with placed(gpu_nodes, tmp_path, "cluster.workers=2", "cluster.gpu=false") as ranks:
        facts = ranks.facts(2)
        assert facts[0]["node"] == facts[1]["node"]
        assert [fact["visible"] for fact in facts] == ["", ""]
        assert ranks.end() == 0, ranks.log.read_text()


def test_too_many_ranks_and_unusable_gpu_are_refused(gpu_nodes: Cluster, tmp_path: Path) -> None:
    run = RayRun(tmp_path, "run", str(tmp_path), cluster=gpu_nodes)
    assert run(5) == 2
    assert "asked for 5 worker(s) of 1 CPU(s) and 1 GPU(s); the cluster has 4 CPU(s) and 4 GPU(s)" in run.told()[-1]
    assert run(1, extra=("cluster.gpu=true",)) == 2, run.said()
    assert "was given a GPU (CUDA_VISIBLE_DEVICES=" in run.told()[-1]
    assert "cluster.gpu=false" in run.told()[-1]
    assert not [line for line in run.told() if line.startswith("lost a worker")]
    assert not run.path.exists()
