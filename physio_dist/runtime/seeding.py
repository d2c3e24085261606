"""Random numbers as functions of a purpose, such as ``("dropout", seed, step)``: independent of what was drawn before.

The same purpose gives the same numbers on every machine and in every release of NumPy and PyTorch whose generators
keep their specification. Words of a purpose are joined with slashes and hashed with BLAKE2b.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Literal

import numpy as np

from physio_dist.runtime.arrays import Int64Array

if TYPE_CHECKING:
    import torch


def _digest(purpose: tuple[object, ...], size: int) -> bytes:
    return hashlib.blake2b("/".join(map(str, purpose)).encode(), digest_size=size).digest()


def seed_of(*purpose: object, byteorder: Literal["big", "little"] = "big") -> int:
    """64-bit seed.

    Args:
        purpose: what the numbers are for.
        byteorder: how the digest is read. Masks, dropout and initial weights are little-endian; changing that would
            change what a given seed draws.
    """
    return int.from_bytes(_digest(purpose, 8), byteorder)


def rng(*purpose: object) -> np.random.Generator:
    """NumPy generator of a purpose."""
    return np.random.Generator(np.random.SFC64(seed_of(*purpose) >> 1))


def permutation(n: int, *purpose: str | int) -> Int64Array:
    """Permutation of ``range(n)``, int64 ``[n]``.

    Philox's raw bits are fixed by its specification, and sorting them keeps the result apart from NumPy's own
    shuffling, which may change between releases.
    """
    key = np.frombuffer(_digest(purpose, 16), dtype="<u8").astype(np.uint64)
    bits = np.random.Philox(key=key).random_raw(n)
    return np.argsort(bits, kind="stable").astype(np.int64)


def torch_generator(*purpose: object) -> torch.Generator:
    """PyTorch CPU generator of a purpose."""
    import torch

    return torch.Generator().manual_seed(seed_of(*purpose) >> 1)


def seed_torch(*purpose: object) -> None:
    """Seed PyTorch's default generators of all devices, from which layers draw initial weights and dropout."""
    import torch

    torch.manual_seed(seed_of(*purpose, byteorder="little") >> 1)
