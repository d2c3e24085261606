"""The encoder: what ``valid`` and ``hidden`` mean, in every precision, and its arithmetic counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from physio_dist.errors import UserError
from physio_dist.models.encoders.criss_cross import (
    PRESETS,
    CrissCrossEncoder,
    EncoderConfig,
    MaskedModel,
    PatchNorm,
    count_flops,
    count_parameters,
    preset,
)

SMALL = EncoderConfig(d=80, layers=2, heads=4, ffn=160, dropout=0.0)


def make(config: EncoderConfig = SMALL, **options: bool) -> MaskedModel:
    """A model whose every parameter matters: biases and norms are away from 0 and 1."""
    torch.manual_seed(0)
    model = MaskedModel(config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def signal(*shape: int) -> Tensor:
    return torch.randn(*shape, 200, generator=torch.Generator().manual_seed(1))


def coin(*shape: int, p: float = 0.5, seed: int = 2) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < p


def test_base_preset_has_published_size() -> None:
    # The 4,924,000 of the reference counts its fixed mask patch of 200.
    assert count_parameters(PRESETS["base"]) + 200 == 4_924_000


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_count_parameters_matches_model(name: str) -> None:
    with torch.device("meta"):
        model = MaskedModel(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count_parameters(PRESETS[name])


def test_preset_sets_dropout_and_suggests_nearest_name() -> None:
    assert preset("tiny", 0.25) == EncoderConfig(d=80, layers=4, heads=4, ffn=320, dropout=0.25)
    with pytest.raises(UserError, match="'large'"):
        preset("larg", 0.1)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"heads": 3}, "heads"),
        ({"heads": 6}, "heads"),
        ({"d": 100}, "multiple of 40"),
        ({"dropout": 1.0}, "dropout"),
        ({"layers": 0}, "layers"),
        ({"patch": 100}, "patch"),
    ],
)
def test_encoder_config_raises_on_inconsistent_numbers(changes: dict[str, float], word: str) -> None:
    fields = {**PRESETS["tiny"].to_dict(), **changes}
    with pytest.raises(UserError, match=word):
        EncoderConfig(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 12, 10), (1, 21, 3), (2, 1, 30), (1, 2, 8)])
def test_encoder_accepts_any_number_of_channels_and_patches(shape: tuple[int, int, int]) -> None:
    model = make().eval()
    assert model.encoder(signal(*shape)).shape == (*shape, 80)
    assert model(signal(*shape), coin(*shape)).shape == (*shape, 200)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(0, 10**6))
def test_encoder_ignores_invalid_content_bit_for_bit(batch: int, channels: int, patches: int, seed: int) -> None:
    model = make().train()
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, channels, patches)
    valid, hidden = coin(*shape, seed=seed), coin(*shape, seed=seed + 1)
    x = torch.randn(*shape, 200, generator=generator)
    content = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30, 3.0])
    junk = content[torch.randint(0, 5, (*shape, 200), generator=generator)]
    results = []
    for given_x in (x, torch.where(valid[..., None], x, junk)):
        model.zero_grad()
        features = model.encoder(given_x, hidden, valid)
        features.square().sum().backward()
        results.append((features.detach(), [p.grad for p in model.encoder.parameters()]))
    (first, first_grads), (second, second_grads) = results
    assert torch.equal(first, second)
    assert not first[~valid].any()
    for a, b in zip(first_grads, second_grads, strict=True):
        assert a is not None and b is not None and bool(a.isfinite().all()) and torch.equal(a, b)


def test_invalid_channels_and_patches_equal_absent_ones() -> None:
    # Norm statistics, position and attention all have to leave them out for this to hold.
    model = make().double().eval()
    x, hidden = signal(2, 5, 6).double(), coin(2, 5, 6, p=0.3)
    valid = torch.zeros(2, 5, 6, dtype=torch.bool)
    valid[:, :3, :4] = True
    inside = model.encoder(x, hidden, valid)[:, :3, :4]
    alone = model.encoder(x[:, :3, :4], hidden[:, :3, :4])
    torch.testing.assert_close(inside, alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("hide", [False, True])
def test_all_valid_equals_no_valid(hide: bool) -> None:
    model = make().eval()
    x, hidden = signal(2, 12, 10), coin(2, 12, 10) if hide else None
    with_valid = model.encoder(x, hidden, torch.ones(2, 12, 10, dtype=torch.bool))
    torch.testing.assert_close(with_valid, model.encoder(x, hidden), rtol=0, atol=2e-5)


def test_samples_are_independent() -> None:
    model = make().double().eval()
    x, valid = signal(3, 4, 5).double(), coin(3, 4, 5, p=0.7)
    together = model.encoder(x, None, valid)
    for i in range(3):
        alone = model.encoder(x[i : i + 1], None, valid[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


def test_encoder_ignores_hidden_content() -> None:
    model = make().eval()
    x, hidden = signal(2, 4, 5), coin(2, 4, 5)
    other = torch.where(hidden[..., None], torch.full_like(x, float("nan")), x)
    assert torch.equal(model(x, hidden), model(other, hidden))
    assert not torch.equal(model(x, hidden), model(x))


def test_layer_attends_over_lead_and_time_axes() -> None:
    model = make(EncoderConfig(d=80, layers=1, heads=4, ffn=160, dropout=0.0)).double().eval()
    # Far enough apart that the position's 19 x 7 neighbourhood cannot carry anything; norms are shared by
    # all patches, so they are taken out of the game.
    for module in model.modules():
        if isinstance(module, PatchNorm):
            module.forward = lambda input, valid=None: input  # type: ignore[method-assign]
    x = signal(1, 24, 12).double()
    changed = x.clone()
    changed[0, 0, 0] += 1.0
    moved = (model.encoder(x) - model.encoder(changed)).abs().amax(-1)[0] > 1e-9
    expected = torch.zeros(24, 12, dtype=torch.bool)
    # The embedding carries the change into the neighbourhood, attention from there along rows and columns.
    expected[:10, :] = True
    expected[:, :4] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("use_valid", [False, True])
def test_autocast_stays_near_fp32_with_fp32_residual_stream(use_valid: bool) -> None:
    model = make(preset("tiny", 0.0)).eval()
    x, hidden = signal(2, 12, 10), coin(2, 12, 10)
    valid = coin(2, 12, 10, p=0.8) if use_valid else None
    exact = model.encoder(x, hidden, valid).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.encoder(x, hidden, valid)
    assert rough.dtype == torch.float32
    assert float((rough.detach() - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_module_stays_near_fp32(dtype: torch.dtype) -> None:
    # What DeepSpeed's bf16 and fp16 modes do to a module.
    model = make(preset("tiny", 0.0)).eval()
    x, hidden, valid = signal(2, 12, 10), coin(2, 12, 10), coin(2, 12, 10, p=0.8)
    exact = model(x, hidden, valid).detach()
    model.to(dtype)
    rough = model(x, hidden, valid)
    rough.float().square().mean().backward()
    assert float((rough.detach().float() - exact).norm() / exact.norm()) < 0.03
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_norm_statistics_are_fp32_under_autocast() -> None:
    norm = PatchNorm(5, 10)
    x = 300.0 + signal(2, 10, 6)
    valid = torch.ones(2, 6, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        for result in (norm(x), norm(x, valid)):
            assert result.dtype == torch.float32
            torch.testing.assert_close(result, norm.double()(x.double()).float(), rtol=0, atol=1e-3)
            norm.float()


def gradients(model: nn.Module, call: Callable[[], Tensor]) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    call().square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_activation_checkpointing_is_bit_equal_with_dropout() -> None:
    config = EncoderConfig(d=80, layers=2, heads=4, ffn=160, dropout=0.3)
    x, hidden, valid = signal(2, 4, 5), coin(2, 4, 5), coin(2, 4, 5, p=0.8)
    plain, spared = make(config), make(config, checkpoint_activations=True)
    spared.load_state_dict(plain.state_dict())
    first = gradients(plain, lambda: plain(x, hidden, valid))
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    spared.encoder.layers[0].register_forward_pre_hook(count)
    second = gradients(spared, lambda: spared(x, hidden, valid))
    assert runs == 2, "a checkpointed layer runs once more in the backward pass"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dropout_is_active_in_training_only() -> None:
    x = signal(1, 3, 4)
    model = make(preset("tiny", 0.1))
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    without = make(preset("tiny", 0.0)).train()
    state = torch.get_rng_state()
    without(x).sum().backward()
    assert torch.equal(state, torch.get_rng_state())


def test_encoder_has_no_data_dependent_shapes() -> None:
    # On the meta device there is no data: reading a value back or a boolean gather raises there.
    with torch.device("meta"):
        model = MaskedModel(preset("tiny", 0.1))
        x = torch.empty(2, 12, 10, 200)
        mask = torch.empty(2, 12, 10, dtype=torch.bool)
        model(x, mask, mask).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_every_parameter_gets_gradient() -> None:
    model = make(preset("tiny", 0.0))
    grads = gradients(model, lambda: model(signal(2, 12, 10), coin(2, 12, 10), coin(2, 12, 10, p=0.9)))
    assert len(grads) == len(list(model.parameters()))
    assert all(bool(grad.any()) for grad in grads)


def test_initial_residual_stream_has_stable_variance() -> None:
    torch.manual_seed(0)
    for name in ("tiny", "base"):
        features = CrissCrossEncoder(preset(name, 0.0))(signal(2, 12, 10))
        assert 0.1 < float(features.detach().std()) < 3.0


def test_initial_loss_is_that_of_predicting_zero() -> None:
    torch.manual_seed(0)
    for name in ("tiny", "base"):
        x = signal(2, 12, 10)
        error = (MaskedModel(preset(name, 0.0))(x, coin(2, 12, 10)) - x).detach().square().mean()
        assert float(error) < 1.05 * float(x.square().mean())


@pytest.mark.parametrize("name", ["tiny", "base"])
@pytest.mark.parametrize("shape", [(12, 10), (1, 1), (19, 30), (64, 4)])
def test_count_flops_matches_flop_counter(name: str, shape: tuple[int, int]) -> None:
    model = MaskedModel(preset(name, 0.0)).eval()
    x = signal(1, *shape)
    for module, head in ((model, True), (model.encoder, False)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        assert count_flops(model.config, *shape, reconstruct=head) == pytest.approx(counter.get_total_flops(), rel=0.02)
