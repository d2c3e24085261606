"""What is different for the driver of a job that ``ray job submit`` started: its working directory goes with it."""

from __future__ import annotations

import os

from physio_dist import storage
from physio_dist.errors import UserError

# Ray's own name for what it tells the driver of a submitted job.
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def inside_ray_job() -> bool:
    """Whether this process is the driver of a submitted job."""
    return _JOB in os.environ


def require_durable(url: str, option: str) -> str:
    """The URL as it is, for what is written there to outlast a job.

    Raises:
        UserError: it is relative inside a Ray job, whose working directory is deleted with the job.
        StorageError: it carries credentials, which would be written down.
    """
    storage.refuse_secrets(url)
    if inside_ray_job() and storage.is_local(url) and not storage.local_path(url).is_absolute():
        raise UserError(
            f"{option}={url} is relative, and a Ray job's working directory vanishes with the job: give an absolute "
            f"path that all nodes share, or an s3:// URL"
        )
    return url


def resolve_durable(url: str, option: str) -> str:
    """The URL with a relative local path made absolute.

    Raises:
        UserError, StorageError: as :func:`outlasting`.
    """
    return storage.absolute(require_durable(url, option))
