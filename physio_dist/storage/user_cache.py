"""The user's cache directory, and downloads kept there."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from filelock import FileLock

from physio_dist.storage import StorageError, get_file, sha256_of, to_storage_error, write_bytes


def user_cache_dir(*parts: str) -> Path:
    """``$XDG_CACHE_HOME/physio-dist``, by default ``~/.cache/physio-dist``, or a path below it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says the XDG base directory specification.
    root = Path(base) if base.startswith("/") else Path("~/.cache").expanduser()
    return root.joinpath("physio-dist", *parts)


def read_cached(url: str, kind: str) -> bytes | None:
    """Cached content of a URL; None where nothing is cached, or it is damaged.

    The name of a kept file tells its content's hash, so that one rename publishes both.
    """
    for path in sorted(user_cache_dir(kind).glob(f"{_name(url)}-*")):
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if path.name == f"{_name(url)}-{hashlib.sha256(data).hexdigest()}":
                return data
    return None


def write_cached(url: str, kind: str, data: bytes) -> None:
    """Keep what was read from a URL; a cache that cannot be written only costs another download."""
    folder = user_cache_dir(kind)
    with contextlib.suppress(OSError, StorageError):
        name = f"{_name(url)}-{hashlib.sha256(data).hexdigest()}"
        for stale in folder.glob(f"{_name(url)}-*"):
            stale.unlink(missing_ok=True)
        write_bytes(str(folder / name), data)


def _name(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:32]


def fetch_cached(url: str, kind: str, sha256: str) -> Path | None:
    """A local copy of a remote file, fetched if need be; None where its content has another hash.

    Raises:
        StorageError: it cannot be read, or the cache cannot be written.
    """
    path = user_cache_dir(kind) / sha256
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{sha256}.lock")):
            if path.exists() and sha256_of(path) == sha256:
                return path
            temporary = path.with_name(f"{sha256}.part")
            try:
                get_file(url, temporary)
                if sha256_of(temporary) != sha256:
                    return None
                temporary.replace(path)
                return path
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise to_storage_error(str(path), "keep a download in", error) from error
