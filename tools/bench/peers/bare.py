"""A bare download: ``bare.py URL FOLDER CONNECTIONS``, ranged reads of all shards of a set into files, no checks.

What it takes is what storage and this machine's client give; the feed does the rest on top of it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiobotocore.config import AioConfig
from aiobotocore.session import get_session
from serve import serve

from physio_dist.shards.index import ShardSet, open_set

PIECE = 8 << 20


class Download:
    """Fetches a set again and again over the same connections, as a feed in a run has them.

    Args:
        shards: of the set.
        folder: emptied each time.
        connections: ranges on their way at a time.
    """

    def __init__(self, shards: ShardSet, folder: Path, connections: int) -> None:
        self._shards, self._folder, self._connections = shards, folder, connections
        self._loop = asyncio.new_event_loop()
        config = AioConfig(max_pool_connections=connections, response_checksum_validation="when_required")
        self._client = self._loop.run_until_complete(get_session().create_client("s3", config=config).__aenter__())

    def __call__(self) -> dict[str, Any]:
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        start = time.perf_counter()
        self._loop.run_until_complete(self._all())
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "bytes": sum(path.stat().st_size for path in self._folder.iterdir())}

    async def _all(self) -> None:
        files = {}
        for info in self._shards.shards:
            files[info.url] = os.open(self._folder / info.url, os.O_RDWR | os.O_CREAT)
            os.truncate(files[info.url], info.filesize)
        ranges = iter([
            (info.url, begin, min(begin + PIECE, info.filesize))
            for info in self._shards.shards
            for begin in range(0, info.filesize, PIECE)
        ])  # fmt: skip
        await asyncio.gather(*(self._some(ranges, files) for _ in range(self._connections)))
        for file in files.values():
            os.close(file)

    async def _some(self, ranges: Iterator[tuple[str, int, int]], files: dict[str, int]) -> None:
        bucket, _, prefix = self._shards.url.removeprefix("s3://").partition("/")
        for name, begin, end in ranges:
            key = f"{prefix}/{name}" if prefix else name
            answer = await self._client.get_object(Bucket=bucket, Key=key, Range=f"bytes={begin}-{end - 1}")
            data = await answer["Body"].read()
            assert os.pwrite(files[name], data, begin) == end - begin, f"{name}: {len(data)} bytes from {begin}"


def main() -> None:
    """Answer until stdin ends."""
    shards = open_set(sys.argv[1])
    serve({"bare": Download(shards, Path(sys.argv[2]), int(sys.argv[3]))})


if __name__ == "__main__":
    main()
