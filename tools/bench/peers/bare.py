"""Bare downloads: ``bare.py URL FOLDER CONNECTIONS``, ranged reads of all shards of a set into files, no checks.

``client`` reads with the S3 client that our storage uses, ``http`` with the standard library's HTTP in threads, which
is about as little as Python can put between a socket and a file. The feed does what it does on top of such reads.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
from botocore.config import Config
from serve import serve

from physio_dist.data.format.index import ShardSet, open_set

PIECE = 4 << 20
# Name of a shard, half-open range.
Ranges = Iterator[tuple[str, int, int]]
# Fetches ranges of shards with these keys into these open files.
Fetch = Callable[[Ranges, dict[str, str], dict[str, int]], None]


def in_threads(connections: int, ranges: Ranges, worker: Callable[[Ranges], None]) -> None:
    """Let so many threads take the ranges one after the other."""
    lock = threading.Lock()

    def mine() -> Ranges:
        while True:
            with lock:
                taken = next(ranges, None)
            if taken is None:
                return
            yield taken

    threads = [threading.Thread(target=worker, args=(mine(),)) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class Client:
    """Ranges by the S3 client, over connections that are kept from one download to the next."""

    def __init__(self, bucket: str, connections: int) -> None:
        self._bucket, self._connections = bucket, connections
        config = Config(max_pool_connections=connections, response_checksum_validation="when_required")
        self._client = botocore.session.get_session().create_client("s3", config=config)

    def __call__(self, ranges: Ranges, keys: dict[str, str], files: dict[str, int]) -> None:
        def one(mine: Ranges) -> None:
            for name, begin, end in mine:
                span = f"bytes={begin}-{end - 1}"
                answer = self._client.get_object(Bucket=self._bucket, Key=keys[name], Range=span)
                os.pwrite(files[name], answer["Body"].read(), begin)

        in_threads(self._connections, ranges, one)


class Http:
    """Ranges of signed URLs, each thread over a connection of its own."""

    def __init__(self, bucket: str, connections: int) -> None:
        self._bucket, self._connections = bucket, connections
        config = Config(signature_version="s3v4", s3={"addressing_style": "path"})
        self._signer = botocore.session.get_session().create_client("s3", config=config)

    def __call__(self, ranges: Ranges, keys: dict[str, str], files: dict[str, int]) -> None:
        urls = {
            name: urllib.parse.urlsplit(
                self._signer.generate_presigned_url("get_object", Params={"Bucket": self._bucket, "Key": key})
            )
            for name, key in keys.items()
        }

        def one(mine: Ranges) -> None:
            open_to = next(iter(urls.values()))
            kind = http.client.HTTPSConnection if open_to.scheme == "https" else http.client.HTTPConnection
            connection, buffer = kind(open_to.netloc), memoryview(bytearray(1 << 20))
            for name, begin, end in mine:
                url = urls[name]
                connection.request("GET", f"{url.path}?{url.query}", headers={"Range": f"bytes={begin}-{end - 1}"})
                answer = connection.getresponse()
                while (count := answer.readinto(buffer)) and answer.status < 300:
                    os.pwrite(files[name], buffer[:count], begin)
                    begin += count

        in_threads(self._connections, ranges, one)


def download(shards: ShardSet, folder: Path, fetch: Fetch) -> float:
    """Fetch every shard into an empty folder.

    Returns:
        Seconds.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prefix = shards.url.removeprefix("s3://").partition("/")[2]
    start = time.perf_counter()
    files = {info.url: os.open(folder / info.url, os.O_RDWR | os.O_CREAT) for info in shards.shards}
    for info in shards.shards:
        os.truncate(files[info.url], info.filesize)
    ranges = iter([
        (info.url, begin, min(begin + PIECE, info.filesize))
        for info in shards.shards
        for begin in range(0, info.filesize, PIECE)
    ])  # fmt: skip
    fetch(ranges, {name: f"{prefix}/{name}".lstrip("/") for name in files}, files)
    seconds = time.perf_counter() - start
    for file in files.values():
        os.close(file)
    return seconds


def main() -> None:
    """Answer until stdin ends."""
    url, folder, connections = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    shards, bucket = open_set(url), url.removeprefix("s3://").partition("/")[0]
    fetches: dict[str, Fetch] = {"client": Client(bucket, connections), "http": Http(bucket, connections)}

    def command(name: str) -> Callable[[], dict[str, Any]]:
        size = sum(info.filesize for info in shards.shards)
        return lambda: {"seconds": download(shards, folder, fetches[name]), "bytes": size}

    def check() -> dict[str, Any]:
        """Shards that are not whole after a download by each of them."""
        wrong = []
        for name, fetch in fetches.items():
            download(shards, folder, fetch)
            for info in shards.shards:
                if hashlib.sha256((folder / info.url).read_bytes()).hexdigest() != info.sha256:
                    wrong.append(f"{name}: {info.url}")
        return {"wrong": wrong}

    serve({"client": command("client"), "http": command("http"), "check": check})


if __name__ == "__main__":
    main()
