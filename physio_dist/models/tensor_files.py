"""Files of tensors: reading safetensors, and comparing tensors with the shapes that a module expects."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import safetensors
import safetensors.torch
from torch import Tensor

from physio_dist import storage
from physio_dist.errors import DataError, UserError

Read = Callable[[str], bytes]
"""From a URL to the bytes behind it; raises ``StorageError`` if it cannot be read."""

_MAX_DIFFERENCES = 8


def read_file(url: str, read: Read, advice: str) -> bytes:
    """The bytes of a file that the user named.

    Raises:
        UserError: it cannot be read; ends with ``advice``.
    """
    try:
        return read(url)
    except storage.StorageError as error:
        raise UserError(f"{error}; {advice}") from error


def parse_safetensors(data: bytes, url: str) -> dict[str, Tensor]:
    """The tensors in a safetensors file.

    Raises:
        DataError: the file is damaged; names ``url``.
    """
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise DataError(f"{url}: not a whole safetensors file ({error})") from error


def shape_differences(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> list[str]:
    """Missing, unknown and wrongly shaped tensors of ``state``, at most eight descriptions and a count of the rest."""
    differences = [f"{name} is missing" for name in expected if name not in state]
    differences += [f"{name} is unknown" for name in state if name not in expected]
    differences += [
        f"{name} is {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    if len(differences) <= _MAX_DIFFERENCES:
        return differences
    return [*differences[:_MAX_DIFFERENCES], f"and {len(differences) - _MAX_DIFFERENCES} more"]
