"""Fixtures that every part of the tests shares."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from physio_dist import storage


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real recordings; its absence is a failure, never a skip."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("PHYSIO_DIST_DATA", default))
    assert folder.is_dir(), f"real recordings are not at {folder}: set PHYSIO_DIST_DATA"
    return folder


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs ``physio-dist`` with the given words to its end."""

    def run(*words: object, env: dict[str, str] | None = None, **more: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "physio_dist.cli", *map(str, words)]
        environment = {**os.environ, **(env or {})}
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, **more)  # type: ignore[call-overload]

    return run


class S3:
    """A real S3 server (rclone) over a folder.

    Attributes:
        env: the environment variables under which clients reach it.
        folder: what it serves; folders in it are buckets.
        bucket: URL of an empty bucket.
    """

    key, secret = "AKIATESTTESTTEST", "secret-for-tests-only"

    def __init__(self, folder: Path) -> None:
        self.root = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.bucket, self.folder = "", folder
        self._process: subprocess.Popen[bytes] | None = None
        self.env = {
            "AWS_ACCESS_KEY_ID": self.key,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def start(self) -> None:
        """Start serving, unless it already does."""
        if self._process is not None:
            return
        rclone = Path(sys.executable).with_name("rclone")
        auth, address = f"{self.key},{self.secret}", f"127.0.0.1:{self.port}"
        # Tests change the served folder behind the server's back, so it must not remember listings.
        options = ["--auth-key", auth, "--addr", address, "--dir-cache-time", "1ms", "--config", ""]
        with (self.root.parent / "rclone.log").open("ab") as log:
            words = [str(rclone), "serve", "s3", *options, str(self.root)]
            self._process = subprocess.Popen(words, stdout=log, stderr=log)
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self._process.poll() is None, (self.root.parent / "rclone.log").read_text()
            time.sleep(0.05)
        raise AssertionError("rclone does not answer")

    def stop(self) -> None:
        """An outage: the server is killed."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """The server behind `s3`."""
    folder = tmp_path_factory.mktemp("s3") / "served"
    folder.mkdir()
    server = S3(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture()
def s3(s3_server: S3, request: pytest.FixtureRequest) -> Iterator[S3]:
    """A running S3 server with an empty bucket of the test's own, for processes that get its ``env``."""
    s3_server.start()
    name = f"b{abs(hash(request.node.nodeid)) % 10**12}"
    s3_server.folder = s3_server.root / name
    s3_server.folder.mkdir()
    s3_server.bucket = f"s3://{name}"
    yield s3_server
    shutil.rmtree(s3_server.folder, ignore_errors=True)


@pytest.fixture()
def s3_here(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The same for this process: its S3 client reads the environment once, so it is made anew before and after."""
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    storage._filesystem.cache_clear()
    storage.contacted.discard("s3")
    yield s3
    storage._filesystem.cache_clear()
    storage.contacted.discard("s3")


@contextlib.contextmanager
def disk_of(size: str, folder: Path) -> Iterator[Path]:
    """A disk that is soon full, mounted at ``folder``."""
    assert os.geteuid() == 0, "this test mounts a small disk: run it as root"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture()
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    with disk_of("64k", tmp_path / "disk") as folder:
        yield folder
