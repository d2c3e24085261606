"""The node cache: shards of a remote set on the local disk, fetched once, visible only when verified.

Ranks of a node share the folder and later runs do too, because files are named by their content's hash. A shard of a
local set is read where it lies, after its hash has been checked once in this process; it is checked again when the file
has changed since.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import resource
import threading
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np
import numpy.typing as npt
from filelock import FileLock

from physio_dist import storage
from physio_dist.errors import DataError, UserError
from physio_dist.shards.index import ShardInfo, ShardSet

log = logging.getLogger("physio_dist")

# Each map holds a file open. A single rank has several shards of each lane in hand, some hundreds in a large set.
_MOST_MAPS = 8192
_PIECE = 1 << 22
# How long a use of a shard may go unnoted on disk, where other ranks look for the least recently used.
_TOUCH_S = 60.0


class ShardCache:
    """Opens shards as read-only byte maps.

    Args:
        folder: of the cache; made if need be.
        limit_bytes: what the cached shards may take together; the least recently used go first.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: str, limit_bytes: float) -> None:
        self.folder = Path(folder).expanduser() / "shards"
        self.limit_bytes = limit_bytes
        self._maps: OrderedDict[str, npt.NDArray[np.uint8]] = OrderedDict()
        # Those of them that are files of the cache rather than of a local set.
        self._fetched: set[str] = set()
        # What was verified, so that a map closed for want of room is not paid for with another hash of the file.
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._touched: dict[str, float] = {}
        self._most_maps = _open_files_allowed() // 2
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
                self._touch(info.sha256)
                return found
            mine = self._locks.setdefault(info.sha256, threading.Lock())
        with mine:
            if (found := self._maps.get(info.sha256)) is not None:
                return found
            url = shards.shard_url(shard)
            opened = self._local(url, info.sha256) if storage.is_local(url) else self._remote(url, info)
            with self._lock:
                self._maps[info.sha256] = opened
                while len(self._maps) > self._most_maps:
                    self._maps.popitem(last=False)
            return opened

    def _touch(self, sha256: str) -> None:
        """Note on disk, now and then, that a cached file is in use."""
        now = time.monotonic()
        if sha256 in self._fetched and now - self._touched.get(sha256, 0.0) > _TOUCH_S:
            self._touched[sha256] = now
            path = self.folder / f"{sha256}.tar"
            with contextlib.suppress(OSError):
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def _verified(self, path: Path, sha256: str) -> npt.NDArray[np.uint8] | None:
        """A read-only map of a file; None where its content has another hash."""
        facts = path.stat()
        if facts.st_size == 0:  # nothing can be mapped
            return None
        # A plain view, because slices of a `memmap` cost several times as much.
        opened = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
        identity = (facts.st_size, facts.st_mtime_ns, facts.st_ino)
        if self._seen.get(sha256) != identity:
            digest = hashlib.sha256()
            for start in range(0, len(opened), _PIECE):
                digest.update(opened[start : start + _PIECE].data)
            if digest.hexdigest() != sha256:
                return None
            self._seen[sha256] = identity
        return opened

    def _local(self, url: str, sha256: str) -> npt.NDArray[np.uint8]:
        path = storage.local_path(url)
        # A second look, because a file that is still being copied into place settles.
        for _ in range(2):
            try:
                opened = self._verified(path, sha256)
            except OSError as error:
                raise DataError(f"shard {url} is in the index but cannot be opened: {error.strerror}") from None
            if opened is not None:
                return opened
            time.sleep(0.2)
        raise DataError(f"shard {url} disagrees with its index (sha256): it was truncated or altered")

    def _remote(self, url: str, info: ShardInfo) -> npt.NDArray[np.uint8]:
        path = self.folder / f"{info.sha256}.tar"
        try:
            with FileLock(path.with_suffix(".lock")):
                with contextlib.suppress(FileNotFoundError):
                    if (opened := self._verified(path, info.sha256)) is not None:
                        self._fetched.add(info.sha256)
                        self._touch(info.sha256)
                        return opened
                    log.warning("cached copy of %s is damaged; fetching it again", url)
                for attempt in range(2):
                    if attempt == 1:
                        log.warning("shard %s disagrees with its index; fetching it again", url)
                    with FileLock(self.folder / "room.lock"):
                        self._make_room(info.filesize)
                    if (opened := self._fetch(url, path, info.sha256)) is not None:
                        self._fetched.add(info.sha256)
                        return opened
        except OSError as error:
            raise storage.explain(str(path), "use the cached shard", error) from error
        raise DataError(f"shard {url} disagrees with its index (sha256), also when fetched again")

    def _fetch(self, url: str, path: Path, sha256: str) -> npt.NDArray[np.uint8] | None:
        temporary = path.with_suffix(f".{os.getpid()}.part")
        try:
            storage.get_file(url, temporary)
            opened = self._verified(temporary, sha256)
            if opened is not None:
                temporary.replace(path)
            return opened
        except storage.NotFoundError:
            raise DataError(f"shard {url} is in the index but not in storage") from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _make_room(self, needed: int) -> None:
        """Drop the least recently used files until ``needed`` more bytes fit.

        A file that another rank has open goes on being readable, and takes its place on the disk, until that rank
        makes room in its turn.
        """
        entries, arriving = [], 0
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                # What a killed process left half-fetched is nobody's after a while.
                if path.suffix == ".part" and time.time() - facts.st_mtime > 3600:
                    path.unlink()
                elif path.suffix == ".part":
                    arriving += facts.st_size
                elif path.suffix == ".tar":
                    entries.append((facts.st_atime, facts.st_size, path))
        total = arriving + sum(size for _, size, _ in entries)
        kept = {path.stem for _, _, path in entries}
        for _, size, path in sorted(entries):
            if total + needed <= self.limit_bytes:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
            kept.discard(path.stem)
        with self._lock:
            for sha256 in [sha256 for sha256 in self._maps if sha256 in self._fetched and sha256 not in kept]:
                del self._maps[sha256]
                self._fetched.discard(sha256)


def _open_files_allowed() -> int:
    """Files this process may have open, after asking for as many as the system grants without privilege."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MOST_MAPS if hard == resource.RLIM_INFINITY else min(2 * _MOST_MAPS, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return wanted if soft == resource.RLIM_INFINITY else min(soft, 2 * _MOST_MAPS)
