"""Every byte to or from a URL.

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
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import fsspec
from tenacity import Retrying, retry_if_exception, stop_before_delay, wait_exponential, wait_random

from physio_dist.errors import UserError

# Until an endpoint has answered once, silence means a wrong address, and a person is waiting at the screen.
FIRST_CONTACT_S = float(os.environ.get("PHYSIO_DIST_STORAGE_FIRST_CONTACT_S", "15"))
# Afterwards it means an outage, which a run of days should sit out.
OUTAGE_S = float(os.environ.get("PHYSIO_DIST_STORAGE_OUTAGE_S", "300"))
_CONNECT_TIMEOUT_S = 5
_READ_TIMEOUT_S = 30
# Faults of a local disk or network file system that may pass; all others (a name too long, a full disk) stay.
_PASSING = (errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT)
# Client errors by their status, yet a second try is what servers ask for.
_PASSING_CODES = ("RequestTimeout", "IncompleteBody", "OperationAborted", "XAmzContentSHA256Mismatch")

_WEB = ("http", "https")
# Errors of clients that a second try does not mend.
_LASTING = (
    "NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "NoRegionError",
    "InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError", "ClientConnectorCertificateError",
)  # fmt: skip

# Protocols (web servers) whose endpoint has answered; a process that starts others passes it on.
contacted: set[str] = set()

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
    folder = url.rstrip("/")
    words = [part.strip("/") for part in parts if part]
    if not folder:
        return ("/" if url else "") + "/".join(words)
    return "/".join([folder, *words])


def _protocol(url: str) -> str:
    return "file" if is_local(url) else url.split("://", 1)[0]


@functools.lru_cache(maxsize=8)
def _filesystem(protocol: str, pid: int) -> Any:
    # The process id is part of the key because the S3 client's event loop does not survive a fork.
    if protocol == "file":
        return fsspec.filesystem("file")
    if protocol in ("s3", "s3a"):
        fs = fsspec.filesystem(
            "s3",
            skip_instance_cache=True,
            use_listings_cache=False,
            config_kwargs={
                "connect_timeout": _CONNECT_TIMEOUT_S,
                "read_timeout": _READ_TIMEOUT_S,
                "retries": {"total_max_attempts": 1},
                # Servers that send a whole object's checksum with a part of it would fail every ranged read;
                # shards and checkpoints carry hashes of our own.
                "response_checksum_validation": "when_required",
                "request_checksum_calculation": "when_required",
            },
        )
        # One place counts the tries: `_patiently`.
        fs.retries = 1
        return fs
    if protocol in _WEB:
        import aiohttp

        # Its own limit is five minutes for a whole file, however fast it comes.
        limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S, sock_read=_READ_TIMEOUT_S)
        client = {"timeout": limits, "trust_env": True}
        return fsspec.filesystem(protocol, skip_instance_cache=True, use_listings_cache=False, client_kwargs=client)
    try:
        return fsspec.filesystem(protocol)
    except (ValueError, ImportError) as error:
        raise StorageError(f"no way to open {protocol}:// URLs: {error}") from None


def _resolve(url: str) -> tuple[Any, str]:
    if not is_local(url) and without_secrets(url) != url:
        # It would be written down in configurations, logs and indexes.
        raise StorageError(
            f"{without_secrets(url)}: the URL carries a user name, password or query; give credentials in the "
            "environment instead (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, a profile)"
        )
    fs = _filesystem(_protocol(url), os.getpid())
    return fs, str(local_path(url)) if is_local(url) else fs._strip_protocol(url)


resolve = _resolve


def _answer(error: BaseException) -> tuple[int | None, str]:
    """The HTTP status and the S3 error code (else the server's words) behind a client's error, if there are any."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status, str(response.get("Error", {}).get("Code", ""))
        status = getattr(candidate, "status", None)
        if isinstance(status, int) and _of_client(candidate):
            return status, str(getattr(candidate, "message", ""))
    return None, ""


def is_transient(error: BaseException) -> bool:
    """Whether trying again later may succeed."""
    if isinstance(error, StorageError | FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    status, code = _answer(error)
    if status is not None:
        return (status >= 500 and status != 501) or status in (408, 429) or code in _PASSING_CODES
    name = type(error).__name__
    if name in _LASTING:
        return False
    if _of_client(error) or isinstance(error, ConnectionError | TimeoutError):
        return True
    if "Timeout" in name or "Connection" in name:
        return True
    # The S3 client wraps unknown faults, a reset in mid-body among them, into its own classes or a bare OSError.
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    return isinstance(error, OSError)


def _of_client(error: BaseException | None) -> bool:
    return type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp"))


def explain(url: str, doing: str, error: BaseException) -> StorageError:
    """What happened, on which URL, and what to check, as an error a person can read."""
    status, code = _answer(error)
    name = type(error).__name__
    s3, web = _protocol(url) in ("s3", "s3a"), _protocol(url) in _WEB
    where = f" (endpoint {endpoint()})" if s3 and endpoint() else ""
    if code == "NoSuchBucket" or (isinstance(error, FileNotFoundError) and doing == "write" and s3):
        bucket = url.split("://", 1)[1].split("/", 1)[0]
        return NotFoundError(f"cannot {doing} {url}{where}: there is no bucket {bucket!r}; create it or change the URL")
    if isinstance(error, FileNotFoundError) and doing == "write":
        return StorageError(f"cannot write {url}: its folder cannot be made")
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"cannot {doing} {url}{where}: there is nothing there")
    if isinstance(error, PermissionError) or status in (401, 403) or "Credentials" in name:
        hint = (
            "check the credentials (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or an instance role) "
            "and what they may do"
        )
        if is_local(url):
            hint = "check the file's permissions"
        elif web:
            error, hint = OSError(f"{status} {code}"), "over http only what is open to everybody can be read"
        return StorageError(f"cannot {doing} {url}{where}: access denied ({error}); {hint}")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"cannot {doing} {url}: the disk is full; free some space and start again")
    if is_local(url) and isinstance(error, OSError) and error.strerror:
        return StorageError(f"cannot {doing} {url}: {error.strerror}")
    if web and status is not None:
        # Not the error's own text: it tells the address that a redirection led to, signature and all.
        return StorageError(f"cannot {doing} {url}: the server answers {status} {code}")
    hint = "; check AWS_ENDPOINT_URL and that the server is up" if s3 else ""
    hint = "; check the address and that the server is up" if web else hint
    return StorageError(f"cannot {doing} {url}{where}: {name}: {error}{hint}")


def endpoint() -> str | None:
    """The S3 endpoint that the environment names, for messages."""
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return without_secrets(named) if named else None


def without_secrets(url: str) -> str:
    """A URL without user name and password, and where it is a web address without its query."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = rest.partition("/")
    if scheme in ("http", "https"):
        path = path.partition("?")[0]
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def _patiently(url: str, doing: str, action: Callable[[], R]) -> R:
    """Run ``action``, trying again while faults are transient and the budget lasts."""
    protocol = _protocol(url)
    # The web is many servers: that one has answered says nothing of another.
    peer = "/".join(url.split("/", 3)[:3]) if protocol in _WEB else protocol
    budget = OUTAGE_S if peer in contacted else FIRST_CONTACT_S
    try:
        result = Retrying(
            retry=retry_if_exception(is_transient),
            wait=wait_exponential(multiplier=0.2, max=10.0) + wait_random(0, 1),
            stop=stop_before_delay(budget),
            reraise=True,
        )(action)
    except Exception as error:
        if _answer(error)[0] is not None or isinstance(error, FileNotFoundError):
            contacted.add(peer)
        # The client calls a malformed endpoint a ValueError.
        if isinstance(error, OSError) or _of_client(error) or (isinstance(error, ValueError) and not is_local(url)):
            raise explain(url, doing, error) from error
        raise
    contacted.add(peer)
    return result


def read_bytes(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """The object's bytes, or its half-open range ``[start, end)``.

    Raises:
        NotFoundError: there is no such object.
        StorageError: it cannot be read.
    """
    fs, path = _resolve(url)
    if _protocol(url) in _WEB:
        # A server may answer a request for a part with the whole, and the client does not tell which it was.
        whole: bytes = _patiently(url, "read", lambda: fs.cat_file(path))
        return whole[start:end]
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
    _patiently(url, f"fetch to {target} from", lambda: fs.get_file(path, str(target)))


def exists(url: str) -> bool:
    """Whether there is an object or folder at the URL."""
    fs, path = _resolve(url)
    # Unless told to be strict, the client takes a web server that does not answer for one that has not got it.
    options = {"strict": True} if _protocol(url) in _WEB else {}
    return bool(_patiently(url, "look for", lambda: fs.exists(path, **options)))


def size(url: str) -> int:
    """Bytes of an object."""
    fs, path = _resolve(url)
    return int(_patiently(url, "look for", lambda: fs.info(path))["size"])


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
            if _answer(error)[1] == "NoSuchBucket":
                raise
            return []
        # A file lists itself, and so does a folder that is an empty object.
        own = str(fs._strip_protocol(path)).rstrip("/")
        return sorted({entry.rsplit("/", 1)[-1] for entry in entries if entry != own})

    return _patiently(url, "list", listing)


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
        raise explain(url, "write", error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
