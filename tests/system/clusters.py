"""Real Ray nodes on this machine, and runs that are launched on them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import S3
from tests.system.launching import BIN, CONFIG, ROOT, Run, free_port, wait_until
from tests.tiers import require_root

# Every process of a cluster carries it in its environment, whatever it calls itself.
MARK = "PHYSIO_DIST_TEST_CLUSTER"


def marked(mark: str, sessions: Collection[int] = ()) -> list[psutil.Process]:
    """Living processes of these sessions, or with a mark in their environment, which a new title may overwrite."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            ours = os.getsid(process.pid) in sessions or process.environ().get(MARK) == mark
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def ask(url: str, token: str = "") -> Any:
    """A JSON document; None where nobody answers yet."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return None


class Cluster:
    """Ray nodes, with token authentication.

    Args:
        env: of all nodes.
        cpus, gpus: that each node declares; the GPUs need not be there.
        addresses: whether each node has one of its own, by which Ray Train tells machines apart.

    Attributes:
        nodes: beside the head.
        env: what a client of the cluster needs.
        dashboard: URL that ``ray job submit`` takes.
    """

    def __init__(self, env: Mapping[str, str], cpus: int = 1, gpus: int = 0, addresses: bool = False) -> None:
        self._size = ["--num-cpus", str(cpus), "--num-gpus", str(gpus)]
        self._addresses = addresses
        self.mark = uuid.uuid4().hex
        # Ray puts sockets there, whose paths must be short.
        self.folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self.address = f"127.0.0.1:{free_port()}"
        dashboard_port = free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard_port}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
        self._node_env = {
            **os.environ, **env, **token, MARK: self.mark, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
            # A job that is stopped gets the time to save; Ray's own 3 s may be too few on a busy machine.
            "RAY_JOB_STOP_WAIT_TIME_S": "60",
        }  # fmt: skip
        self.env = {**token, "RAY_ADDRESS": self.address}
        ports = ["--port", self.address.rpartition(":")[2], "--dashboard-port", str(dashboard_port)]
        client = ["--ray-client-server-port", str(free_port())]
        self.nodes: list[subprocess.Popen[bytes]] = []
        self._sessions: set[int] = set()
        try:
            self._start("--head", *ports, *client)
        except BaseException:
            self.end()
            raise

    def add_node(self, hidden: Path | None = None, env: Mapping[str, str] | None = None) -> None:
        """Start a further node, for which the folder ``hidden`` is empty; ``env`` goes over that of all nodes.

        Returns when the cluster has missed the lost ones too: until then it would place work on them.
        """
        self.nodes.append(self._start("--address", self.address, hidden=hidden, env=env))
        wait_until(lambda: self._alive() == 1 + len(self.nodes), "the cluster to see its nodes as they are")

    def _alive(self) -> int | None:
        """Number of nodes the cluster considers alive; None if it does not answer."""
        asked = ask(f"{self.dashboard}/api/v0/nodes?limit=1000", self.env["RAY_AUTH_TOKEN"])
        return sum(node["state"] == "ALIVE" for node in asked["data"]["result"]["result"]) if asked else None

    def _start(
        self, *words: str, hidden: Path | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        number = len(list(self.folder.glob("*.log")))
        log = self.folder / f"{number}.log"
        command = [
            str(BIN / "ray"), "start", *words, "--block", *self._size,
            "--temp-dir", str(self.folder / str(number)),
            "--object-store-memory", str(80 * 2**20), "--dashboard-agent-listen-port", str(free_port()),
        ]  # fmt: skip
        if self._addresses and number:
            # All of 127.0.0.0/8 is this machine; the head has the machine's own, by which drivers find their node.
            command += ["--node-ip-address", f"127.0.0.{number + 1}"]
        if hidden is not None:
            require_root()
            mount = 'mount -t tmpfs tmpfs "$0" && exec "$@"'
            command = ["unshare", "--mount", "sh", "-c", mount, str(hidden), *command]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, env={**self._node_env, **(env or {})}, stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self._sessions.add(process.pid)

        def up() -> bool:
            assert process.poll() is None, log.read_text()
            return "--block" in log.read_text()

        wait_until(up, "a Ray node to start")
        return process

    def lose_node(self) -> None:
        """A node's machine loses its power."""
        node = self.nodes.pop()
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def processes(self) -> list[psutil.Process]:
        """All living processes of the cluster."""
        return marked(self.mark, self._sessions)

    def workers(self) -> list[psutil.Process]:
        """The processes that train."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def metrics(self, name: str) -> list[str]:
        """Lines of a metric as Prometheus would fetch them."""
        found = []
        for targets in json.loads((self.folder / "0" / "prom_metrics_service_discovery.json").read_text()):
            for target in targets["targets"]:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{target}/metrics") as answer:
                    found += [line for line in answer.read().decode().splitlines() if line.startswith(name)]
        return found

    def figures(self, run: str) -> dict[str, float]:
        """Metrics of the run or sweep with this URL, by name."""
        found: dict[str, float] = {}
        for line in self.metrics("ray_physio_dist_"):
            series, value = line.rsplit(" ", 1)
            if f'run="{run}"' in series:
                name = series.partition("{")[0].removeprefix("ray_physio_dist_")
                assert name not in found, f"{name} is shown twice"
                found[name] = float(value)
        return found

    def end(self) -> None:
        """Kill every process of the cluster and remove its files."""
        # Killing one may make another start, and the last of them are orphans of the first.
        for _ in range(50):
            living = self.processes()
            for process in living:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if not living:
                break
            time.sleep(0.1)
        assert not self.processes()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="module")
def ray_nodes(s3_server: S3) -> Iterator[Cluster]:
    """A cluster of two nodes of one CPU each, which know the S3 server."""
    cluster = Cluster(s3_server.env)
    try:
        cluster.add_node()
        yield cluster
    finally:
        cluster.end()


@dataclass
class RayRun(Run):
    """A run that is launched on a cluster; the launcher is ``launch``, or ``job`` for ``ray job submit``."""

    cluster: Cluster | None = None
    code: Path = ROOT

    def start(self, ranks: int = 2, launcher: str = "launch", extra: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        assert self.cluster is not None
        config = CONFIG if launcher == "launch" else "configs/pretrain/quickstart.yaml"
        words = ["--config", config, *self.words(), f"cluster.workers={ranks}", *extra]
        command = [sys.executable, "-m", "physio_dist.launch", *words]
        if launcher == "job":
            submit = [str(BIN / "ray"), "job", "submit", "--address", self.cluster.dashboard]
            command = [*submit, "--working-dir", str(self.code), "--", *command]
        # A driver that is killed leaves its temporary folder behind.
        environment = {**os.environ, "TMPDIR": str(self.folder), **self.cluster.env, **self.env}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def __call__(self, ranks: int = 2, launcher: str = "launch", extra: tuple[str, ...] = ()) -> int:
        return super().__call__(ranks, launcher, extra)

    def told(self) -> list[str]:
        """Our lines of the log, without Ray's prefix and Ray's own lines."""
        lines = [line.partition("physio-dist: ")[2] for line in self.said().splitlines() if "physio-dist: " in line]
        return [line for line in lines if not line.startswith("Ray is starting")]


Make = Callable[..., RayRun]


@pytest.fixture()
def with_node(ray_nodes: Cluster) -> Iterator[Callable[..., None]]:
    """Puts a node with an environment of its own in the place of the one beside the head, for the test."""

    def put(**env: str) -> None:
        ray_nodes.lose_node()
        ray_nodes.add_node(env=env)

    yield put
    if ray_nodes.nodes:
        ray_nodes.lose_node()
    ray_nodes.add_node()


@pytest.fixture()
def ray_run(ray_nodes: Cluster, simulated: str, tmp_path: Path) -> Make:
    """Makes runs to be launched on the cluster."""

    def make(*options: str, name: str = "run") -> RayRun:
        return RayRun(tmp_path, name, simulated, options, cluster=ray_nodes)

    return make
