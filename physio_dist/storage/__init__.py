"""Every byte to or from a URL: URLs as text, errors, and files, local or remote."""

from physio_dist.storage.errors import NotFoundError, StorageError, explain, is_transient, refuse_secrets
from physio_dist.storage.files import (
    PIECE,
    contacted,
    exists,
    fetch,
    forget_clients,
    get_file,
    names,
    put_file,
    read_bytes,
    read_json,
    remove,
    resolve,
    sha256_of,
    size,
    write_bytes,
    write_json,
)
from physio_dist.storage.urls import absolute, endpoint, is_local, join, local_path, pointed, pointer, without_secrets

__all__ = [
    "PIECE", "NotFoundError", "StorageError", "absolute", "contacted", "endpoint", "exists", "explain", "fetch",
    "forget_clients", "get_file", "is_local", "is_transient", "join", "local_path", "names", "pointed", "pointer",
    "put_file", "read_bytes", "read_json", "refuse_secrets", "remove", "resolve", "sha256_of", "size",
    "without_secrets", "write_bytes", "write_json",
]  # fmt: skip
