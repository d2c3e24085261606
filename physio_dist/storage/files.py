"""Reads and writes by URL.

A URL is a local path (``runs/x``, ``file:///runs/x``) or anything fsspec opens (``s3://bucket/key``; ``https://``, to
read). Writes are atomic: a reader sees the old object or the new one, never a part. Transient faults are tried again
with exponential back-off and jitter within a bounded time; what lasts becomes one clear error.

Credentials and endpoint come from where S3 clients look for them (``AWS_ACCESS_KEY_ID``, profiles, instance roles,
``AWS_ENDPOINT_URL``); no function here takes one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import fsspec
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_exponential, wait_random

from physio_dist.storage.errors import (
    StorageError,
    is_client_error,
    is_transient,
    refuse_secrets,
    response_of,
    to_storage_error,
)
from physio_dist.storage.urls import WEB, is_local, local_path, protocol

log = logging.getLogger("physio_dist")

# Until an endpoint has answered once, silence means a wrong address, and a person is waiting at the screen.
FIRST_CONTACT_S = float(os.environ.get("PHYSIO_DIST_STORAGE_FIRST_CONTACT_S", "15"))
# Afterwards it means an outage, which a run of days should sit out.
OUTAGE_S = float(os.environ.get("PHYSIO_DIST_STORAGE_OUTAGE_S", "300"))
_CONNECT_TIMEOUT_S = 5
_READ_TIMEOUT_S = 30
# A shard is fetched in pieces of this size, so many at a time: one connection to an object store is slow.
PIECE = 4 << 20
_AT_ONCE = 4

_CLIENT_OPTIONS: dict[str, Any] = {
    "connect_timeout": _CONNECT_TIMEOUT_S,
    "read_timeout": _READ_TIMEOUT_S,
    "max_pool_connections": 64,
    # One place counts the tries: `_with_retry`.
    "retries": {"total_max_attempts": 1},
    # Servers that send a whole object's checksum with a part of it would fail every ranged read; shards and checkpoints
    # carry hashes of our own.
    "response_checksum_validation": "when_required",
    "request_checksum_calculation": "when_required",
}

# Protocols (web servers) whose endpoint has answered; a process that starts others passes it on.
reachable_hosts: set[str] = set()

P = ParamSpec("P")
R = TypeVar("R")


@functools.lru_cache(maxsize=8)
def _filesystem(scheme: str, pid: int) -> Any:
    # The process id is part of the key because the S3 client's event loop does not survive a fork.
    if scheme == "file":
        return fsspec.filesystem("file")
    if scheme in ("s3", "s3a"):
        fs = fsspec.filesystem("s3", skip_instance_cache=True, use_listings_cache=False, config_kwargs=_CLIENT_OPTIONS)
        # One place counts the tries: `_with_retry`.
        fs.retries = 1
        return fs
    if scheme in WEB:
        import aiohttp

        # Its own limit is five minutes for a whole file, however fast it comes.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S)
        client = {"timeout": limits, "trust_env": True}
        return fsspec.filesystem(scheme, skip_instance_cache=True, use_listings_cache=False, client_kwargs=client)
    try:
        return fsspec.filesystem(scheme)
    except (ValueError, ImportError) as error:
        raise StorageError(f"no way to open {scheme}:// URLs: {error}") from None


def forget_clients() -> None:
    """Make clients anew at their next use, with what the environment says by then."""
    _filesystem.cache_clear()
    _ranges_client.cache_clear()


@functools.lru_cache(maxsize=2)
def _ranges_client(pid: int) -> Any:
    """A plain S3 client for large reads by threads: fsspec's sends every byte through one event loop."""
    import botocore.session
    from botocore.config import Config

    return botocore.session.get_session().create_client("s3", config=Config(**_CLIENT_OPTIONS))


def _read_range(fs: Any, path: str, start: int, end: int) -> bytes:
    """A half-open range of an object, shorter where the object ends."""
    if "s3" not in fs.protocol:
        data: bytes = fs.cat_file(path, start=start, end=end)
        return data
    bucket, _, key = path.partition("/")
    try:
        answer = _ranges_client(os.getpid()).get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")
    except Exception as error:
        # What fsspec's client calls it.
        if response_of(error)[1] in ("NoSuchKey", "404"):
            raise FileNotFoundError(path) from error
        raise
    with contextlib.closing(answer["Body"]) as body:
        # Whole, and checked against the promised length, an answer that ends early being an error that may pass.
        whole: bytes = body.read()
    return whole


def _resolve(url: str) -> tuple[Any, str]:
    refuse_secrets(url)
    fs = _filesystem(protocol(url), os.getpid())
    return fs, str(local_path(url)) if is_local(url) else fs._strip_protocol(url)


resolve = _resolve


def _log_outage(url: str, doing: str, budget: float, state: RetryCallState) -> None:
    """Log an outage, once the first retries have failed."""
    if state.attempt_number == 4 and state.outcome is not None:
        why = to_storage_error(url, doing, state.outcome.exception() or OSError())
        log.warning("%s; trying again for up to %.0f s", why, budget)


def _with_retry(url: str, doing: str, action: Callable[[], R]) -> R:
    """Run ``action``, trying again while faults are transient and the budget lasts."""
    scheme = protocol(url)
    # The web is many servers: that one has answered says nothing of another.
    peer = "/".join(url.split("/", 3)[:3]) if scheme in WEB else scheme
    budget = OUTAGE_S if peer in reachable_hosts else FIRST_CONTACT_S
    backoff = wait_exponential(multiplier=0.2, max=10.0) + wait_random(0, 1)

    def wait(state: RetryCallState) -> float:
        # The last try is when the budget ends, so that ranks that wait for the same server give up at the same time.
        return min(backoff(state), max(budget - (state.seconds_since_start or 0.0), 0.0))

    try:
        result = Retrying(
            retry=retry_if_exception(is_transient),
            before_sleep=lambda state: _log_outage(url, doing, budget, state),
            wait=wait,
            stop=stop_after_delay(budget),
            reraise=True,
        )(action)
    except Exception as error:
        if response_of(error)[0] is not None or isinstance(error, FileNotFoundError):
            reachable_hosts.add(peer)
        # The client calls a malformed endpoint a ValueError.
        if (
            isinstance(error, OSError)
            or is_client_error(error)
            or (isinstance(error, ValueError) and not is_local(url))
        ):
            raise to_storage_error(url, doing, error) from error
        raise
    reachable_hosts.add(peer)
    return result


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The object's bytes, or its half-open range ``[start, end)``.

    Raises:
        NotFoundError: there is no such object.
        StorageError: it cannot be read.
    """
    fs, path = _resolve(url)
    if protocol(url) in WEB:
        # A server may answer a request for a part with the whole, and the client does not tell which it was.
        whole: bytes = _with_retry(url, "read", lambda: fs.cat_file(path))
        return whole[start:end]
    data: bytes = _with_retry(url, "read", lambda: fs.cat_file(path, start=start, end=end))
    return data


def read_json(url: str) -> Any:
    """A JSON document.

    Raises:
        StorageError: it cannot be read or is not JSON.
    """
    try:
        return json.loads(read_bytes(url))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StorageError(f"{url} is not a JSON document: {error}") from None


def write_bytes(url: str, data: bytes) -> None:
    """Publish an object whole, replacing what was there.

    Raises:
        StorageError: it cannot be written; what was there before is untouched.
    """
    if is_local(url):
        with _publishing(url) as temporary, temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        return
    fs, path = _resolve(url)
    _with_retry(url, "write", lambda: fs.pipe_file(path, data))


def write_json(url: str, document: Any) -> None:
    """Publish a JSON document (sorted keys, so that equal documents have equal bytes)."""
    write_bytes(url, (json.dumps(document, indent=1, sort_keys=True) + "\n").encode())


def put_file(source: Path, url: str) -> None:
    """Publish a local file's contents whole.

    Raises:
        StorageError: it cannot be written.
    """
    if is_local(url):
        with _publishing(url) as temporary, temporary.open("wb") as file, source.open("rb") as original:
            while piece := original.read(1 << 22):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        return
    fs, path = _resolve(url)
    _with_retry(url, "write", lambda: fs.put_file(str(source), path))


def get_file(url: str, target: Path) -> None:
    """Fetch an object into a local file, which is not atomic: give a temporary name.

    Raises:
        NotFoundError: there is no such object.
        StorageError: it cannot be read, or the local disk is full.
    """
    fs, path = _resolve(url)
    _with_retry(url, f"fetch to {target} from", lambda: fs.get_file(path, str(target)))


def fetch(url: str, target: Path, nbytes: int) -> str:
    """Fetch an object of ``nbytes`` bytes into a local file in ranges, several at a time.

    The file is not written atomically: give a temporary name. What it holds already is written over.

    Returns:
        sha256 (hex) of what came. An object of another length gives another hash, not an error.

    Raises:
        NotFoundError: there is no such object.
        StorageError: it cannot be read, or the local disk is full.
    """
    if protocol(url) in WEB:  # A plain web server sends the whole, whatever part is asked for.
        get_file(url, target)
        with target.open("rb") as whole:
            return hashlib.file_digest(whole, "sha256").hexdigest()
    fs, path = _resolve(url)
    doing, digest = f"fetch to {target} from", hashlib.sha256()

    def piece(start: int) -> bytes:
        end = min(start + PIECE, nbytes)
        try:
            return _with_retry(url, doing, lambda: _read_range(fs, path, start, end))
        except StorageError as error:
            # The object ends before the range begins.
            if response_of(error.__cause__ or error)[0] == 416:
                return b""
            raise

    opened = os.open(target, os.O_WRONLY | os.O_CREAT, 0o644)
    with os.fdopen(opened, "wb") as file, ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="range") as pool:
        if nbytes:
            # A full disk is met before the download, not at its end.
            with _ignoring_unsupported():
                os.posix_fallocate(file.fileno(), 0, nbytes)
        for data in _map_ahead(pool, piece, range(0, nbytes, PIECE)):
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def _map_ahead(pool: ThreadPoolExecutor, read: Callable[[int], bytes], starts: Iterable[int]) -> Iterator[bytes]:
    """Results in order, with at most ``_AT_ONCE`` reads under way or waiting to be taken."""
    pending: deque[Future[bytes]] = deque()
    try:
        for start in starts:
            if len(pending) >= _AT_ONCE:
                yield pending.popleft().result()
            pending.append(pool.submit(read, start))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


@contextlib.contextmanager
def _ignoring_unsupported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise


def exists(url: str) -> bool:
    """True if there is an object or folder at the URL."""
    fs, path = _resolve(url)
    # Unless told to be strict, the client takes a web server that does not answer for one that has not got it.
    options = {"strict": True} if protocol(url) in WEB else {}
    return bool(_with_retry(url, "look for", lambda: fs.exists(path, **options)))


def size(url: str) -> int:
    """Bytes of an object."""
    fs, path = _resolve(url)
    return int(_with_retry(url, "look for", lambda: fs.info(path))["size"])


def names(url: str) -> list[str]:
    """Names in a folder, sorted; empty where there is no such folder.

    Raises:
        StorageError: it cannot be listed, or there is not even a bucket.
    """
    fs, path = _resolve(url)

    def listing() -> list[str]:
        try:
            entries = [str(entry).rstrip("/") for entry in fs.ls(path, detail=False)]
        except (FileNotFoundError, NotADirectoryError) as error:
            if response_of(error)[1] == "NoSuchBucket":
                raise
            return []
        # A file lists itself, and so does a folder that is an empty object.
        own = str(fs._strip_protocol(path)).rstrip("/")
        return sorted({entry.rsplit("/", 1)[-1] for entry in entries if entry != own})

    return _with_retry(url, "list", listing)


def remove(url: str, recursive: bool = False) -> None:
    """Delete an object or, recursively, a folder; nothing there is no error."""
    fs, path = _resolve(url)

    def delete() -> None:
        with contextlib.suppress(FileNotFoundError):
            if is_local(url):
                fs.rm(path, recursive=recursive)
            else:
                # Not `fs.rm`, which takes a name with `*` or `[` for a pattern.
                for name in fs.find(path) if recursive else [path]:
                    fs.rm_file(name)

    _with_retry(url, "delete", delete)


@contextlib.contextmanager
def _publishing(url: str) -> Iterator[Path]:
    """A temporary file beside a local target, renamed onto it when the block ends well."""
    target = local_path(url)
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise to_storage_error(url, "write", error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sha256_of(path: Path) -> str:
    """sha256 of a file, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
