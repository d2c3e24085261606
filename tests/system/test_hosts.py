"""Pretraining on several hosts that lose their network, their power or processes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.system.hosts import Host, HostCluster, HostedS3, HostRun, Network
from tests.system.launching import ROOT, Run, end_session, wait_until

pytestmark = pytest.mark.xdist_group("ray")

RANDOM = random.Random(os.environ.get("PHYSIO_DIST_TEST_SEED"))
# The one after which a fault strikes.
STEP = RANDOM.randint(9, 14)
EXACT = ("zero.stage=1", "train.precision=fp32", "model.dropout=0", "train.steps=96", "train.save_every=8")
# Some minutes, in which hosts can come and go; no checkpoint but those that are asked for.
LONG = ("train.steps=240", "train.global_batch=64", "train.save_every=1000", "train.val_every=1000")


@pytest.fixture(scope="module")
def store(network: Network, simulated: str, tmp_path_factory: pytest.TempPathFactory) -> HostedS3:
    """The bucket with the shard set, and one for runs."""
    store = HostedS3(network.add(), tmp_path_factory.mktemp("store") / "served")
    shutil.copytree(simulated, store.folder / "data" / "sim")
    (store.folder / "runs").mkdir()
    return store


@pytest.fixture(scope="module")
def cluster(network: Network, store: HostedS3) -> HostCluster:
    return HostCluster(network, store, 2)


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Working directory that jobs upload."""
    folder = tmp_path_factory.mktemp("code")
    shutil.copytree(ROOT / "physio_dist", folder / "physio_dist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", folder / "configs")
    return folder


class Fault:
    """A run that is struck: what has to hold of it afterwards, and what it cost.

    Args:
        title: of its line in the table that PHYSIO_DIST_CHAOS_TABLE names a file for.
    """

    def __init__(self, run: HostRun, reference: Run, title: str) -> None:
        self.run, self.reference, self._title = run, reference, title
        self._struck = time.monotonic()

    def strike_after(self, process: subprocess.Popen[bytes]) -> None:
        """Wait for a step that is drawn at random."""
        self.run.wait_for_step(process, STEP)
        self._struck = time.monotonic()

    def finish(self, process: subprocess.Popen[bytes]) -> None:
        """It ends by itself, every sample was trained on exactly once, and the losses are the undisturbed run's."""
        run, noticed = self.run, "-"
        try:
            end = time.monotonic() + 400
            while process.poll() is None and time.monotonic() < end:
                if noticed == "-" and "physio-dist: lost a worker" in run.said():
                    noticed = f"{time.monotonic() - self._struck:.0f} s"
                time.sleep(0.2)
            assert process.poll() == 0, run.said()
        finally:
            end_session(process)
        assert "physio-dist: done" in run.said()
        assert run.trace() == self.reference.trace()
        ours, theirs = run.metrics(), self.reference.metrics()
        losses = [[line["loss"] for line in lines.values()] for lines in (ours, theirs)]
        np.testing.assert_allclose(*losses, atol=1e-3)
        table = os.environ.get("PHYSIO_DIST_CHAOS_TABLE")
        if table:
            apart = float(np.abs(np.subtract(*losses)).max())
            gap = float(np.diff([line["time"] for line in ours.values()]).max())
            with Path(table).open("a") as file:
                file.write(f"| {self._title} | {noticed} | {gap:.0f} s | {sum(run.repeated())} | 0 | {apart:.0e} |\n")


Make = Callable[..., Fault]


@pytest.fixture()
def faulty(
    cluster: HostCluster, store: HostedS3, code: Path, tmp_path: Path, undisturbed: Callable[..., Run],
    request: pytest.FixtureRequest,
) -> Make:  # fmt: skip
    """Makes a run to be struck, beside the same run that nothing disturbed on this machine."""
    name = request.node.name.removeprefix("test_")[:40]

    def make(title: str, *options: str) -> Fault:
        given = tuple({option.partition("=")[0]: option for option in (*EXACT, *options)}.values())
        run = HostRun(tmp_path, name, "s3://data/sim", given, cluster=cluster, store=store, code=code)
        return Fault(run, undisturbed(*given), title)

    return make


def writer(run: HostRun, cluster: HostCluster) -> Host:
    """The host of the rank that writes the run."""
    name = json.loads((run.path / "lease.json").read_text())["host"].split()[0]
    return next(host for host in cluster.nodes if host.name == name)


@pytest.fixture()
def lost(cluster: HostCluster) -> Iterator[Callable[[Host], None]]:
    """Takes note of a host that is lost; another takes its place after the test."""
    gone: list[Host] = []
    yield gone.append
    for host in gone:
        cluster.drop(host)
        cluster.add_node()


@pytest.fixture()
def mended(cluster: HostCluster) -> Iterator[None]:
    """Cables and links are as they were after the test."""
    yield
    for host in cluster.nodes:
        host.mend()


def lose_writer(
    fault: Fault, cluster: HostCluster, lost: Callable[[Host], None], strike: Callable[[Host], None]
) -> None:
    """The host whose rank writes the run is struck; the run goes on with the other one."""
    process = fault.run.submit("cluster.workers=[1,2]")
    fault.strike_after(process)
    host = writer(fault.run, cluster)
    lost(host)
    strike(host)
    fault.finish(process)
    assert [attempt["world"] for attempt in fault.run.attempts()] == [2, 1]


@pytest.mark.chaos
def test_two_hosts_train_without_fault(faulty: Make, cluster: HostCluster) -> None:
    fault = faulty("none")
    process = fault.run.submit("cluster.workers=2")
    fault.strike_after(process)
    for host in cluster.nodes:
        fault.run.rank_on(host)
    fault.finish(process)
    assert [attempt["world"] for attempt in fault.run.attempts()] == [2]


@pytest.mark.chaos
def test_run_survives_killed_rank(faulty: Make, cluster: HostCluster) -> None:
    fault = faulty("a rank killed (SIGKILL)")
    process = fault.run.submit("cluster.workers=2")
    fault.strike_after(process)
    fault.run.rank_on(RANDOM.choice(cluster.nodes)).kill()
    fault.finish(process)
    assert len(fault.run.starts()) == 2
    assert fault.run.starts()[1] >= 8


def test_run_survives_permanent_network_loss_of_host(
    faulty: Make, cluster: HostCluster, lost: Callable[[Host], None]
) -> None:
    """The host whose rank writes the run is lost; its successor sees that nobody renews the lease."""
    fault = faulty("a host's cable pulled for good")
    lose_writer(fault, cluster, lost, Host.pull_cable)
    assert fault.run.starts()[1] >= 8


@pytest.mark.chaos
def test_resubmitted_job_resumes_after_killed_driver(faulty: Make, cluster: HostCluster) -> None:
    fault = faulty("the driver killed (SIGKILL), the job submitted again")
    process = fault.run.submit("cluster.workers=2")
    fault.strike_after(process)
    (driver,) = [each for each in cluster.head.processes() if each.cmdline()[1:3] == ["-m", "physio_dist.launch"]]
    driver.kill()
    assert process.wait(timeout=120) == 1
    fault.finish(fault.run.submit("cluster.workers=2"))
    assert len(fault.run.starts()) == 2
    assert fault.run.starts()[1] >= 8


@pytest.mark.chaos
@pytest.mark.usefixtures("mended")
def test_run_survives_network_loss_of_15_s(faulty: Make, cluster: HostCluster) -> None:
    """Less than it takes Ray to give a host up: nothing is repeated."""
    fault = faulty("a host's cable out for 15 s")
    process = fault.run.submit("cluster.workers=2")
    fault.strike_after(process)
    host = writer(fault.run, cluster)
    host.pull_cable()
    time.sleep(15)
    host.plug_cable()
    fault.finish(process)
    assert fault.run.starts() == [0]


@pytest.mark.chaos
@pytest.mark.usefixtures("mended")
def test_run_survives_packet_loss(faulty: Make, cluster: HostCluster) -> None:
    """From before the job is submitted."""
    fault = faulty("2% of the packets to each host lost")
    for host in cluster.nodes:
        host.lose_packets(0.02)
    fault.finish(fault.run.submit("cluster.workers=2"))
    assert fault.run.starts() == [0]
    assert all(host.packets_lost() > 0 for host in cluster.nodes)


@pytest.mark.chaos
@pytest.mark.usefixtures("mended")
def test_run_survives_narrow_link(faulty: Make, cluster: HostCluster) -> None:
    """From before the job is submitted."""
    fault = faulty("the link of a host narrowed to 10 Mbit/s")
    cluster.nodes[0].narrow("10mbit")
    fault.finish(fault.run.submit("cluster.workers=2"))
    assert fault.run.starts() == [0]


@pytest.mark.chaos
def test_run_survives_storage_outage_of_30_s(faulty: Make, store: HostedS3) -> None:
    fault = faulty("the S3 server killed, back after 30 s")
    process = fault.run.submit("cluster.workers=2")
    fault.strike_after(process)
    store.kill()
    time.sleep(30)
    store.start()
    fault.finish(process)
    assert fault.run.starts() == [0]


@pytest.mark.chaos
def test_run_survives_terminated_spot_host(faulty: Make, cluster: HostCluster, lost: Callable[[Host], None]) -> None:
    fault = faulty("a spot host taken back (SIGTERM to all its processes)")
    lose_writer(fault, cluster, lost, Host.terminate)


@pytest.mark.chaos
def test_run_saves_before_announced_preemption(
    faulty: Make, cluster: HostCluster, lost: Callable[[Host], None]
) -> None:
    """The ranks save as soon as they hear of it, and no restart of those after failures is used up."""
    fault = faulty("a spot host announced to go 20 s ahead, then SIGTERM", *LONG)
    process = fault.run.submit("cluster.workers=[1,2]", "cluster.max_failures=0")
    fault.strike_after(process)
    host = writer(fault.run, cluster)
    lost(host)
    cluster.announce(host, 20)
    wait_until(lambda: "announced to go: " in fault.run.said(), "the driver to hear of it")
    time.sleep(20)
    host.terminate()
    fault.finish(process)
    assert [attempt["world"] for attempt in fault.run.attempts()] == [2, 1]
    assert fault.run.starts()[1] >= STEP


@pytest.mark.chaos
def test_elastic_run_grows_and_shrinks_with_cluster(faulty: Make, cluster: HostCluster) -> None:
    """From one rank to three as hosts join, without repeating a step, and to two as one leaves."""
    fault = faulty("one rank, three when hosts join, two when one is lost", *LONG)
    cluster.drop(cluster.nodes[0])
    process = fault.run.submit("cluster.workers=[1,3]", "cluster.resize_s=5")
    fault.strike_after(process)
    for _ in range(2):
        cluster.add_node()
    wait_until(lambda: any(attempt["world"] == 3 for attempt in fault.run.attempts()), "three ranks")
    grown = fault.run.attempts()[-1]["from_step"]
    fault.run.wait_for_step(process, grown + 3)
    cluster.drop(cluster.nodes[0])
    fault.finish(process)
    worlds = [attempt["world"] for attempt in fault.run.attempts()]
    assert [world for n, world in enumerate(worlds) if n == 0 or worlds[n - 1] != world] in ([1, 2, 3, 2], [1, 3, 2])
    assert all(start > 0 for start in fault.run.starts()[1:])


def test_unresponsive_node_is_named_and_waited_for(network: Network, store: HostedS3, tmp_path: Path) -> None:
    """Ray has begun to place tasks on the node, so that the message must not blame other jobs."""
    cluster, log = HostCluster(network, store, 1, misses=100), tmp_path / "log"
    (node,) = cluster.nodes
    node.pull_cable()
    words = ["shard", "simulate", "people=3,windows=2", "--out", str(tmp_path / "set"), "ray=auto"]
    process = cluster.start_at_head(sys.executable, "-m", "physio_dist.cli", *words, log=log)
    wait_until(lambda: process.poll() is not None or "no answer from" in log.read_text(), "the node to be named")
    line = rf"physio-dist: waiting up to 2\d\d s for room: asked .*; no answer from {node.address}\n"
    assert re.search(line, log.read_text()), log.read_text()
    node.plug_cable()
    assert process.wait(timeout=120) == 0, log.read_text()
    assert "others are using it" not in log.read_text()


@pytest.mark.chaos
def test_job_resumes_on_new_cluster_after_lost_head(
    faulty: Make, cluster: HostCluster, network: Network, store: HostedS3
) -> None:
    """The last test here, for it leaves no cluster behind."""
    fault = faulty("the head lost, the job submitted to a new cluster")
    process = fault.run.submit("cluster.workers=2")
    fault.strike_after(process)
    ranks = [fault.run.rank_on(host) for host in cluster.nodes]
    cluster.head.power_off()
    assert process.wait(timeout=120) != 0
    # Nodes without a head end by themselves, ranks and all.
    wait_until(lambda: not any(rank.is_running() for rank in ranks), "the ranks to end")
    fault.run.cluster = HostCluster(network, store, 2)
    fault.finish(fault.run.submit("cluster.workers=2"))
    assert len(fault.run.starts()) == 2
