"""URLs as text: joining, resolving, and removing credentials."""

from __future__ import annotations

import os
import posixpath
from pathlib import Path

WEB = ("http", "https")


def is_local(url: str) -> bool:
    """True if the URL names a file of this machine."""
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


def pointer(url: str, start: str) -> str:
    """Reference to ``url`` from a document in the folder ``start``: relative within a machine or bucket, else absolute.

    So both can be moved together. Links on the way are followed first, for ``..`` goes up from where a link leads.
    """
    if is_local(url) and is_local(start):
        return posixpath.relpath(local_path(url).resolve(), local_path(start).resolve())
    (root, path), (other, folder) = _rooted(url), _rooted(start)
    return posixpath.relpath(path, folder) if root == other and not is_local(url) else absolute(url)


def pointed(pointer: str, start: str) -> str | None:
    """The URL that a document in the folder ``start`` names; None for what it has no business to name.

    That is a file of the machine that reads it, named by a document from elsewhere or by its place on the machine; and
    anything that is reached in another way than the document itself.
    """
    if "://" in pointer:
        reached = not is_local(pointer) and (is_local(start) or protocol(pointer) == protocol(start))
        return pointer.rstrip("/") if reached else None
    if not pointer or pointer.startswith("/"):
        return None
    if is_local(start):
        return posixpath.normpath(posixpath.join(local_path(start).resolve(), pointer))
    root, folder = _rooted(start)
    return root + posixpath.normpath(posixpath.join(folder, pointer)).rstrip("/")


def _rooted(url: str) -> tuple[str, str]:
    """A remote URL as its bucket or host, and the path from there."""
    scheme, _, rest = url.partition("://")
    host, _, path = rest.partition("/")
    return f"{scheme}://{host}", posixpath.normpath(f"/{path.strip('/')}")


def protocol(url: str) -> str:
    """Protocol of a URL: ``file``, ``s3``, ``https``."""
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
