"""Pooling of features into vectors and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from physio_dist.config import POOLINGS
from physio_dist.models.fusion.pooling import make_tokens, pool


def sample(n: int = 3, channels: int = 4, patches: int = 5, d: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, channels, patches, d)).astype(np.float32)


def test_pool_matches_direct_computation() -> None:
    x = sample()
    valid = np.ones((3, 4), dtype=bool)
    valid[1, [0, 2]] = False
    mean, std = x.mean(2), x.std(2)
    both = np.concatenate([mean, std], axis=2)
    for kind, each in (("mean", mean), ("mean_std", both)):
        wanted = np.stack([each[i][valid[i]].mean(0) for i in range(3)])
        np.testing.assert_allclose(pool(x, valid, kind).numpy(), wanted, rtol=1e-5, atol=1e-6)
        apart = np.where(valid[:, :, None], each, 0.0).reshape(3, -1)
        np.testing.assert_allclose(
            pool(torch.from_numpy(x), valid, f"channels_{kind}").numpy(), apart, rtol=1e-5, atol=1e-6
        )
    assert {tuple(pool(x, valid, kind).shape) for kind in POOLINGS} == {(3, 2), (3, 4), (3, 8), (3, 16)}


@pytest.mark.parametrize("kind", POOLINGS)
def test_pool_ignores_content_of_invalid_channels(kind: str) -> None:
    x, valid = sample(), np.ones((3, 4), dtype=bool)
    valid[0, 1] = valid[2] = False
    broken = x.copy()
    broken[~valid] = np.inf
    broken[0, 1, 0] = np.nan
    assert torch.equal(pool(broken, valid, kind), pool(x, valid, kind))
    assert not pool(broken, valid, kind)[2].any()


def test_pool_of_one_patch_has_zero_std_and_unknown_kind_raises() -> None:
    assert not pool(sample(patches=1), np.ones((3, 4), dtype=bool), "mean_std")[:, 2:].any()
    with pytest.raises(ValueError, match="median"):
        pool(sample(), np.ones((3, 4), dtype=bool), "median")


def test_make_tokens_matches_direct_computation() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4, 5, 2)).astype(np.float32)
    valid = np.ones((3, 4), dtype=bool)
    valid[1, [0, 2]] = False
    valid[2] = False
    x[~valid] = np.inf
    patches, available = make_tokens(x, valid, "attention")
    assert patches.shape == (3, 5, 2) and available.tolist() == [[True] * 5, [True] * 5, [False] * 5]
    np.testing.assert_allclose(patches[0].numpy(), x[0].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(patches[1].numpy(), x[1, [1, 3]].mean(0), rtol=1e-5, atol=1e-6)
    assert not patches[2].any()
    channels, available = make_tokens(x, valid, "channels_attention")
    assert np.array_equal(available.numpy(), valid)
    np.testing.assert_allclose(channels.numpy()[valid], x.mean(2)[valid], rtol=1e-5, atol=1e-6)
    assert not channels[~available].any()
    for kind in POOLINGS:
        vector, available = make_tokens(x, valid, kind)
        assert torch.equal(vector, pool(x, valid, kind)) and available.tolist() == [[True], [True], [False]]
