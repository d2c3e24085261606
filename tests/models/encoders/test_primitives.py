"""Dropout and attention against their definitions."""

from __future__ import annotations

import pytest
import torch

from physio_dist.models.encoders import primitives


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drop_is_uniform_and_keeps_mean(p: float) -> None:
    torch.manual_seed(0)
    kept = (primitives.drop(torch.ones(40_000, 8), p, True) != 0).double()
    # Four elements share one draw, so each of the places in it is looked at: standard error below 0.0025.
    assert (kept.mean(0) - (1 - p)).abs().max() < 0.0125
    # Places of one draw are independent of each other.
    assert (torch.corrcoef(kept.T) - torch.eye(8)).abs().max() < 0.025
    dropped = primitives.drop(torch.ones(40_000, 8), p, True)
    assert float(dropped.max()) == pytest.approx(1 / (1 - p), rel=1e-4)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (0, 4)])
def test_drop_accepts_any_shape(shape: tuple[int, ...]) -> None:
    assert primitives.drop(torch.ones(shape), 0.5, True).shape == shape


def test_drop_follows_generator_and_gradient_follows_mask() -> None:
    x = torch.ones(100, 10, requires_grad=True)
    torch.manual_seed(3)
    first = primitives.drop(x, 0.3, True)
    torch.manual_seed(3)
    assert torch.equal(first, primitives.drop(x, 0.3, True))
    assert not torch.equal(first, primitives.drop(x, 0.3, True))
    first.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, first.detach())


def test_drop_returns_input_if_inactive() -> None:
    x = torch.ones(3)
    assert primitives.drop(x, 0.0, True) is x
    assert primitives.drop(x, 0.5, False) is x


@pytest.mark.parametrize("shape", [(32, 12, 10), (1, 3, 4), (2, 1, 1)])
def test_linear_and_gradients_match_matrix_product(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    wide = torch.randn(*shape, 40)
    results = []
    for form in (primitives.linear, torch.nn.functional.linear):
        # A part of a wider tensor, as the halves of the features are.
        x, weight, bias = wide[..., :20].requires_grad_(), torch.ones(30, 20).cumsum(1), torch.arange(30.0)
        weight.requires_grad_(), bias.requires_grad_()
        y = form(x, weight, bias)
        assert y.is_contiguous() and y.dtype == torch.float32
        results.append((y, *torch.autograd.grad(y.sin().sum(), (x, weight, bias))))
    for own, known in zip(*results, strict=True):
        torch.testing.assert_close(own, known, rtol=1e-4, atol=1e-2)


def test_low_precision_operations_do_not_widen() -> None:
    x, weight = torch.randn(2, 3, 4, 8, dtype=torch.bfloat16), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert primitives.like(x, weight) is x
        assert primitives.linear(x, weight, torch.zeros(5)).dtype == torch.bfloat16
    assert primitives.like(x, weight).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_drop_scales_kept_values_in_every_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(50, 40).to(dtype).t()
    dropped = primitives.drop(x, 0.25, True)
    kept = dropped != 0
    assert dropped.dtype == dtype and 0.7 < float(kept.double().mean()) < 0.8
    torch.testing.assert_close(dropped[kept], (x[kept].double() / 0.75).to(dtype))


@pytest.mark.parametrize("masked", [False, True])
def test_attend_on_cpu_matches_fused_kernel(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 7, 2, 5, 4, dtype=torch.float64).unbind(0)
    allowed = torch.rand(7, 1, 1, 5) < 0.6
    allowed[..., 0] = True
    bias = torch.where(allowed, 0.0, -torch.inf).double() if masked else None
    own = primitives.attend(q, k, v, bias, 0.0)
    torch.testing.assert_close(own, primitives._fused(q, k, v, bias, 0.0))
    monkeypatch.setattr(primitives, "_MAX_ROWS", 3)
    torch.testing.assert_close(own, primitives._fused(q, k, v, bias, 0.0))


def test_attend_drops_attention_weights() -> None:
    torch.manual_seed(0)
    q = k = torch.zeros(2000, 1, 1, 4)
    v = torch.ones(2000, 1, 1, 4)
    result = primitives.attend(q, k, v, None, 0.25)
    # One key: its weight is 1, and dropping it takes the whole value along.
    assert result.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((result == 0).float().mean()) == pytest.approx(0.25, abs=0.04)
