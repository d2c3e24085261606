"""DeepSpeed's own launcher over ssh, as cluster/hostfile.example says."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.system.hosts import Host, HostedS3, Network
from tests.system.launching import BIN, CONFIG, ROOT, Run, agree, end_session, wait_until

pytestmark = pytest.mark.xdist_group("ray")


def ranks_on(host: Host) -> list[psutil.Process]:
    """The processes that train there."""
    words = {process: process.cmdline() for process in host.processes()}
    return [process for process, line in words.items() if any("pretrain.py" in w for w in line[:4]) and "-u" in line]


def test_deepspeed_hostfile_run_ends_on_killed_rank_and_resumes(
    network: Network, simulated: str, undisturbed: Callable[..., Run], tmp_path: Path
) -> None:
    store = HostedS3(network.add(), tmp_path / "served")
    shutil.copytree(simulated, store.folder / "data" / "sim")
    (store.folder / "runs").mkdir()
    hosts = [network.add(), network.add()]
    for host in hosts:
        host.serve_ssh(store.env)
    example = (ROOT / "cluster" / "hostfile.example").read_text()
    hostfile = tmp_path / "hostfile"
    for number, host in enumerate(hosts, 1):
        example = example.replace(f"HOST_{number} slots=4", f"{host.name} slots=1")
    hostfile.write_text(example)
    options = ("zero.stage=1", "train.steps=40", "train.save_every=8")
    there = Run(tmp_path, "run", "s3://data/sim", options, run_dir="s3://runs")
    here = Run(tmp_path, "run", "s3://data/sim", run_dir=str(store.folder / "runs"))

    def start() -> subprocess.Popen[bytes]:
        words = ["--hostfile", str(hostfile), "--master_addr", hosts[0].name, str(ROOT / "physio_dist" / "pretrain.py")]
        return hosts[0].start(
            str(BIN / "deepspeed"), *words, "--config", CONFIG, *there.words(), env=store.env, log=there.log
        )  # fmt: skip

    process = start()
    try:
        here.wait_for_step(process, 10)
        ranks = [ranks_on(host) for host in hosts]
        assert [len(found) for found in ranks] == [1, 1]
        ranks[1][0].kill()
        assert process.wait(timeout=120) != 0
        wait_until(lambda: not any(ranks_on(host) for host in hosts), "the ranks to end")
    finally:
        end_session(process)
    process = start()
    try:
        assert process.wait(timeout=240) == 0, there.said()
    finally:
        end_session(process)
    assert here.starts()[1] >= 8
    agree(here, undisturbed(*options))
