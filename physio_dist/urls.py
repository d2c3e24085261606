"""URLs as text: where they lie, how they are joined, what of them may be shown."""

from __future__ import annotations

import os
from pathlib import Path

WEB = ("http", "https")


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


def protocol(url: str) -> str:
    """How a URL is opened: ``file``, ``s3``, ``https``."""
    return "file" if is_local(url) else url.split("://", 1)[0]


def without_secrets(url: str) -> str:
    """A URL without user name and password, and where it is a web address without its query."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = rest.partition("/")
    if scheme in ("http", "https"):
        path = path.partition("?")[0]
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def endpoint() -> str | None:
    """The S3 endpoint that the environment names, for messages."""
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return without_secrets(named) if named else None
