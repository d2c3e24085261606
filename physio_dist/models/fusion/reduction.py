"""Reduction of features to their principal components (PCA), fitted on training rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.linalg import eigh
from torch import Tensor

from physio_dist.runtime.arrays import Float32Array


@dataclass(frozen=True)
class Reduction:
    """Standardization and principal axes of one modality's features, computed from a head's training rows only.

    Plain arrays, so that processes can share them.

    Attributes:
        mean, scale: float32 ``[f]``; a feature minus its mean, times its scale, has standard deviation 1 there.
        axes: float32 ``[f, k]``, principal axes of the features so standardised, the strongest first.
        strength: float32 ``[k]``, variance along each.
    """

    mean: Float32Array
    scale: Float32Array
    axes: Float32Array
    strength: Float32Array


def fit_reduction(rows: Float32Array, max_components: int) -> Reduction:
    """Statistics and the first ``max_components`` principal axes of ``rows`` ``[row, f]``.

    A feature that is constant in them is only centred.
    """
    # In float64: float32 would lose the spread of features that are far from zero.
    std, mean = torch.std_mean(torch.from_numpy(rows).double(), dim=0, correction=0)
    scale = torch.where(std <= 1e-6 * mean.abs(), 1.0, 1.0 / std).nan_to_num(1.0, 1.0, 1.0)
    z = ((torch.from_numpy(rows) - mean) * scale).float()
    n, f = z.shape
    k = min(max_components, f)
    if n >= f:
        strength, axes = _leading(z.T @ z, k)
        strength, axes = strength / n, axes.float()
    else:
        # Fewer rows than features: the same axes from the rows' products (Turk and Pentland 1991).
        strength, along = _leading(z @ z.T, min(k, n))
        strength = strength / n
        axes = z.T @ along.float() / (n * strength.clamp_min(1e-9)).sqrt().float()
        axes = torch.where(strength.float() > 1e-6 * strength.max().float(), axes, 0.0)
    strength, axes = strength.flip(0)[:k].clamp_min(0.0), axes.flip(1)[:, :k]
    if axes.shape[1] < k:
        axes, strength = F.pad(axes, (0, k - axes.shape[1])), F.pad(strength, (0, k - len(strength)))
    # An axis has no direction of its own: its largest entry is made positive.
    sign = axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    parts = (mean, scale, axes * torch.where(sign == 0, 1.0, sign), strength)
    return Reduction(*(part.float().contiguous().numpy() for part in parts))


def _leading(products: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest eigenvalues, ascending, and their vectors; float64. A third of the time of all of them."""
    size = len(products)
    values, vectors = eigh(products.double().numpy(), subset_by_index=[size - k, size - 1], overwrite_a=True)
    return torch.from_numpy(values), torch.from_numpy(vectors)
