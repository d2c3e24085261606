"""Path rules for drivers started by ``ray job submit``.

Ray deletes a job's working directory when the job ends, so outputs need absolute or remote paths.
"""

from __future__ import annotations

import os

from physio_dist import storage
from physio_dist.errors import UserError

# Set by Ray for the driver of a submitted job.
_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"


def inside_ray_job() -> bool:
    """True if this process is the driver of a submitted job."""
    return _JOB in os.environ


def require_durable(url: str, option: str) -> str:
    """Refuse a URL that would not outlast a Ray job.

    Returns:
        The URL unchanged.

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
    """Make a relative local path absolute.

    Raises:
        UserError, StorageError: as :func:`require_durable`.
    """
    return storage.absolute(require_durable(url, option))
