"""The node cache: shards of a remote set on the local disk, fetched once, visible only when verified.

Ranks of a node share the folder and later runs do too, because files are named by their content's hash. A shard of a
local set is read where it lies, after its hash has been checked once in this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from physio_dist import storage
from physio_dist.errors import DataError, UserError
from physio_dist.shards.index import ShardSet

log = logging.getLogger("physio_dist")

# Open maps a process holds; far below the usual limit of 1,024 open files.
_OPEN_MAPS = 512
_PIECE = 1 << 22


class ShardCache:
    """Opens shards as read-only byte maps.

    Args:
        folder: of the cache; made if need be.
        limit_bytes: what the cached shards may take together; the least recently opened go first.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: str, limit_bytes: float) -> None:
        self.folder = Path(folder).expanduser() / "shards"
        self.limit_bytes = limit_bytes
        self._maps: OrderedDict[str, npt.NDArray[np.uint8]] = OrderedDict()
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir={folder}: cannot make the folder: {error.strerror}") from None

    def open(self, shards: ShardSet, shard: int) -> npt.NDArray[np.uint8]:
        """The bytes of a shard, uint8 ``[filesize]``, fetched and verified first where needed.

        Raises:
            DataError: the shard disagrees with the index, also when fetched again.
            StorageError: it cannot be read, or the cache's disk is full.
        """
        info = shards.shards[shard]
        with self._lock:
            if (found := self._maps.get(info.sha256)) is not None:
                self._maps.move_to_end(info.sha256)
                return found
            mine = self._locks.setdefault(info.sha256, threading.Lock())
        with mine:
            if (found := self._maps.get(info.sha256)) is not None:
                return found
            url = shards.shard_url(shard)
            opened = self._local(url, info.sha256) if storage.is_local(url) else self._remote(url, info.sha256)
            with self._lock:
                self._maps[info.sha256] = opened
                while len(self._maps) > _OPEN_MAPS:
                    self._maps.popitem(last=False)
            return opened

    def _local(self, url: str, sha256: str) -> npt.NDArray[np.uint8]:
        path = storage.local_path(url)
        # A second look, because a file that is still being copied into place settles.
        for _ in range(2):
            try:
                opened = _map(path)
            except OSError as error:
                raise DataError(f"shard {url} is in the index but cannot be opened: {error}") from None
            if _digest(opened) == sha256:
                return opened
            time.sleep(0.2)
        raise DataError(f"shard {url} disagrees with its index (sha256): it was truncated or altered")

    def _remote(self, url: str, sha256: str) -> npt.NDArray[np.uint8]:
        path = self.folder / f"{sha256}.tar"
        with FileLock(path.with_suffix(".lock")):
            with contextlib.suppress(OSError, ValueError):
                opened = _map(path)
                if _digest(opened) == sha256:
                    os.utime(path)
                    return opened
                log.warning("cached copy of %s is damaged; fetching it again", url)
            for attempt in range(2):
                self._make_room(storage.size(url))
                temporary = path.with_suffix(f".{os.getpid()}.part")
                try:
                    storage.get_file(url, temporary)
                    if _digest(_map(temporary)) == sha256:
                        temporary.replace(path)
                        return _map(path)
                except storage.NotFoundError:
                    raise DataError(f"shard {url} is in the index but not in storage") from None
                except ValueError:  # an empty file cannot be mapped
                    pass
                finally:
                    with contextlib.suppress(OSError):
                        temporary.unlink()
                if attempt == 0:
                    log.warning("shard %s disagrees with its index; fetching it again", url)
        raise DataError(f"shard {url} disagrees with its index (sha256), also when fetched again")

    def _make_room(self, needed: int) -> None:
        """Drop the least recently opened files until ``needed`` more bytes fit.

        A file that another rank has open goes on being readable there until it is closed.
        """
        entries = []
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                # What a killed process left half-fetched is nobody's after a while.
                if path.suffix == ".part" and time.time() - facts.st_mtime > 3600:
                    path.unlink()
                elif path.suffix == ".tar":
                    entries.append((facts.st_mtime, facts.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total + needed <= self.limit_bytes:
                return
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size


def _map(path: Path) -> npt.NDArray[np.uint8]:
    return np.memmap(path, dtype=np.uint8, mode="r")


def _digest(data: npt.NDArray[np.uint8]) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(data), _PIECE):
        digest.update(data[start : start + _PIECE].data)
    return digest.hexdigest()
