"""Storage errors: which of them are transient, and messages for those that are not."""

from __future__ import annotations

import errno

from physio_dist.errors import UserError
from physio_dist.storage.urls import WEB, endpoint, is_local, protocol, without_secrets

# Transient faults of a local disk or network file system; others (a name too long, a full disk) are permanent.
_TRANSIENT_ERRNOS = (errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ESTALE, errno.ETIMEDOUT)
# Client errors by their status for which servers ask for a retry.
_TRANSIENT_CODES = ("RequestTimeout", "IncompleteBody", "OperationAborted", "XAmzContentSHA256Mismatch")
# Client errors that a retry does not mend.
_PERMANENT = (
    "NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "NoRegionError",
    "InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError", "ClientConnectorCertificateError",
)  # fmt: skip


class StorageError(UserError):
    """A URL that cannot be read or written; the message says why and what to check."""


class NotFoundError(StorageError):
    """There is nothing at the URL."""


def refuse_secrets(url: str) -> None:
    """Refuse a URL that would carry credentials into configurations, logs and indexes.

    Raises:
        StorageError: there are some in it; the message leaves them out.
    """
    if not is_local(url) and without_secrets(url) != url:
        raise StorageError(
            f"{without_secrets(url)}: the URL carries a user name, password or query; give credentials in the "
            "environment instead (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, a profile)"
        )


def response_of(error: BaseException) -> tuple[int | None, str]:
    """The HTTP status and the S3 error code (else the server's words) behind a client's error, if there are any."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(status, int):
                return status, str(response.get("Error", {}).get("Code", ""))
        status = getattr(candidate, "status", None)
        if isinstance(status, int) and is_client_error(candidate):
            return status, str(getattr(candidate, "message", ""))
    return None, ""


def is_transient(error: BaseException) -> bool:
    """True if trying again later may succeed."""
    if isinstance(error, StorageError | FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    status, code = response_of(error)
    if status is not None:
        return (status >= 500 and status != 501) or status in (408, 429) or code in _TRANSIENT_CODES
    name = type(error).__name__
    if name in _PERMANENT:
        return False
    if is_client_error(error) or isinstance(error, ConnectionError | TimeoutError):
        return True
    if "Timeout" in name or "Connection" in name:
        return True
    # The S3 client wraps unknown faults, a reset in mid-body among them, into its own classes or a bare OSError.
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _TRANSIENT_ERRNOS
    return isinstance(error, OSError)


def is_client_error(error: BaseException | None) -> bool:
    return type(error).__module__.startswith(("botocore", "aiobotocore", "aiohttp"))


def to_storage_error(url: str, doing: str, error: BaseException) -> StorageError:
    """Translate a client's error into one message: the action, the URL and what to check."""
    status, code = response_of(error)
    name = type(error).__name__
    s3, web = protocol(url) in ("s3", "s3a"), protocol(url) in WEB
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
