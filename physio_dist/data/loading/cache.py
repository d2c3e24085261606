"""The node cache: shards of a remote set on the local disk, fetched once, visible only when verified.

Ranks of a node share the folder and later runs do too, because files are named by their content's hash. A shard of a
local set is read in place. Both are read by position, and the file's size and times are compared after each read:
what was cut short or altered under a running job is verified and fetched again. (Through a memory map a copy is a tenth
faster, but a file that is cut while it is being copied ends the process with SIGBUS.)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import resource
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock

from physio_dist import storage
from physio_dist.data.format.index import SAMPLE_TABLE, ShardInfo, ShardSet
from physio_dist.errors import DataError, UserError
from physio_dist.runtime.arrays import UInt8Array

log = logging.getLogger("physio_dist")

# A single rank has several shards of each lane in hand, some hundreds in a large set.
_MOST_OPEN = 8192
_KINDS = (".tar", Path(SAMPLE_TABLE).suffix)
# Longest time between updates of a file's access time, by which other ranks find the least recently used.
_TOUCH_S = 60.0
# Shards that this run does not need, but another run used within this time, are not evicted first.
_RECENT_S = 600.0
# How long a shard that did not fit is read from storage before caching it is tried again.
_REFUSED_S = 5.0

# The step that training is at, and for the hash of every shard the step at which this node needs it next.
NextUse = Callable[[], tuple[int, dict[str, int]]]
_Identity = tuple[int, int, int]
# By hash and path the files that this process has verified, so that each is hashed once however many caches open it.
_verified_files: dict[tuple[str, Path], _Identity] = {}


class Opened:
    """A verified shard, open for reading as long as it is referred to."""

    def __init__(self, fd: int, identity: _Identity) -> None:
        self._fd, self._identity = fd, identity

    def read(self, starts: Sequence[int], rows: Sequence[int], out: UInt8Array) -> bool:
        """Copy bytes into rows of ``out``, uint8 ``[row, n]``: ``n`` from each start on, into the row beside it.

        Returns:
            Whether the file was the verified one all the while; otherwise the rows hold anything.
        """
        width = out.shape[1]
        for start, row in zip(starts, rows, strict=True):
            got = os.preadv(self._fd, [out[row].data], start)
            # One read gives 2 GiB at most.
            while 0 < got < width and (more := os.preadv(self._fd, [out[row, got:].data], start + got)):
                got += more
            if got < width:
                return False
        return self.intact()

    def intact(self) -> bool:
        """True if the file is still the one that was verified, by its size and times."""
        return _identity(os.fstat(self._fd)) == self._identity

    def __del__(self) -> None:
        os.close(self._fd)


class ShardCache:
    """Opens shards, fetching remote ones.

    Args:
        folder: of the cache; made if need be.
        limit_bytes: what the cached shards may take together.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: str, limit_bytes: float) -> None:
        self.folder = Path(folder).expanduser() / "shards"
        self.limit_bytes = limit_bytes
        #: Set by a loader; without it the least recently used shard is evicted first.
        self.next_use: NextUse | None = None
        self._opened: OrderedDict[str, Opened] = OrderedDict()
        # Those of them that are files of the cache rather than of a local set.
        self._fetched: set[str] = set()
        self._touched: dict[str, float] = {}
        self._refused: dict[str, float] = {}
        self._warned = False
        self._most_open = _open_files_allowed() // 2
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.cache_dir={folder}: cannot make the folder: {error.strerror}") from None

    def held(self, shards: ShardSet, shard: int) -> bool:
        """True if :meth:`open` would find the shard without fetching it."""
        info = shards.shards[shard]
        return info.sha256 in self._opened or storage.is_local(shards.data_url) or self._path(info).exists()

    def open(self, shards: ShardSet, shard: int, ahead: bool = False) -> Opened | None:
        """A shard, fetched and verified first where needed; None if it does not fit into the cache.

        Args:
            shards, shard: which.
            ahead: it is not needed yet, and may fit later.

        Raises:
            DataError: the shard disagrees with the index, also when fetched again.
            StorageError: it cannot be read, or the cache cannot be written.
        """
        return self._open(shards.shard_url(shard), shards.shards[shard], ahead)

    def _open(self, url: str, info: ShardInfo, ahead: bool) -> Opened | None:
        with self._lock:
            if (opened := self._ready(info.sha256)) is not None:
                return opened
            lock = self._locks.setdefault(info.sha256, threading.Lock())
        with lock:
            with self._lock:
                if (opened := self._ready(info.sha256)) is not None:
                    return opened
                if time.monotonic() < self._refused.get(info.sha256, 0.0):
                    return None
            opened = self._local(url, info.sha256) if storage.is_local(url) else self._remote(url, info)
            with self._lock:
                if opened is None:
                    if ahead:
                        return None
                    if not self._warned:
                        self._warn_full()
                    self._refused[info.sha256] = time.monotonic() + _REFUSED_S
                    return None
                self._opened[info.sha256] = opened
                while len(self._opened) > self._most_open:
                    self._opened.popitem(last=False)
            return opened

    def content(self, shards: ShardSet, shard: int) -> bytearray:
        """All bytes of a shard.

        Raises:
            DataError: it disagrees with the index.
            StorageError: it cannot be read.
        """
        return self._content(shards.shard_url(shard), shards.shards[shard])

    def sample_table(self, shards: ShardSet) -> bytearray:
        """All bytes of a set's sample table, which a node fetches once like a shard. Raises as :meth:`content` does."""
        url = storage.join(shards.url, SAMPLE_TABLE)
        return self._content(url, ShardInfo(SAMPLE_TABLE, 0, storage.size(url), shards.sample_table_sha256))

    def _content(self, url: str, info: ShardInfo) -> bytearray:
        data = bytearray(info.filesize)
        for _ in range(2):
            opened = self._open(url, info, ahead=False)
            if opened is None:
                data = bytearray(storage.read_bytes(url))
                if hashlib.sha256(data).hexdigest() == info.sha256:
                    return data
            elif opened.read([0], [0], np.frombuffer(data, np.uint8)[None]):
                return data
        raise DataError(f"{url} disagrees with its index (sha256)")

    def _ready(self, sha256: str) -> Opened | None:
        opened = self._opened.get(sha256)
        if opened is None:
            return None
        if not opened.intact():
            del self._opened[sha256]
            return None
        self._opened.move_to_end(sha256)
        self._touch(sha256)
        return opened

    def _path(self, info: ShardInfo) -> Path:
        return self.folder / f"{info.sha256}{Path(info.url).suffix}"

    def _part(self, info: ShardInfo) -> Path:
        return self.folder / f"{info.sha256}.{os.getpid()}.part"

    def _touch(self, sha256: str) -> None:
        """Record on disk, now and then, that a cached file is in use."""
        now = time.monotonic()
        if sha256 in self._fetched and now - self._touched.get(sha256, -_TOUCH_S) >= _TOUCH_S:
            self._touched[sha256] = now
            path = self.folder / f"{sha256}.tar"
            with contextlib.suppress(OSError):
                os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def _verified(self, path: Path, sha256: str) -> Opened | None:
        """A file that is there; None where its content has another hash."""
        fd = os.open(path, os.O_RDONLY)
        opened = Opened(fd, _identity(os.fstat(fd)))
        if _verified_files.get((sha256, path)) != _identity(os.fstat(fd)):
            with open(fd, "rb", closefd=False) as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return None
            # What was altered while it was hashed is not what was hashed.
            if not opened.intact():
                return None
            _verified_files[sha256, path] = _identity(os.fstat(fd))
        return opened

    def _local(self, url: str, sha256: str) -> Opened:
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

    def _remote(self, url: str, info: ShardInfo) -> Opened | None:
        path = self._path(info)
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
                    if (opened := self._fetch(url, path, info)) is not None:
                        self._fetched.add(info.sha256)
                        return opened
        except _NoRoomError:
            return None
        except OSError as error:
            raise storage.to_storage_error(str(path), "use the cached shard", error) from error
        raise DataError(f"shard {url} disagrees with its index (sha256), also when fetched again")

    def _fetch(self, url: str, path: Path, info: ShardInfo) -> Opened | None:
        """Evict, fetch a shard and publish it; None if the fetched bytes have another hash."""
        self._make_room(info)
        try:
            return self._try_fetch(url, path, info)
        except _NoRoomError:
            # The disk holds less than the limit; from now on that is the limit.
            self.limit_bytes = self._used()
            self._make_room(info)
            return self._try_fetch(url, path, info)

    def _try_fetch(self, url: str, path: Path, info: ShardInfo) -> Opened | None:
        temporary = self._part(info)
        try:
            if storage.fetch(url, temporary, info.filesize) != info.sha256:
                return None
            # The renamed file is this one, by its inode.
            _verified_files[info.sha256, temporary] = _verified_files[info.sha256, path] = _identity(temporary.stat())
            opened = self._verified(temporary, info.sha256)
            temporary.replace(path)
            del _verified_files[info.sha256, temporary]
            return opened
        except storage.NotFoundError:
            raise DataError(f"shard {url} is in the index but not in storage") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _NoRoomError from error
            raise
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _entries(self) -> tuple[list[tuple[float, int, Path]], int]:
        """(time of last use, bytes, path) of every cached shard, and the bytes of those that are arriving."""
        entries, arriving = [], 0
        for path in self.folder.glob("*"):
            with contextlib.suppress(OSError):
                facts = path.stat()
                # A partial file this old was left by a killed process.
                if path.suffix == ".part" and time.time() - facts.st_mtime > 3600:
                    path.unlink()
                elif path.suffix == ".part":
                    arriving += facts.st_size
                elif path.suffix in _KINDS:
                    entries.append((facts.st_atime, facts.st_size, path))
        return entries, arriving

    def _used(self) -> int:
        entries, arriving = self._entries()
        return arriving + sum(size for _, size, _ in entries)

    def _make_room(self, info: ShardInfo) -> None:
        """Evict what is needed last until a shard fits.

        A file that another rank has open goes on being readable, and takes its place on the disk, until that rank
        evicts in its turn.

        Raises:
            _NoRoomError: what is needed before the shard leaves none.
        """
        needed = info.filesize
        with FileLock(self.folder / "room.lock"):
            entries, arriving = self._entries()
            total = arriving + sum(size for _, size, _ in entries)
            present = {path.stem for _, _, path in entries}
            if total + needed > self.limit_bytes:
                evictable = self._eviction_order(entries, info.sha256)
                if total - sum(size for size, _ in evictable) + needed > self.limit_bytes:
                    raise _NoRoomError
                for size, path in evictable:
                    with contextlib.suppress(OSError):
                        path.unlink()
                    total -= size
                    present.discard(path.stem)
                    if total + needed <= self.limit_bytes:
                        break
            # Reserves the space under the lock: partial files count by their size.
            with self._part(info).open("wb") as file:
                file.truncate(needed)
        with self._lock:
            for sha256 in [sha256 for sha256 in self._opened if sha256 in self._fetched and sha256 not in present]:
                del self._opened[sha256]
                self._fetched.discard(sha256)

    def _eviction_order(self, entries: list[tuple[float, int, Path]], incoming: str) -> list[tuple[int, Path]]:
        """Size and path of cached shards that are needed after the incoming one; the last needed comes first."""
        step, soonest = self.next_use() if self.next_use is not None else (0, {})
        deadline = soonest.get(incoming, step)
        ranked = []
        for used, size, path in entries:
            if (needed := soonest.get(path.stem)) is None:
                # Of other runs, or not of this node any more.
                recent = self.next_use is not None and time.time() - used < _RECENT_S
                ranked.append(((2 if recent else 0, used), size, path))
            elif needed > deadline:
                ranked.append(((1, -float(needed)), size, path))
        return [(size, path) for _, size, path in sorted(ranked)]

    def _warn_full(self) -> None:
        self._warned = True
        log.warning(
            "the shards in use do not fit into the node cache %s (%.3g GB; data.cache_gb or the disk's room bound): "
            "samples are read from storage one by one, which is slower; `physio-dist plan` tells how much a run needs",
            self.folder, self.limit_bytes / 1e9,
        )  # fmt: skip


class _NoRoomError(Exception):
    """A shard does not fit, on the disk or after evicting."""


def _identity(facts: os.stat_result) -> _Identity:
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def _open_files_allowed() -> int:
    """Files this process may have open, after asking for as many as the system grants without privilege."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * _MOST_OPEN if hard == resource.RLIM_INFINITY else min(2 * _MOST_OPEN, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return wanted if soft == resource.RLIM_INFINITY else min(soft, 2 * _MOST_OPEN)
