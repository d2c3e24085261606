"""Fixtures that every part of the tests shares."""

from __future__ import annotations

import contextlib
import functools
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from physio_dist import storage
from tests.proxy import Proxy
from tests.tiers import pytest_collection_modifyitems as pytest_collection_modifyitems
from tests.tiers import pytest_itemcollected as pytest_itemcollected
from tests.tiers import pytest_terminal_summary as pytest_terminal_summary
from tests.tiers import require, require_root

# A shell that starts the tests in the background has them ignore Ctrl-C, and so would everything that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def temporary_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A temporary folder of the session, removed with whatever killed processes leave in it."""
    # Where pytest puts folders of tests, so that they can be looked at afterwards, does not change.
    tmp_path_factory.getbasetemp()
    # Sockets lie in it, whose paths must be short.
    folder = tempfile.mkdtemp(prefix="pd", dir="/tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        patch.setenv("WIDS_CACHE", f"{folder}/wids")
        patch.setattr(tempfile, "tempdir", folder)
        yield
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real recordings: ``PHYSIO_DIST_DATA``, by default ``../shared/data``."""
    folder = Path(os.environ.get("PHYSIO_DIST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    require(folder.is_dir(), "recordings: set PHYSIO_DIST_DATA")
    return folder


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Folder of the few real recordings that are part of the project, laid out as `data_dir`."""
    return Path(__file__).resolve().parent / "data" / "recordings"


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
        self.env = self.reached_at(f"127.0.0.1:{self.port}")

    @classmethod
    def reached_at(cls, address: str) -> dict[str, str]:
        """The environment variables for clients of a server at ``host:port``."""
        return {
            "AWS_ACCESS_KEY_ID": cls.key,
            "AWS_SECRET_ACCESS_KEY": cls.secret,
            "AWS_ENDPOINT_URL": f"http://{address}",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    @classmethod
    def command(cls, address: str, folder: Path) -> list[str]:
        """Command that serves ``folder`` at an address."""
        # Tests change the served folder behind the server's back, so it must not remember listings.
        options = ["--auth-key", f"{cls.key},{cls.secret}", "--dir-cache-time", "1ms", "--config", ""]
        return [str(Path(sys.executable).with_name("rclone")), "serve", "s3", *options, "--addr", address, str(folder)]

    def start(self) -> None:
        """Start serving, unless it already does."""
        if self._process is not None:
            return
        with (self.root.parent / "rclone.log").open("ab") as log:
            words = self.command(f"127.0.0.1:{self.port}", self.root)
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
    with _client_of(s3.env, monkeypatch):
        yield s3


@contextlib.contextmanager
def _client_of(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    storage.forget_clients()
    storage.reachable_hosts.discard("s3")
    yield
    storage.forget_clients()
    storage.reachable_hosts.discard("s3")


class Proxied:
    """The S3 server behind a proxy that can make faults.

    Attributes:
        server: the server itself, which can be stopped and started.
        proxy: takes the faults and knows the requests.
        env, folder, bucket: as of the server, but ``env`` names the proxy.
    """

    def __init__(self, server: S3) -> None:
        self.server, self.proxy = server, Proxy(server.port)
        self.folder, self.bucket = server.folder, server.bucket
        self.env = {**server.env, "AWS_ENDPOINT_URL": self.proxy.url}


@pytest.fixture()
def proxied(s3: S3) -> Iterator[Proxied]:
    """The S3 server of `s3` behind a proxy, for processes that get its ``env``."""
    made = Proxied(s3)
    yield made
    made.proxy.stop()


@pytest.fixture()
def proxied_here(proxied: Proxied, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxied]:
    """The same for this process."""
    with _client_of(proxied.env, monkeypatch):
        yield proxied


@contextlib.contextmanager
def disk_of(size: str, folder: Path) -> Iterator[Path]:
    """A disk that is soon full, mounted at ``folder``."""
    require_root()
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture()
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    with disk_of("64k", tmp_path / "disk") as folder:
        yield folder


class Web:
    """A real web server over a folder, which ignores Range as plain servers do.

    Attributes:
        folder: what it serves.
        url: of the folder.
        asked: paths of the requests so far.
        faults: for a path what comes first: a status, ``cut`` (half the body under the whole length, then silence) or a
            URL to be sent to; each is used up by one request, but the last one of a list that ends with ``...``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.faults: dict[str, list[object]] = {}
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections from now on."""
        self._server.shutdown()
        self._server.server_close()

    def _fault(self, path: str) -> object:
        waiting = self.faults.get(path, [])
        if not waiting:
            return None
        return waiting[0] if waiting[1:] == [...] else waiting.pop(0)

    def _handler(self) -> Callable[..., http.server.SimpleHTTPRequestHandler]:
        web = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                web.asked.append(self.path)
                fault = web._fault(self.path)
                if isinstance(fault, int):
                    self.send_error(fault)
                elif fault == "cut":
                    data = (web.folder / self.path.lstrip("/")).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                elif isinstance(fault, str):
                    self.send_response(302)
                    self.send_header("Location", fault)
                    self.end_headers()
                else:
                    super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        return functools.partial(Handler, directory=str(self.folder))


@pytest.fixture()
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    """A web server, and a user whose cache is empty."""
    (tmp_path / "web").mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    server = Web(tmp_path / "web")
    yield server
    server.stop()
