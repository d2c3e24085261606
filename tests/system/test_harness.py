"""The hosts that tests of clusters run on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.system.hosts import Host, Network
from tests.system.launching import ROOT, wait_until

pytestmark = pytest.mark.xdist_group("ray")

LISTEN = "import socket; s = socket.create_server(('', 7000)); print('listening', flush=True)\nwhile True: s.accept()"


@pytest.fixture()
def hosts(network: Network, tmp_path: Path) -> tuple[Host, Host]:
    """Two, of which the second listens on port 7000."""
    first, second = network.add(), network.add()
    log = tmp_path / "log"
    second.start(sys.executable, "-c", LISTEN, log=log)
    wait_until(lambda: "listening" in log.read_text(), "the listener")
    return first, second


def reaches(first: Host, second: Host) -> bool:
    """Whether a connection comes about within 2 s."""
    script = f"import socket; socket.create_connection(('{second.name}', 7000), timeout=2)"
    return subprocess.run(first.words(sys.executable, "-c", script), capture_output=True, check=False).returncode == 0


def test_host_network_faults(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    assert reaches(first, second)
    second.pull_cable()
    assert not reaches(first, second)
    second.mend()
    wait_until(lambda: reaches(first, second), "the cable")
    second.lose_packets(1.0)
    assert not reaches(first, second)
    assert second.packets_lost() > 0
    second.mend()
    second.narrow("10mbit")
    assert reaches(first, second)
    second.mend()
    second.power_off()
    assert not second.alive
    assert not reaches(first, second)


def test_hosts_share_no_processes_disks_or_names(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    assert [second.name] == second.do("hostname").split()
    (first.disk / "outside").touch()
    first.do("touch", str(first.disk / "mine"))
    assert first.do("ls", str(first.disk)).split() == ["mine"]
    assert not second.do("ls", str(second.disk)).split()
    assert [process.cmdline()[2] for process in second.processes() if "-c" in process.cmdline()] == [LISTEN]
    assert not [process for process in first.processes() if "-c" in process.cmdline()]
    (first.disk / "outside").unlink()


def test_host_survives_its_processes(hosts: tuple[Host, Host]) -> None:
    first, second = hosts
    for process in second.processes():
        process.kill()
    wait_until(lambda: not reaches(first, second), "the listener to end")
    assert second.do("hostname").split() == [second.name]
    second.terminate()
    assert second.do("hostname").split() == [second.name]


@pytest.mark.usefixtures("network")
def test_hosts_end_with_their_creator(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom tests.system.hosts import Network\n"
        "network = Network()\nhost = network.add()\n"
        "host.start('sleep', '1000', log=Path(sys.argv[1]))\n"
        "print(network.disk, network.files, flush=True)\ntime.sleep(1000)"
    )
    maker = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "log")], cwd=ROOT, stdout=subprocess.PIPE)
    assert maker.stdout is not None
    folders = [Path(word) for word in maker.stdout.readline().decode().split()]
    made = psutil.Process(maker.pid)

    def sleeping() -> int:
        return sum("sleep" in process.cmdline() for process in made.children(recursive=True))

    # Two that keep namespaces, and one on the host.
    wait_until(lambda: sleeping() >= 3, "the host's process")
    below = made.children(recursive=True)
    os.kill(maker.pid, signal.SIGKILL)
    maker.wait()
    maker.stdout.close()
    wait_until(lambda: not any(process.is_running() for process in below), "them to end", 20)
    # A folder is all that nobody is left to remove; that of the disks is empty, for they were each host's own.
    for folder in folders:
        assert folder.name.startswith("pd")
    assert not list(folders[0].iterdir())
    for file in folders[1].iterdir():
        file.unlink()
    for folder in folders:
        folder.rmdir()
