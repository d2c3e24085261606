"""Pooling and the head over concatenated modalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from physio_dist.config import POOLINGS
from physio_dist.models.fusion import ConcatHead, pool


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


def head(depth: int = 1, **more: object) -> ConcatHead:
    torch.manual_seed(0)
    return ConcatHead({"ecg": 3, "eeg": 5}, 2, depth, 7, 0.0, **more)  # type: ignore[arg-type]


def rows(seed: int = 0, n: int = 40) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {"ecg": torch.tensor(rng.standard_normal((n, 3))).float(), "eeg": torch.tensor(rng.random((n, 5))).float()}


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_scales_and_offsets_of_a_modality_do_not_matter(depth: int) -> None:
    plain = rows()
    other = {"ecg": plain["ecg"] * 1e-7 + 2e-7, "eeg": plain["eeg"] * 1e6 - 3e5}
    logits = []
    for x in (plain, other):
        model = head(depth)
        model.standardise_by(x)
        logits.append(model(x))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)
    assert logits[0].shape == (40, 2)


def test_standardised_inputs_have_mean_0_and_deviation_1_in_the_rows_given() -> None:
    model, x = head(), rows()
    x["eeg"][:, 2] = 1e4
    x["ecg"][:, 1] = 1e4 + 0.1 * x["ecg"][:, 1]
    model.standardise_by(x)
    z = model.concatenate(x)
    assert model.concatenate({name: values[:1] for name, values in x.items()}).shape == (1, 8)
    torch.testing.assert_close(z.mean(0), torch.zeros(8), atol=0.2, rtol=0)
    deviation = z.std(0, correction=0)
    # Feature 3 + 2 is constant: centred, not blown up.
    assert not z[:, 5].any()
    assert torch.allclose(deviation[[0, 1, 2, 3, 4, 6, 7]], torch.ones(7), atol=0.05)


def test_the_order_of_concatenation_and_a_linear_head() -> None:
    model, x = head(0), rows()
    model.standardise_by(x)
    z = torch.cat([(v - v.mean(0)) / v.std(0, correction=0) for v in (x["ecg"], x["eeg"])], 1)
    torch.testing.assert_close(model(x), z @ model.out.weight.T + model.out.bias, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == ["out.weight", "out.bias"]


def test_depth_and_width_are_those_asked_for() -> None:
    model = head(2)
    assert [tuple(layer.weight.shape) for layer in model.hidden] == [(7, 8), (7, 7)]  # type: ignore[union-attr]
    x = model.concatenate(rows())
    keep = [torch.zeros(40, 7), torch.ones(40, 7)]
    # What is dropped after the first layer is gone: all rows are alike.
    assert torch.allclose(model.classify(x, keep), model.classify(x, keep)[:1].expand(40, 2))
    assert not torch.allclose(model.classify(x), model.classify(x)[:1].expand(40, 2))


def test_dropout_acts_in_training_only() -> None:
    model = ConcatHead({"ecg": 3, "eeg": 5}, 2, 1, 50, 0.5)
    x = rows()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_channels_share_the_principal_components_of_the_rows_trained_on() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((200, 6, 2))
    mixing = rng.standard_normal((2, 20))
    x = {"eeg": torch.tensor((hidden @ mixing).reshape(200, 120)).float()}
    model = ConcatHead({"eeg": 120}, 2, 0, 1, 0.0, channels={"eeg": 6}, components=2)
    model.standardise_by(x)
    z = model.concatenate(x)
    assert z.shape == (200, 12) and model.out.in_features == 12
    assert float(z.square().mean()) == pytest.approx(1.0, rel=1e-3)
    basis = model.get_buffer("basis_eeg")
    gram = basis.T @ basis
    assert abs(float(gram[0, 1])) < 1e-4 * float(gram[0, 0]) and float(gram[0, 0]) == pytest.approx(float(gram[1, 1]))
    # Two components say all there is: the standardised features come back from them (their scales hardly differ).
    standard = ((x["eeg"] - x["eeg"].mean(0)) / x["eeg"].std(0, correction=0)).view(1200, 20)
    back = z.view(1200, 2) @ basis.T / gram[0, 0]
    assert float((back - standard).square().mean()) < 0.02
    assert float(z.view(200, 6, 2).square().mean((0, 1))[0]) > float(z.view(200, 6, 2).square().mean((0, 1))[1])
    # One channel's values go nowhere but into its own components.
    changed = x["eeg"].clone()
    changed[:, 20:40] += 1.0
    different = (model.concatenate({"eeg": changed}) != z).any(0).view(6, 2).any(1)
    assert different.tolist() == [False, True, False, False, False, False]


def test_few_features_or_one_channel_are_taken_as_they_are() -> None:
    assert "basis_eeg" not in dict(ConcatHead({"eeg": 120}, 2, 0, 1, 0.0).named_buffers())
    assert "basis_eeg" not in dict(ConcatHead({"eeg": 96}, 2, 0, 1, 0.0, channels={"eeg": 6}).named_buffers())
    assert ConcatHead({"eeg": 102}, 2, 0, 1, 0.0, channels={"eeg": 6}).out.in_features == 96
