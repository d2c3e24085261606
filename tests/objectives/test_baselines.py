"""Ridge regression across leads against scikit-learn's, and what it may see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression

from physio_dist.objectives.baselines import fit_lead_ridge


def waves(n: int = 6, channels: int = 4, time: int = 400, seed: int = 0) -> torch.Tensor:
    """Channels that depend on each other, on noise, and have means."""
    rng = np.random.default_rng(seed)
    sources = rng.normal(0, 1, (n, 3, time))
    mixed = np.einsum("cs,nst->nct", rng.normal(0, 1, (channels, 3)), sources)
    return torch.from_numpy(mixed + 0.3 * rng.normal(0, 1, mixed.shape) + np.arange(channels)[:, None])


@pytest.mark.parametrize("context", [0, 2])
def test_lead_ridge_is_least_squares_on_visible_channels(context: int) -> None:
    train, test = waves(), waves(seed=1)
    ridge = fit_lead_ridge([train[:4], train[4:]], context, penalty=1e-12)
    visible = torch.tensor([True, False, True, False])[None, :, None].expand(6, 4, 2)
    found = ridge.predict(test.view(6, 4, 2, 200), visible).view(6, 4, 400).numpy()

    def regressors(x: torch.Tensor) -> np.ndarray:
        parts = [x.numpy()[:, [0, 2], shift : 400 - 2 * context + shift] for shift in range(2 * context + 1)]
        return np.concatenate(parts, axis=1).transpose(0, 2, 1).reshape(-1, 2 * (2 * context + 1))

    inner = slice(context, 400 - context)
    for lead in (1, 3):
        other = LinearRegression().fit(regressors(train), train.numpy()[:, lead, inner].ravel())
        expected = other.predict(regressors(test)).reshape(6, -1)
        np.testing.assert_allclose(found[:, lead, inner], expected, atol=1e-8)
    assert np.array_equal(found[:, [0, 2]], test.numpy()[:, [0, 2]])


def test_lead_ridge_ignores_hidden_content_and_uses_visible_leads_of_each_patch() -> None:
    ridge = fit_lead_ridge([waves()])
    x = waves(2, seed=2).view(2, 4, 2, 200)
    visible = torch.ones(2, 4, 2, dtype=torch.bool)
    visible[0, 1, 0] = visible[0, 2, 1] = visible[1, :, 1] = False
    wild = torch.where(visible[..., None], x, torch.nan)
    found = ridge.predict(wild, visible)
    assert bool(found.isfinite().all())
    whole = torch.ones(2, 4, 1, dtype=torch.bool)
    whole[:, 1] = False
    torch.testing.assert_close(found[0, 1, 0], ridge.predict(x[:, :, :1], whole)[0, 1, 0])
    # With nothing visible at a patch the means are left.
    torch.testing.assert_close(found[1, :, 1, 0], waves().mean(dim=(0, 2)), atol=0.02, rtol=0)


def test_lead_ridge_accepts_linearly_dependent_leads() -> None:
    x = waves()
    x[:, 3] = x[:, 0] - x[:, 1]
    ridge = fit_lead_ridge([x])
    visible = torch.ones(6, 4, 2, dtype=torch.bool)
    visible[:, 2] = False
    found = ridge.predict(x.view(6, 4, 2, 200), visible)
    truth = x.view(6, 4, 2, 200)[:, 2]
    assert float((found[:, 2] - truth).square().mean()) < 0.5 * float(truth.var())


def test_fit_lead_ridge_raises_without_windows() -> None:
    with pytest.raises(ValueError, match="no windows"):
        fit_lead_ridge([torch.zeros(0, 4, 400)])
