"""Hosts of their own on one machine: each with a network, processes, mounts and a name that nobody shares.

They hang on one bridge, which is in a namespace of its own too: the machine itself sees neither bridge nor addresses.
Everything ends with the process that made it, whichever way that ends: with its first process a host's other
processes are killed by the kernel, and with the last of those its cables and its disk are gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import S3
from tests.system.launching import BIN, ROOT, Run, wait_until
from tests.tiers import NEEDS, require, require_root

_SUBNET = "10.77.0"
_UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child")
# A first process that takes care of orphans, as an init does, and stays when all others are killed.
_STAY = "echo up; while :; do sleep infinity & wait $! || :; done"


def _check(words: Sequence[str]) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
    return done.stdout


def refusal() -> str:
    """Reason why the kernel or a container allows no such hosts; empty if they are allowed."""
    needed = ("setpriv", "unshare", "nsenter", "ip", "tc", "iptables", "sshd", "ssh-keygen", "pdsh")
    require_root()
    for name in needed:
        require(shutil.which(name) is not None, f"the program {name}")
    script = "ip link add bridge type bridge && ip link add cable type veth && iptables -L -n >/dev/null"
    done = subprocess.run(
        ["unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--mount-proc", "sh", "-c", script],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return "" if done.returncode == 0 else done.stderr.strip()


class _Init:
    """The first process of a set of namespaces."""

    def __init__(self, spaces: Sequence[str], script: str) -> None:
        words = [*_UNSHARE, *spaces, "bash", "-c", f"set -e; {script} {_STAY}"]
        self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"up\n", "no namespaces: run it as root"
        (child,) = psutil.Process(self._process.pid).children()
        self.pid = child.pid

    @property
    def alive(self) -> bool:
        try:
            return psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def end(self) -> None:
        if self._process.poll() is not None:
            return
        self._process.kill()
        self._process.wait()
        wait_until(lambda: not self.alive, "a host to end", 20)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Host:
    """A machine of its own.

    Attributes:
        name, address: in its network; all hosts know each other by name.
        disk: a folder that is this host's alone, under the same path on all of them.
    """

    def __init__(self, name: str, address: str, disk: Path, files: Path, switch: _Init) -> None:
        self.name, self.address, self.disk, self._files, self._switch = name, address, disk, files, switch
        self._port = f"p-{name}"
        private = "".join(f"mount -t tmpfs tmpfs {folder};" for folder in (disk, "/dev/shm", "/run"))
        for file in ("/etc/hosts", "/etc/ssh/ssh_config"):
            private += f"mount --bind {files / Path(file).name} {file};"
        spaces = ("--net", "--pid", "--mount", "--uts", "--ipc", "--mount-proc")
        self._init = _Init(spaces, f"hostname {name}; ip link set lo up; {private}")
        link = ["ip", "link", "add", self._port, "type", "veth", "peer", "name", "eth0", "netns", str(self._init.pid)]
        self._at_switch(*link)
        self._at_switch("ip", "link", "set", self._port, "master", "bridge", "up")
        self.do("ip", "address", "add", f"{address}/24", "dev", "eth0")
        self.do("ip", "link", "set", "eth0", "up")

    @property
    def alive(self) -> bool:
        return self._init.alive

    def words(self, *words: str) -> list[str]:
        """A command that runs there."""
        spaces = ("--net", "--pid", "--mount", "--uts", "--ipc")
        return ["nsenter", "--target", str(self._init.pid), *spaces, f"--wd={Path.cwd()}", "--", *words]

    def do(self, *words: str) -> str:
        """Run a short command to its end there, which has to be a good one; what it says."""
        return _check(self.words(*words))

    def start(
        self, *words: str, env: Mapping[str, str] | None = None, log: Path, cwd: Path | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program there, in a session of its own."""
        command = self.words(*words)
        if cwd is not None:
            command[command.index("--") - 1] = f"--wd={cwd}"
        with log.open("ab") as file:
            return subprocess.Popen(
                command, env={**os.environ, "TMPDIR": str(self.disk), **(env or {})}, stdout=file, stderr=file,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def processes(self) -> list[psutil.Process]:
        """Its living processes but the first."""
        found = []
        mine = Path(f"/proc/{self._init.pid}/ns/pid").stat().st_ino
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                there = Path(f"/proc/{process.pid}/ns/pid").stat().st_ino == mine
                if there and process.pid != self._init.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def pull_cable(self) -> None:
        self._at_switch("ip", "link", "set", self._port, "down")

    def plug_cable(self) -> None:
        self._at_switch("ip", "link", "set", self._port, "up")

    def lose_packets(self, share: float) -> None:
        """Lose this share of the packets that come in, at random."""
        chance = ("-m", "statistic", "--mode", "random", "--probability", str(share))
        self.do("iptables", "-A", "INPUT", "-i", "eth0", *chance, "-j", "DROP")

    def packets_lost(self) -> int:
        """Since that began."""
        rule = self.do("iptables", "-L", "INPUT", "-v", "-x", "-n").splitlines()[2]
        return int(rule.split()[0])

    def narrow(self, rate: str) -> None:
        """Make the link as slow as this, both ways: ``10mbit``."""
        shape = ("root", "tbf", "rate", rate, "burst", "32kbit", "latency", "400ms")
        self.do("tc", "qdisc", "add", "dev", "eth0", *shape)
        self._at_switch("tc", "qdisc", "add", "dev", self._port, *shape)

    def mend(self) -> None:
        """Network and cable are as they were at first."""
        self.plug_cable()
        self.do("iptables", "-F", "INPUT")
        if "tbf" in self.do("tc", "qdisc", "show", "dev", "eth0"):
            self.do("tc", "qdisc", "del", "dev", "eth0", "root")
            self._at_switch("tc", "qdisc", "del", "dev", self._port, "root")

    def serve_ssh(self, env: Mapping[str, str]) -> None:
        """Start an ssh server that lets the other hosts' root in, into this environment."""
        self.do("mkdir", "/run/sshd")
        options = {
            "HostKey": self._files / "key", "AuthorizedKeysFile": self._files / "key.pub", "StrictModes": "no",
            "UsePAM": "no", "SetEnv": " ".join(f"{name}={value}" for name, value in env.items()),
        }  # fmt: skip
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        log = self._files / f"{self.name}-ssh.log"
        self.start("/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *words, log=log)
        wait_until(lambda: b"Server listening" in log.read_bytes(), "the ssh server")

    def terminate(self) -> None:
        """SIGTERM to all that runs there, as a spot machine gets it that is taken back."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)

    def power_off(self) -> None:
        """It loses its power."""
        self._init.end()

    def _at_switch(self, *words: str) -> None:
        _check(["nsenter", "--target", str(self._switch.pid), "--net", "--", *words])


class Network:
    """Hosts on one bridge; nothing of them is seen outside, and nothing stays."""

    def __init__(self) -> None:
        # Ray puts sockets there, whose paths must be short.
        self.disk = Path(tempfile.mkdtemp(prefix="pd", dir="/tmp"))
        self.files = Path(tempfile.mkdtemp(prefix="pd", dir="/tmp"))
        known = [f"{_SUBNET}.{number} host{number}" for number in range(2, 60)]
        (self.files / "hosts").write_text("\n".join(["127.0.0.1 localhost", *known, ""]))
        _check(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.files / "key")])
        strangers = "StrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        (self.files / "ssh_config").write_text(f"IdentityFile {self.files / 'key'}\n{strangers}")
        self._switch = _Init(("--net", "--pid"), "ip link add bridge type bridge; ip link set bridge up;")
        self.hosts: list[Host] = []

    def add(self) -> Host:
        """A further host."""
        number = len(self.hosts) + 2
        self.hosts.append(Host(f"host{number}", f"{_SUBNET}.{number}", self.disk, self.files, self._switch))
        return self.hosts[-1]

    def end(self) -> None:
        """Take everything away."""
        living = [process for host in self.hosts if host.alive for process in host.processes()]
        for host in self.hosts:
            host.power_off()
        self._switch.end()
        for folder in (self.disk, self.files):
            shutil.rmtree(folder)
        wait_until(lambda: not any(process.is_running() for process in living), "the hosts' processes to end", 20)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """A network without hosts."""
    if why := refusal():
        pytest.skip(f"{NEEDS}network namespaces: {why}")
    made = Network()
    try:
        yield made
    finally:
        made.end()


class HostedS3:
    """The S3 server on a host of its own.

    Attributes:
        env: under which clients on other hosts reach it.
        folder: what it serves; folders in it are buckets.
    """

    def __init__(self, host: Host, folder: Path) -> None:
        self.host, self.folder = host, folder
        folder.mkdir()
        self._log = folder.parent / "rclone.log"
        self.env = S3.reached_at(f"{host.name}:9000")
        self.start()

    def start(self) -> None:
        self._log.write_bytes(b"")
        self.host.start(*S3.command(":9000", self.folder), log=self._log)
        wait_until(lambda: b"Starting s3 server" in self._log.read_bytes(), "the S3 server")

    def kill(self) -> None:
        for process in self.host.processes():
            process.kill()


class HostCluster:
    """Ray nodes on hosts, with token authentication; the head trains nothing.

    Ray notices a silent host after 20 to 40 s instead of a minute, or after as many health checks as ``misses`` says.

    Attributes:
        outside: a host without Ray, from which jobs are submitted.
        head: the host of the head node.
        nodes: hosts with one CPU each, to train on.
    """

    def __init__(self, network: Network, store: HostedS3, nodes: int, misses: int = 10) -> None:
        self._network = network
        self._token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
        # Credentials are known to the nodes alone, not to who submits.
        self._env = {
            **self._token, **store.env, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "RAY_health_check_period_ms": "2000", "RAY_health_check_timeout_ms": "2000",
            "RAY_health_check_failure_threshold": str(misses), "RAY_gcs_rpc_server_reconnect_timeout_s": "20",
            "RAY_worker_niceness": "0",
        }  # fmt: skip
        self._logs = store.folder.parent
        self.outside, self.head = network.add(), network.add()
        self._ray(self.head, "--head", "--port", "6379", "--num-cpus", "0", "--dashboard-host", "0.0.0.0")
        self.nodes: list[Host] = []
        for _ in range(nodes):
            self.add_node()

    def add_node(self) -> Host:
        host = self._network.add()
        self._ray(host, "--address", f"{self.head.address}:6379", "--num-cpus", "1")
        self.nodes.append(host)
        return host

    def drop(self, host: Host) -> None:
        """Lose a host, and wait until Ray knows."""
        self.nodes.remove(host)
        host.power_off()
        wait_until(lambda: host.address not in self._living(), f"Ray to miss {host.name}")

    def announce(self, host: Host, seconds: int) -> None:
        """Tell Ray that a host will be gone in so many seconds."""
        self._at_head(
            "drain-node", "--address", f"{self.head.address}:6379", "--node-id", self._living()[host.address],
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
            "--deadline-remaining-seconds", str(seconds),
        )  # fmt: skip

    def _living(self) -> dict[str, str]:
        """Addresses and ids of the nodes that Ray takes for living."""
        address = f"http://{self.head.name}:8265"
        told = self._at_head("list", "nodes", "--address", address, "--filter", "state=ALIVE", "--format", "json")
        return {node["node_ip"]: node["node_id"] for node in json.loads(told[told.index("[") :])}

    def start_at_head(self, *words: str, log: Path) -> subprocess.Popen[bytes]:
        """A program on the head's host, as a client of the cluster."""
        return self.head.start(*words, env={**self._env, "RAY_ADDRESS": f"{self.head.address}:6379"}, log=log)

    def _at_head(self, *words: str) -> str:
        env = [f"{name}={value}" for name, value in self._env.items()]
        return self.head.do("env", *env, str(BIN / "ray"), *words)

    def submit(self, *words: str, log: Path, code: Path = ROOT) -> subprocess.Popen[bytes]:
        """`ray job submit` from outside."""
        address = f"http://{self.head.name}:8265"
        job = [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", str(code), "--", *words]
        return self.outside.start(*job, env=self._token, log=log)

    def _ray(self, host: Host, *words: str) -> None:
        log = self._logs / f"{host.name}.log"
        options = [
            "--block", "--node-ip-address", host.address, "--temp-dir", str(host.disk / "ray"),
            "--object-store-memory", str(80 * 2**20),
        ]  # fmt: skip
        process = host.start(str(BIN / "ray"), "start", *words, *options, env=self._env, log=log)

        def up() -> bool:
            assert process.poll() is None, log.read_text()
            return "--block" in log.read_text()

        wait_until(up, f"Ray on {host.name}")


@dataclass
class HostRun(Run):
    """A run that is submitted to a cluster of hosts; it lies in the bucket ``runs`` of the store."""

    cluster: HostCluster | None = None
    store: HostedS3 | None = None
    code: Path = ROOT

    @property
    def url(self) -> str:
        return f"s3://runs/{self.name}"

    @property
    def path(self) -> Path:
        assert self.store is not None
        return self.store.folder / "runs" / self.name

    def words(self) -> list[str]:
        assert self.cluster is not None
        where = f"data.cache_dir={self.cluster.head.disk / 'cache'}"
        return [word for word in super().words() if not word.startswith(("run.dir=", "data.cache_dir="))] + [
            "run.dir=s3://runs", where,
        ]  # fmt: skip

    def submit(self, *extra: str) -> subprocess.Popen[bytes]:
        assert self.cluster is not None
        words = ["--config", "configs/pretrain/quickstart.yaml", *self.words(), *extra]
        return self.cluster.submit(sys.executable, "-m", "physio_dist.launch", *words, log=self.log, code=self.code)

    def wait_for_step(self, process: subprocess.Popen[bytes], step: int) -> None:
        """Wait until the driver has told this step or a later one; the bucket hears of it with the next checkpoint."""
        told = re.compile(r"physio-dist: step (\d+)/")
        wait_until(
            lambda: process.poll() is not None or max(map(int, told.findall(self.said())), default=0) >= step,
            f"step {step} of {self.name}", 240,
        )  # fmt: skip
        assert process.poll() is None, self.said()

    def repeated(self) -> list[int]:
        """Steps that each start repeats of those before it."""
        last: dict[int, int] = {}
        for file in (self.path / "trace").glob("rank-*.jsonl"):
            for line in map(json.loads, file.read_text().splitlines()):
                last[line["attempt"]] = max(last.get(line["attempt"], 0), line["step"])
        begun = zip(sorted(last)[:-1], self.starts()[1:], strict=True)
        return [last[attempt] - start for attempt, start in begun]

    def attempts(self) -> list[dict[str, Any]]:
        """Records of all starts, which are in the bucket from the first checkpoint on."""
        file = self.path / "attempts.json"
        found: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
        return found

    def rank_on(self, host: Host) -> psutil.Process:
        """The rank that trains there."""
        for process in host.processes():
            with contextlib.suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    return process
        raise AssertionError(f"nobody trains on {host.name}")
