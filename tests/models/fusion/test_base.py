"""Pooling and the head over concatenated modalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from physio_dist.config import POOLINGS
from physio_dist.models.fusion.base import ConcatHead, pool, reduction


def sample(n: int = 3, channels: int = 4, patches: int = 5, d: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, channels, patches, d)).astype(np.float32)


def test_pooling_by_hand() -> None:
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
def test_invalid_channels_have_no_part_whatever_is_in_them(kind: str) -> None:
    x, valid = sample(), np.ones((3, 4), dtype=bool)
    valid[0, 1] = valid[2] = False
    broken = x.copy()
    broken[~valid] = np.inf
    broken[0, 1, 0] = np.nan
    assert torch.equal(pool(broken, valid, kind), pool(x, valid, kind))
    assert not pool(broken, valid, kind)[2].any()


def test_one_patch_has_no_spread_and_other_kinds_are_unknown() -> None:
    assert not pool(sample(patches=1), np.ones((3, 4), dtype=bool), "mean_std")[:, 2:].any()
    with pytest.raises(ValueError, match="median"):
        pool(sample(), np.ones((3, 4), dtype=bool), "median")


def head(depth: int = 1, components: int = 64) -> ConcatHead:
    torch.manual_seed(0)
    return ConcatHead({"ecg": 3, "eeg": 5}, 2, depth, 7, 0.0, components)


def rows(seed: int = 0, n: int = 40) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {"ecg": torch.tensor(rng.standard_normal((n, 3))).float(), "eeg": torch.tensor(rng.random((n, 5))).float()}


def reduced(model: ConcatHead, x: dict[str, torch.Tensor], most: int = 64) -> ConcatHead:
    model.reduce_by({name: reduction(values.numpy(), most) for name, values in x.items()})
    return model


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_scales_and_offsets_of_a_modality_do_not_matter(depth: int) -> None:
    plain = rows()
    other = {"ecg": plain["ecg"] * 1e-7 + 2e-7, "eeg": plain["eeg"] * 1e6 - 3e5}
    logits = [reduced(head(depth), x)(x) for x in (plain, other)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-2, atol=1e-2)
    assert logits[0].shape == (40, 2)


def test_components_are_centred_uncorrelated_and_of_mean_square_1_a_modality() -> None:
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


def test_all_components_say_what_the_standardised_features_say() -> None:
    model, x = reduced(head(0), rows()), rows()
    z = model.concatenate(x)
    for name, part in (("ecg", z[:, :3]), ("eeg", z[:, 3:])):
        standard = (x[name] - x[name].mean(0)) / x[name].std(0, correction=0)
        torch.testing.assert_close(part @ part.T, standard @ standard.T, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(x), z @ model.out.weight.T + model.out.bias, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == ["out.weight", "out.bias"]


def test_fewer_components_are_the_first_of_more() -> None:
    x = rows()
    many, few = reduced(head(0), x).concatenate(x), reduced(head(0, components=2), x).concatenate(x)
    assert few.shape == (40, 4)
    for some, all_ in ((few[:, :2], many[:, :2]), (few[:, 2:], many[:, 3:5])):
        assert float(some.square().mean()) == pytest.approx(1.0, rel=1e-3)
        torch.testing.assert_close(some / some.norm(), all_ / all_.norm(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("n", "f"), [(30, 8), (30, 200), (8, 8)])
def test_axes_are_those_of_a_library(n: int, f: int) -> None:
    x = np.random.default_rng(1).standard_normal((n, f)) * np.geomspace(1.0, 5.0, f) + 3.0
    x[:, 0] += 2.0 * x[:, 1]
    found = reduction(x.astype(np.float32), 5)
    z = (x - x.mean(0)) / x.std(0)
    library = PCA(5, svd_solver="full").fit(z)
    np.testing.assert_allclose(found.strength, library.explained_variance_ * (n - 1) / n, rtol=1e-3)
    np.testing.assert_allclose(np.abs((found.axes * library.components_.T).sum(0)), 1.0, atol=1e-3)
    assert (found.axes[np.abs(found.axes).argmax(0), np.arange(5)] > 0).all()


def test_fewer_rows_than_components_give_zeros_for_the_rest() -> None:
    x = np.random.default_rng(2).standard_normal((4, 50)).astype(np.float32)
    found = reduction(x, 16)
    assert found.axes.shape == (50, 16) and found.strength.shape == (16,)
    # Four centred rows span three dimensions.
    assert (found.strength[:3] > 0.1).all() and not found.axes[:, 3:].any()
    assert np.isfinite(found.axes).all()


def test_depth_and_width_are_those_asked_for() -> None:
    model = reduced(head(2), rows())
    assert [tuple(layer.weight.shape) for layer in model.hidden] == [(7, 8), (7, 7)]  # type: ignore[union-attr]
    x = model.concatenate(rows())
    keep = [torch.zeros(40, 7), torch.ones(40, 7)]
    # What is dropped after the first layer is gone: all rows are alike.
    assert torch.allclose(model.classify(x, keep), model.classify(x, keep)[:1].expand(40, 2))
    assert not torch.allclose(model.classify(x), model.classify(x)[:1].expand(40, 2))


def test_dropout_acts_in_training_only() -> None:
    x = rows()
    model = reduced(ConcatHead({"ecg": 3, "eeg": 5}, 2, 1, 50, 0.5, 64), x)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
