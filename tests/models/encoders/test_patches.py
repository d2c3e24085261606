"""Stored signals to patches: the exact float32 values of int16 times microvolts per bit over the unit."""

from __future__ import annotations

import numpy as np
import torch

from physio_dist.models.encoders.criss_cross import PATCH
from physio_dist.models.encoders.patches import to_patches


def test_to_patches_scales_and_cuts_without_changing_the_signal() -> None:
    rng = np.random.default_rng(0)
    signal = rng.integers(-32767, 32768, (3, 2, 4 * PATCH)).astype(np.int16)
    scale = np.array([1.0, 0.1, 2.5], dtype=np.float32)
    before = signal.copy()
    x = to_patches(torch.from_numpy(signal), torch.from_numpy(scale))
    expected = signal.astype(np.float32) * (scale / np.float32(100.0))[:, None, None]
    assert x.dtype == torch.float32
    np.testing.assert_array_equal(x.numpy(), expected.reshape(3, 2, 4, PATCH))
    np.testing.assert_array_equal(signal, before)


def test_to_patches_takes_the_unit_of_the_encoder() -> None:
    x = to_patches(torch.full((1, 1, PATCH), 300, dtype=torch.int16), torch.tensor([0.5]), unit_uv=50.0)
    assert x.shape == (1, 1, 1, PATCH)
    assert bool((x == 3.0).all())
