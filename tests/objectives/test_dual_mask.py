"""The dual mask's rules, its shares, its objective and the predictors to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from physio_dist.config.mask import MASK_MODES
from physio_dist.errors import UserError
from physio_dist.objectives.baselines import predict_interpolation, predict_zero
from physio_dist.objectives.dual_mask import DualMask, MaskConfig, dual_mask_loss, sample_masks
from physio_dist.signals.montage import lead_layouts, mask_groups

TWELVE = [[0, 1, 2, 3, 4, 5], *([lead] for lead in range(6, 12))]
# Rows I, II, III, aVR, aVL, aVF, V1-V6 over the columns I, II, V1-V6.
LEADS = np.zeros((12, 8))
LEADS[:6, :2] = [[1, 0], [0, 1], [-1, 1], [-0.5, -0.5], [1, -0.5], [-0.5, 1]]
LEADS[6:, 2:] = np.eye(6)

LAYOUTS = {
    "one": [[0]],
    "two limb": [[0, 1]],
    "two single": [[0], [1]],
    "limb only": [[0, 1, 2, 3, 4, 5]],
    "eight": [[0, 1], *([lead] for lead in range(2, 8))],
    "twelve": TWELVE,
    "twelve, another order": [[11, 2, 4, 6, 8, 10], [0], [1], [3], [5], [7], [9]],
    "eeg": [[electrode] for electrode in range(100)],
}
# Of the masks of seed 1234, purpose "train", positions 0, 1 and 10^12, each as one number.
FROZEN = [
    "1f07c1f07c1f07ce0e0ffffff07cf8",
    "52d4b52d4b52d4b4d69afffff33bff",
    "3b0ec3b0ec3b0ecfffffffe740fbff",
]
RATIOS = st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.8, 0.99])


def draw(config: MaskConfig, groups: list[list[int]], patches: int, count: int, seed: int = 7) -> DualMask:
    return sample_masks(config, groups, patches, seed, "train", np.arange(count))


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(LAYOUTS)), st.integers(1, 31), RATIOS, RATIOS, st.integers(0, 2**63))
def test_sample_masks_follows_rules_for_any_options(
    layout: str, patches: int, intra: float, inter: float, seed: int
) -> None:
    groups = LAYOUTS[layout]
    channels = sum(map(len, groups))
    in_time, by_lead = intra > 0 and patches > 1, inter > 0 and channels > 1
    if intra == inter == 0:
        return
    config = MaskConfig(intra, inter)
    if not in_time and not by_lead:
        with pytest.raises(UserError, match="nothing to hide"):
            draw(config, groups, patches, 4, seed)
        return
    mask = draw(config, groups, patches, 64, seed)
    assert mask.hidden.shape == (64, channels, patches) and mask.kept_leads.all()
    assert not (mask.intra & mask.inter).any()
    whole = mask.inter.any(2)
    assert np.array_equal(whole, mask.inter.all(2)), "a lead is hidden as a whole or not at all"
    # A visible channel in every sample, seen at some patch; something of each term in every sample.
    assert (~mask.hidden).any((1, 2)).all()
    assert whole.any(1).all() == by_lead and whole.any() == by_lead
    assert mask.intra.any((1, 2)).all() == in_time and mask.intra.any() == in_time
    for group in groups:
        visible = (~mask.hidden[:, group]).sum(1)
        assert np.isin(visible, [0, 1, len(group)]).all()
        for lead in group:
            shown = mask.intra[:, lead][~whole[:, lead]]
            if in_time and len(shown):
                wanted = min(max(int(np.floor(intra * patches + 0.5)), 1), patches - 1)
                assert (shown.sum(1) == wanted).all()


def test_sample_masks_hides_no_limb_lead_computable_from_visible_ones() -> None:
    mask = draw(MaskConfig(0.5, 0.5), TWELVE, 10, 300)
    patterns = np.unique(mask.hidden.transpose(0, 2, 1).reshape(-1, 12), axis=0)
    assert len(patterns) > 100
    for hidden in patterns:
        visible = LEADS[~hidden]
        rank = np.linalg.matrix_rank(visible) if len(visible) else 0
        for lead in np.flatnonzero(hidden):
            assert np.linalg.matrix_rank(np.vstack([visible, LEADS[lead]])) == rank + 1


NAMES = ("I", "II", "III", "aVR", "aVL", "aVF", "V1", "V2", "V3", "V4", "V5", "V6")
OPTIONS = st.builds(
    MaskConfig,
    intra_ratio=st.sampled_from([0.1, 0.5, 0.9]),
    inter_ratio=st.sampled_from([0.1, 0.5, 0.9]),
    span=st.sampled_from([None, 0.0, 1.0, 2.0, 3.5, 40.0]),
    mode=st.sampled_from(MASK_MODES),
    lead_dropout=st.sampled_from([0.0, 0.5, 1.0]),
)


def no_hidden_limb_patch_is_arithmetic(mask: DualMask, matrix: np.ndarray) -> None:
    """By rank: a hidden lead that visible leads combine to would not raise theirs."""
    shown = np.broadcast_to(mask.kept_leads[:, :, None], mask.hidden.shape)
    states = np.stack([shown & mask.hidden, shown & ~mask.hidden], axis=-1).transpose(0, 2, 1, 3)
    for state in np.unique(states.reshape(-1, *states.shape[2:]), axis=0):
        visible = matrix[state[:, 1]]
        rank = np.linalg.matrix_rank(visible) if len(visible) else 0
        for lead in np.flatnonzero(state[:, 0]):
            assert np.linalg.matrix_rank(np.vstack([visible, matrix[lead]])) == rank + 1


@settings(max_examples=80, deadline=None)
@given(OPTIONS, st.permutations(range(12)), st.integers(2, 12), st.integers(0, 2**63))
def test_sample_masks_options_make_no_limb_lead_computable(
    config: MaskConfig, order: list[int], patches: int, seed: int
) -> None:
    names = [NAMES[i] for i in order]
    config = replace(config, layouts=lead_layouts(names))
    mask = draw(config, mask_groups(names), patches, 48, seed)
    no_hidden_limb_patch_is_arithmetic(mask, LEADS[order])
    # Every sample has something to tell and something to tell it from, among the leads it is shown with.
    shown = mask.kept_leads[:, :, None]
    assert (mask.hidden & shown).any((1, 2)).all() and (~mask.hidden & shown).any((1, 2)).all()
    assert not (mask.hidden & ~shown).any() and not (mask.intra & mask.inter).any()


def test_alternating_mode_has_one_part_per_sample() -> None:
    mask = draw(MaskConfig(0.5, 0.5, mode="alternating"), TWELVE, 10, 4000)
    in_time, by_lead = mask.intra.any((1, 2)), mask.inter.any((1, 2))
    assert (in_time ^ by_lead).all()
    assert in_time.mean() == pytest.approx(0.5, abs=0.03)
    # Each as it is in a sample with both.
    both = draw(MaskConfig(0.5, 0.5), TWELVE, 10, 4000)
    assert np.array_equal(mask.inter[by_lead], both.inter[by_lead])
    assert np.array_equal(mask.intra[in_time], (both.intra | both.inter & mask.intra)[in_time])
    alone = draw(MaskConfig(0.5, 0.5, mode="alternating"), [[0]], 10, 100)
    assert (alone.intra.sum(2) == 5).all(), "one channel can only be hidden in time"


@pytest.mark.parametrize(
    ("span", "ratio", "patches", "spans"),
    [(2.0, 0.5, 20, 5.0), (4.0, 0.5, 20, 2.5), (3.0, 0.3, 20, 2.0), (40.0, 0.5, 20, 1.0), (2.0, 0.8, 20, 4.0)],
)
def test_span_option_sets_mean_span_length(span: float, ratio: float, patches: int, spans: float) -> None:
    mask = draw(MaskConfig(ratio, 0.0, span=span), TWELVE, patches, 3000)
    assert (mask.intra.sum(2) == round(ratio * patches)).all()
    beginnings = (mask.intra & ~np.roll(mask.intra, 1, axis=2)).sum(2)
    # Visible patches part the spans, so of 16 hidden and 4 visible patches there are 4 spans and not 8.
    assert beginnings.mean() == pytest.approx(spans, abs=0.05)
    assert np.ptp(mask.intra.mean((0, 1))) < 0.03, "every patch is hidden equally often"


def test_span_0_scatters_patches_as_default_does_in_half_of_samples() -> None:
    scattered = draw(MaskConfig(0.5, 0.3, span=0.0), TWELVE, 10, 500)
    usual = draw(MaskConfig(0.5, 0.3), TWELVE, 10, 500)
    same = (scattered.hidden == usual.hidden).all((1, 2))
    assert np.array_equal(scattered.inter, usual.inter) and 0.4 < same.mean() < 0.6
    assert np.array_equal(scattered.hidden, draw(MaskConfig(0.5, 0.3, span=1.0), TWELVE, 10, 500).hidden)


def test_lead_dropout_follows_layout_shares_and_masks_remaining_leads() -> None:
    config = MaskConfig(0.5, 0.3, lead_dropout=0.6, layouts=lead_layouts(NAMES))
    mask, usual = draw(config, TWELVE, 10, 6000), draw(MaskConfig(0.5, 0.3), TWELVE, 10, 6000)
    counts = mask.kept_leads.sum(1)
    for leads, share in ((12, 0.4), (8, 0.2), (2, 0.2), (1, 0.2)):
        assert (counts == leads).mean() == pytest.approx(share, abs=0.02)
    assert np.array_equal(np.flatnonzero(mask.kept_leads[counts == 8][0]), [0, 1, 6, 7, 8, 9, 10, 11])
    assert np.array_equal(np.flatnonzero(mask.kept_leads[counts == 2][0]), [0, 1])
    assert mask.kept_leads[counts == 1].any(0).all(), "any lead may be the only one"
    assert np.array_equal(mask.hidden[counts == 12], usual.hidden[counts == 12])
    assert not mask.inter[counts == 1].any() and (mask.intra[counts == 1].sum((1, 2)) == 5).all()


def test_lead_dropout_keeps_all_leads_if_no_kept_lead_is_valid() -> None:
    config = MaskConfig(0.5, 0.3, lead_dropout=1.0, layouts=lead_layouts(NAMES))
    valid = np.ones((200, 12), dtype=bool)
    valid[:, :2] = False
    free = draw(config, TWELVE, 10, 200)
    restricted = sample_masks(config, TWELVE, 10, 7, "train", np.arange(200), valid)
    blind = ~(free.kept_leads & valid).any(1)
    assert blind.any() and restricted.kept_leads[blind].all()
    assert np.array_equal(restricted.kept_leads[~blind], free.kept_leads[~blind])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ({"span": -1.0}, "mask.span"),
        ({"span": float("nan")}, "mask.span"),
        ({"mode": "either"}, "mask.mode"),
        ({"lead_dropout": 1.5}, "mask.lead_dropout"),
        ({"mode": "alternating", "inter_ratio": 0.0}, "mask.mode=alternating needs"),
        ({"lead_dropout": 0.5, "intra_ratio": 0.0}, "a lead alone can only be hidden in time"),
    ],
)
def test_mask_options_raise_on_invalid_values(words: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        MaskConfig(**{"intra_ratio": 0.5, "inter_ratio": 0.3, **words})


@pytest.mark.parametrize(("names", "patches"), [(["I"], 10), (["Fz", "Cz"], 10), (NAMES, 1)])
def test_lead_dropout_raises_without_several_leads_and_patches(names: Sequence[str], patches: int) -> None:
    config = MaskConfig(0.5, 0.3, lead_dropout=0.5, layouts=lead_layouts(names))
    with pytest.raises(UserError, match=r"mask\.lead_dropout=0\.5: windows of"):
        draw(config, mask_groups(names), patches, 4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.integers(0, 2**40))
def test_mask_depends_on_position_only(others: list[int], position: int) -> None:
    alone = sample_masks(MaskConfig(0.5, 0.5), TWELVE, 10, 3, "train", np.array([position]))
    batch = sample_masks(MaskConfig(0.5, 0.5), TWELVE, 10, 3, "train", np.array([*others, position]))
    assert np.array_equal(alone.intra[0], batch.intra[-1])
    assert np.array_equal(alone.inter[0], batch.inter[-1])


def test_masks_differ_by_seed_purpose_and_position() -> None:
    def hidden(seed: int, purpose: str, first: int) -> bytes:
        positions = np.arange(first, first + 50)
        return sample_masks(MaskConfig(0.5, 0.5), TWELVE, 10, seed, purpose, positions).hidden.tobytes()

    assert len({hidden(1, "train", 0), hidden(2, "train", 0), hidden(1, "val", 0), hidden(1, "train", 50)}) == 4


def test_masks_are_reproducible_across_releases() -> None:
    # Frozen: a change here breaks the resumption of every run under way.
    mask = sample_masks(MaskConfig(0.5, 0.5), TWELVE, 10, 1234, "train", np.array([0, 1, 10**12]))
    words = [int("".join(map(str, row.astype(int).ravel())), 2) for row in mask.hidden]
    assert [f"{word:030x}" for word in words] == FROZEN


def test_hidden_shares_match_docstring() -> None:
    mask = draw(MaskConfig(0.5, 0.5), TWELVE, 10, 60_000)
    # By hand: of seven groups none is hidden in 1 of 128 samples and all in 1 of 256 (no lead kept), so a
    # group's probability is 1/2 + 1/896 - 1/1792; a limb lead is the kept one in a sixth of half of it.
    group = 0.5 + 1 / 1792
    inter = 0.5 * group + 0.5 * (0.25 + (0.25 + 1 / 1792) * 5 / 6)
    assert inter == pytest.approx(0.480, abs=5e-4)
    assert mask.inter.mean() == pytest.approx(inter, abs=3e-3)
    assert mask.intra.mean() == pytest.approx((1 - inter) / 2, abs=3e-3)
    assert mask.hidden.mean() == pytest.approx(0.740, abs=3e-3)
    # Evenly over V leads, over limb leads, over patches.
    assert np.ptp(mask.inter[:, 6:].mean((0, 2))) < 0.012
    assert np.ptp(mask.inter[:, :6].mean((0, 2))) < 0.012
    assert np.ptp(mask.intra.mean((0, 1))) < 0.006
    kept = (~mask.inter[:, :6, 0]).sum(1)
    assert (kept == 1).mean() == pytest.approx(0.25, abs=0.01)


def test_default_span_hides_one_span_in_half_of_samples() -> None:
    mask = draw(MaskConfig(0.5, 0.0), TWELVE, 10, 4000)
    # Around the end of the window a span has exactly one beginning.
    beginnings = (mask.intra & ~np.roll(mask.intra, 1, axis=2)).sum(2)
    spans = (beginnings == 1).all(1)
    # Seven scattered groups are all spans by chance in (10/252)^7 of the cases: never.
    assert spans.mean() == pytest.approx(0.5, abs=0.03)
    first, second = mask.intra[:, 6], mask.intra[:, 7]
    assert (first != second).any(1).mean() > 0.85
    assert np.corrcoef(first.ravel(), second.ravel())[0, 1] == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize("ratios", [(0.0, 0.0), (1.0, 0.5), (0.5, 1.0), (-0.1, 0.5), (float("nan"), 0.5)])
def test_mask_options_raise_on_ratios_hiding_nothing_or_everything(ratios: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="mask"):
        MaskConfig(*ratios)


@pytest.mark.parametrize("groups", [[], [[0], [0]], [[1]], [[0, 2]]])
def test_sample_masks_raises_if_groups_are_no_partition(groups: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="partition"):
        draw(MaskConfig(0.5, 0.5), groups, 10, 2)


def problem(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = draw(MaskConfig(0.5, 0.5), TWELVE, 10, 5)
    predicted, target = torch.randn(2, 5, 12, 10, 200, generator=generator).unbind(0)
    valid = torch.rand(5, 12, 10, generator=generator) < 0.7
    return predicted, target, torch.from_numpy(mask.intra), torch.from_numpy(mask.inter), valid


@pytest.mark.parametrize("use_valid", [False, True])
def test_loss_is_mean_over_hidden_valid_samples(use_valid: bool) -> None:
    predicted, target, intra, inter, valid = problem()
    terms = dual_mask_loss(predicted, target, intra, inter, valid if use_valid else None)
    for i in range(5):
        ok = valid[i] if use_valid else torch.ones_like(valid[i])
        squared = (predicted[i] - target[i]).square()
        for got, chosen in ((terms.loss, intra | inter), (terms.intra, intra), (terms.inter, inter)):
            torch.testing.assert_close(got[i], squared[chosen[i] & ok].mean())
    assert terms.has_intra.tolist() == terms.has_inter.tolist() == [1.0] * 5


def test_relative_loss_divides_by_mean_square_of_lead() -> None:
    predicted, target, intra, inter, valid = problem()
    # Leads of very different size, and one that is silent.
    size = torch.logspace(-1, 2, 12)[:, None, None]
    predicted, target = predicted * size, target * size
    target[:, 3] = 0.0
    target[~valid] = torch.nan
    terms = dual_mask_loss(predicted, target, intra, inter, valid, "relative")
    for i in range(5):
        shares = torch.zeros(12, 10)
        for c in range(12):
            power = target[i, c][valid[i, c]].square().mean() if valid[i, c].any() else torch.tensor(0.0)
            shares[c] = (predicted[i, c] - target[i, c]).square().mean(-1) / (power + 0.01)
        for got, chosen in ((terms.loss, intra | inter), (terms.intra, intra), (terms.inter, inter)):
            torch.testing.assert_close(got[i], shares[chosen[i] & valid[i]].mean())
    loud = dual_mask_loss(torch.zeros_like(target), 1e3 * target.nan_to_num(), intra, inter, None, "relative")
    quiet = dual_mask_loss(torch.zeros_like(target), 1e2 * target.nan_to_num(), intra, inter, None, "relative")
    torch.testing.assert_close(loud.loss, quiet.loss, rtol=1e-3, atol=0)


def test_loss_term_without_patches_is_zero() -> None:
    predicted, target, intra, inter, valid = problem()
    intra[0], inter[1], valid[2] = False, False, False
    terms = dual_mask_loss(predicted, target, intra, inter, valid)
    assert terms.has_intra.tolist() == [0, 1, 0, 1, 1]
    assert terms.has_inter.tolist() == [1, 0, 0, 1, 1]
    assert terms.intra[0] == terms.inter[1] == terms.loss[2] == 0
    torch.testing.assert_close(terms.loss[0], terms.inter[0])
    torch.testing.assert_close(terms.loss[1], terms.intra[1])


def test_loss_ignores_visible_and_invalid_targets() -> None:
    predicted, target, intra, inter, valid = problem()
    used = (intra | inter) & valid
    wild = torch.where(used[..., None], target, torch.nan)
    predicted = predicted.requires_grad_()
    terms = dual_mask_loss(predicted, wild, intra, inter, valid)
    terms.loss.sum().backward()
    assert torch.equal(terms.loss, dual_mask_loss(predicted, target, intra, inter, valid).loss)
    assert predicted.grad is not None and bool(predicted.grad.isfinite().all())
    assert torch.equal(predicted.grad.abs().sum(-1) > 0, used)


def test_loss_of_bf16_predictions_is_fp32() -> None:
    predicted, target, intra, inter, valid = problem()
    rounded = predicted.bfloat16()
    terms = dual_mask_loss(rounded, target, intra, inter, valid)
    assert terms.loss.dtype == terms.has_intra.dtype == torch.float32
    assert torch.equal(terms.loss, dual_mask_loss(rounded.float(), target, intra, inter, valid).loss)


def test_predict_zero_returns_zeros() -> None:
    assert not predict_zero(torch.randn(1, 2, 3, 200)).any()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 8), st.integers(0, 10**6))
def test_predict_interpolation_matches_numpy_interp(channels: int, patches: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, patches, 200, generator=generator, dtype=torch.float64)
    hidden = torch.rand(2, channels, patches, generator=generator) < 0.5
    valid = torch.rand(2, channels, patches, generator=generator) < 0.8
    seen = (~hidden & valid).numpy()
    given_x = torch.where(torch.from_numpy(seen)[..., None], x, torch.nan)
    result = predict_interpolation(given_x, hidden, valid).numpy().reshape(2, channels, -1)
    time = np.arange(patches * 200)
    for sample in range(2):
        for lead in range(channels):
            known = np.repeat(seen[sample, lead], 200)
            line = np.zeros(patches * 200)
            if known.any():
                line = np.interp(time, time[known], x[sample, lead].reshape(-1).numpy()[known])
            np.testing.assert_allclose(result[sample, lead], line, rtol=0, atol=1e-12)


def test_predict_interpolation_without_valid() -> None:
    ramp = torch.arange(1000.0).view(1, 1, 5, 200)
    hidden = torch.tensor([[[False, True, True, False, True]]])
    result = predict_interpolation(ramp, hidden)
    torch.testing.assert_close(result[..., :4, :], ramp[..., :4, :])
    assert (result[..., 4, :] == 799.0).all()
