"""Principal components of features, in a head over concatenated modalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from physio_dist.models.fusion.heads import ConcatHead
from physio_dist.models.fusion.reduction import fit_reduction


def head(depth: int = 1, components: int = 64) -> ConcatHead:
    torch.manual_seed(0)
    return ConcatHead({"ecg": 3, "eeg": 5}, 2, depth, 7, 0.0, components)


def rows(seed: int = 0, n: int = 40) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {"ecg": torch.tensor(rng.standard_normal((n, 3))).float(), "eeg": torch.tensor(rng.random((n, 5))).float()}


def reduced(model: ConcatHead, x: dict[str, torch.Tensor], most: int = 64) -> ConcatHead:
    model.reduce_by({name: fit_reduction(values.numpy(), most) for name, values in x.items()})
    return model


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_head_is_invariant_to_scale_and_offset_of_modality(depth: int) -> None:
    plain = rows()
    other = {"ecg": plain["ecg"] * 1e-7 + 2e-7, "eeg": plain["eeg"] * 1e6 - 3e5}
    logits = [reduced(head(depth), x)(x) for x in (plain, other)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-2, atol=1e-2)
    assert logits[0].shape == (40, 2)


def test_components_are_centred_uncorrelated_and_of_unit_mean_square() -> None:
    x = rows()
    x["eeg"][:, 2] = 1e4
    x["ecg"][:, 1] = 1e4 + 0.1 * x["ecg"][:, 1]
    model = reduced(head(), x)
    assert model.concatenate({name: values[:1] for name, values in x.items()}).shape == (1, 8)
    z = model.concatenate(x).detach()
    torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=0.02, rtol=0)
    for part in (z[:, :3], z[:, 3:]):
        covariance = part.T @ part / len(part)
        torch.testing.assert_close(covariance, torch.diag(covariance.diag()), atol=0.02, rtol=0)
        assert float(covariance.diag().mean()) == pytest.approx(1.0, rel=0.02)
        assert (covariance.diag().diff() <= 1e-3).all()
    # A feature that is constant has no part in any component.
    moved = {**x, "eeg": x["eeg"] + torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])}
    assert float((model.concatenate(moved) - z).abs().max()) < 1.5


def test_all_components_preserve_products_of_standardised_features() -> None:
    model, x = reduced(head(0), rows()), rows()
    z = model.concatenate(x)
    for name, part in (("ecg", z[:, :3]), ("eeg", z[:, 3:])):
        standard = (x[name] - x[name].mean(0)) / x[name].std(0, correction=0)
        torch.testing.assert_close(part @ part.T, standard @ standard.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(x), z @ model.out.weight.T + model.out.bias, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == ["out.weight", "out.bias"]


def test_fewer_components_are_first_of_more() -> None:
    x = rows()
    many, few = reduced(head(0), x).concatenate(x), reduced(head(0, components=2), x).concatenate(x)
    assert few.shape == (40, 4)
    for some, all_ in ((few[:, :2], many[:, :2]), (few[:, 2:], many[:, 3:5])):
        assert float(some.square().mean()) == pytest.approx(1.0, rel=1e-3)
        torch.testing.assert_close(some / some.norm(), all_ / all_.norm(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("n", "f"), [(30, 8), (30, 200), (8, 8)])
def test_fit_reduction_axes_match_scikit_learn_pca(n: int, f: int) -> None:
    x = np.random.default_rng(1).standard_normal((n, f)) * np.geomspace(1.0, 5.0, f) + 3.0
    x[:, 0] += 2.0 * x[:, 1]
    found = fit_reduction(x.astype(np.float32), 5)
    z = (x - x.mean(0)) / x.std(0)
    library = PCA(5, svd_solver="full").fit(z)
    np.testing.assert_allclose(found.strength, library.explained_variance_ * (n - 1) / n, rtol=1e-3)
    np.testing.assert_allclose(np.abs((found.axes * library.components_.T).sum(0)), 1.0, atol=1e-3)
    assert (found.axes[np.abs(found.axes).argmax(0), np.arange(5)] > 0).all()


def test_fit_reduction_pads_zeros_with_fewer_rows_than_components() -> None:
    x = np.random.default_rng(2).standard_normal((4, 50)).astype(np.float32)
    found = fit_reduction(x, 16)
    assert found.axes.shape == (50, 16) and found.strength.shape == (16,)
    # Four centred rows span three dimensions.
    assert (found.strength[:3] > 0.1).all() and not found.axes[:, 3:].any()
    assert np.isfinite(found.axes).all()


def test_mlp_has_requested_depth_and_width_and_keep_replaces_dropout() -> None:
    model = reduced(head(2), rows())
    assert [tuple(layer.weight.shape) for layer in model.hidden] == [(7, 8), (7, 7)]  # type: ignore[union-attr]
    x = model.concatenate(rows())
    keep = [torch.zeros(40, 7), torch.ones(40, 7)]
    # What is dropped after the first layer is gone: all rows are alike.
    assert torch.allclose(model.classify(x, keep), model.classify(x, keep)[:1].expand(40, 2))
    assert not torch.allclose(model.classify(x), model.classify(x)[:1].expand(40, 2))


def test_dropout_is_active_in_training_only() -> None:
    x = rows()
    model = reduced(ConcatHead({"ecg": 3, "eeg": 5}, 2, 1, 50, 0.5, 64), x)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
