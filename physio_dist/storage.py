"""Every byte to or from a URL.

A URL is a local path (``runs/x``, ``file:///runs/x``) or anything fsspec opens (``s3://bucket/key``). Writes are
atomic: a reader sees the old object or the new one, never a part. Transient faults are tried again with
exponential back-off and jitter within a bounded time; what lasts becomes one clear error.

Credentials and endpoint come from where S3 clients look for them (``AWS_ACCESS_KEY_ID``, profiles, instance roles,
``AWS_ENDPOINT_URL``); no function here takes one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import fsspec
from tenacity import RetryError, Retrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from physio_dist.errors import UserError

# Until an endpoint has answered once, silence means a wrong address, and a person is waiting at the screen.
FIRST_CONTACT_S = 15.0
# Afterwards it means an outage, which a run of days should sit out.
OUTAGE_S = float(os.environ.get("PHYSIO_DIST_STORAGE_OUTAGE_S", "300"))
_CONNECT_TIMEOUT_S = 5
_READ_TIMEOUT_S = 30

_contacted: set[str] = set()
_contacted_lock = threading.Lock()

P = ParamSpec("P")
R = TypeVar("R")


class StorageError(UserError):
    """A URL that cannot be read or written; the message says why and what to check."""


class NotFoundError(StorageError):
    """There is nothing at the URL."""


def is_local(url: str) -> bool:
    """Whether the URL names a file of this machine."""
    return "://" not in url or url.startswith(("file://", "local://"))


def local_path(url: str) -> Path:
    """The path of a local URL, with ``~`` expanded."""
    return Path(url.removeprefix("file://").removeprefix("local://")).expanduser()


def absolute(url: str) -> str:
    """The URL with a relative local path made absolute."""
    return str(local_path(url).absolute()) if is_local(url) else url.rstrip("/")


def join(url: str, *parts: str) -> str:
    """``url`` with path parts appended."""
    return "/".join([url.rstrip("/") or "/", *(part.strip("/") for part in parts if part)])


def _protocol(url: str) -> str:
    return "file" if is_local(url) else url.split("://", 1)[0]


@functools.lru_cache(maxsize=8)
def _filesystem(protocol: str, pid: int) -> Any:
    # The process id is part of the key because the S3 client's event loop does not survive a fork.
    if protocol == "file":
        return fsspec.filesystem("file")
    if protocol in ("s3", "s3a"):
        return fsspec.filesystem(
            "s3",
            use_listings_cache=False,
            config_kwargs={
                "connect_timeout": _CONNECT_TIMEOUT_S,
                "read_timeout": _READ_TIMEOUT_S,
                "retries": {"max_attempts": 1},
            },
        )
    try:
        return fsspec.filesystem(protocol)
    except (ValueError, ImportError) as error:
        raise StorageError(f"no way to open {protocol}:// URLs: {error}") from None


def _resolve(url: str) -> tuple[Any, str]:
    fs = _filesystem(_protocol(url), os.getpid())
    return fs, str(local_path(url)) if is_local(url) else fs._strip_protocol(url)


def _status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of the S3 client, if there is one."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status
    return None


def is_transient(error: BaseException) -> bool:
    """Whether trying again later may succeed."""
    if isinstance(error, StorageError | FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    status = _status_of(error)
    if status is not None:
        return status >= 500 or status in (408, 429)
    name = type(error).__name__
    if name in ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "NoRegionError"):
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENOTEMPTY):
        return False
    if isinstance(error, ConnectionError | TimeoutError) or "Timeout" in name or "Connection" in name:
        return True
    # The S3 client wraps unknown faults, a reset in mid-body among them, into OSError or its own classes.
    module = type(error).__module__
    return isinstance(error, OSError) or module.startswith(("botocore", "aiobotocore", "aiohttp"))


def _explain(url: str, doing: str, error: BaseException) -> StorageError:
    status = _status_of(error)
    name = type(error).__name__
    where = f" (endpoint {endpoint()})" if not is_local(url) and endpoint() else ""
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"cannot {doing} {url}{where}: there is nothing there")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in name:
        hint = "check the file's permissions" if is_local(url) else (
            "check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or an instance role) "
            "and what they may do"
        )
        return StorageError(f"cannot {doing} {url}{where}: access denied ({error}); {hint}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"cannot {doing} {url}: the disk is full; free some space and start again")
    if isinstance(error, IsADirectoryError | NotADirectoryError):
        return StorageError(f"cannot {doing} {url}: {error.strerror}")
    hint = "" if is_local(url) else "; check AWS_ENDPOINT_URL and that the server is up"
    return StorageError(f"cannot {doing} {url}{where}: {name}: {error}{hint}")


def endpoint() -> str | None:
    """The S3 endpoint that the environment names, for messages."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _patiently(url: str, doing: str, action: Callable[[], R]) -> R:
    """Run ``action``, trying again while faults are transient and the budget lasts."""
    protocol = _protocol(url)
    budget = OUTAGE_S if protocol in _contacted else FIRST_CONTACT_S
    try:
        for attempt in Retrying(
            retry=retry_if_exception(is_transient),
            wait=wait_exponential_jitter(initial=0.2, max=10.0, jitter=1.0),
            stop=stop_after_delay(budget),
            reraise=False,
        ):
            with attempt:
                result = action()
                with _contacted_lock:
                    _contacted.add(protocol)
        return result
    except StorageError:
        raise
    except RetryError as error:
        cause = error.last_attempt.exception()
        assert cause is not None
        raise _explain(url, doing, cause) from cause
    except Exception as error:
        if isinstance(error, OSError) or _status_of(error) is not None or "Credentials" in type(error).__name__:
            raise _explain(url, doing, error) from error
        if type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp")):
            raise _explain(url, doing, error) from error
        raise


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The object's bytes, or its half-open range ``[start, end)``.

    Raises:
        NotFoundError: there is no such object.
        StorageError: it cannot be read.
    """
    fs, path = _resolve(url)
    data: bytes = _patiently(url, "read", lambda: fs.cat_file(path, start=start, end=end))
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
    _patiently(url, "write", lambda: fs.pipe_file(path, data))


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
    _patiently(url, "write", lambda: fs.put_file(str(source), path))


def get_file(url: str, target: Path) -> None:
    """Fetch an object into a local file, which is not atomic: give a temporary name.

    Raises:
        NotFoundError: there is no such object.
        StorageError: it cannot be read, or the local disk is full.
    """
    fs, path = _resolve(url)
    _patiently(url, "fetch", lambda: fs.get_file(path, str(target)))


def exists(url: str) -> bool:
    """Whether there is an object or folder at the URL."""
    fs, path = _resolve(url)
    return bool(_patiently(url, "look for", lambda: fs.exists(path)))


def size(url: str) -> int:
    """Bytes of an object."""
    fs, path = _resolve(url)
    return int(_patiently(url, "look for", lambda: fs.info(path))["size"])


def names(url: str) -> list[str]:
    """Names in a folder, sorted; empty where there is no such folder."""
    fs, path = _resolve(url)

    def listing() -> list[str]:
        try:
            entries = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in entries} - {""})

    return _patiently(url, "list", listing)


def remove(url: str, recursive: bool = False) -> None:
    """Delete an object or, recursively, a folder; nothing there is no error."""
    fs, path = _resolve(url)

    def delete() -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm(path, recursive=recursive)

    _patiently(url, "delete", delete)


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
        raise _explain(url, "write", error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
