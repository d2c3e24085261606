"""Dual mask objective: masks over leads and over time, and the reconstruction loss.

The loss has two terms. *Inter*: leads hidden as a whole, predicted from other leads. *Intra*: patches hidden in time,
predicted from the lead's own context. The source (arXiv 2512.15250) publishes neither ratios nor how the two combine;
this design is ours. Its one hard rule: limb leads are linearly dependent (III = II - I, aVR = -(I + II)/2,
aVL = I - II/2, aVF = II - I/2), so two visible ones determine all others. At every patch the number of visible limb
leads is therefore none, one or all of them.

With `MaskConfig.lead_dropout` some samples have a subset of their leads only, as recorded by a device of 8, 2 or 1
leads; they are masked as if they had no others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from physio_dist.config.mask import MaskOptions
from physio_dist.errors import UserError
from physio_dist.runtime.arrays import BoolArray, Float64Array, Int64Array, UInt64Array
from physio_dist.runtime.seeding import seed_of

# Constants of splitmix64 (Steele, Lea, Flood 2014).
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


# Added to a lead's mean square in the `relative` loss: that of 10 uV, in units of (100 uV)^2.
_QUIET = 0.01
Layouts = tuple[tuple[tuple[int, ...], ...], ...]
"""Lead layouts: kinds of devices, each with alternative sets of channels, drawn uniformly."""


@dataclass(frozen=True)
class MaskConfig(MaskOptions):
    """Options of the mask, with the lead layouts of the data's channels.

    Attributes:
        layouts: sets of channels that ``lead_dropout`` chooses from.
    """

    layouts: Layouts = ()


@dataclass(frozen=True)
class DualMask:
    """Masks of a batch.

    Attributes:
        intra, inter: disjoint, bool ``[batch, channel, patch]``; leads hidden as a whole are ``inter``.
        kept_leads: bool ``[batch, channel]``, False for dropped leads, which are neither input nor target.
    """

    intra: BoolArray
    inter: BoolArray
    kept_leads: BoolArray

    @property
    def hidden(self) -> BoolArray:
        """Union of both parts, ``[batch, channel, patch]``."""
        return self.intra | self.inter


def sample_masks(
    config: MaskConfig,
    groups: Sequence[Sequence[int]],
    patches: int,
    seed: int,
    purpose: str,
    positions: Int64Array,
    valid: BoolArray | None = None,
) -> DualMask:
    """Sample the masks of a batch, each as a function of seed, purpose and position only.

    In time every group hides round(``intra_ratio`` x ``patches``) patches, the same in all its leads, but
    at least one and never all of them: scattered, or in spans, which wrap around the end of the window, so
    that every patch is hidden equally often. Spans are at least one visible patch apart, so there may be
    fewer and longer ones than ``span`` specifies.

    As a whole each single channel, and the limb group, is hidden with probability ``inter_ratio``; a hidden
    limb group keeps one lead, drawn uniformly, with probability 1/2. If no group is drawn to be hidden, the one with
    the smallest draw is; if nothing remains visible, the group with the largest draw is shown, or keeps one lead if
    it is the only group. Windows of one channel have no inter part, windows of one patch no intra part.

    Expected shares at ratios of 0.5 and 0.5 with 12 leads (six limb leads in one group, V1-V6), both parts
    in every sample, and an even number of patches: 0.480 of all patches inter, 0.260 intra, 0.740 hidden.

    Args:
        config: options.
        groups: partition of the channels: several linearly dependent (limb) leads, or one independent channel each.
        patches: of a window.
        seed: of the run.
        purpose: such as ``train``.
        positions: int64 ``[batch]``, global positions of the samples.
        valid: bool ``[batch, channel]``; a sample none of whose kept leads is valid keeps all leads.

    Raises:
        UserError: nothing can be hidden.
        ValueError: ``groups`` is no partition.
    """
    channels = sum(len(group) for group in groups)
    if channels == 0 or sorted(c for group in groups for c in group) != list(range(channels)):
        raise ValueError(f"groups {groups!r} are not a partition of the channels 0..n-1")
    if config.lead_dropout == 0.0:
        all_leads = np.ones((len(positions), channels), dtype=np.bool_)
        return DualMask(*_draw(config, groups, patches, seed, purpose, positions), all_leads)
    if not config.layouts or patches < 2:
        raise UserError(
            f"mask.lead_dropout={config.lead_dropout}: windows of {channels} channels x {patches} patches leave "
            "nothing to drop or to hide; it is for ECG of several leads and seconds"
        )
    kept = _draw_kept_leads(config, channels, seed, purpose, positions)
    if valid is not None:
        kept |= ~(kept & valid).any(axis=1, keepdims=True)
    intra = np.zeros((len(positions), channels, patches), dtype=np.bool_)
    inter = np.zeros_like(intra)
    for subset in np.unique(kept, axis=0):
        rows = np.flatnonzero((kept == subset).all(axis=1))
        leads = np.flatnonzero(subset)
        number = {int(lead): i for i, lead in enumerate(leads)}
        subgroups = [[number[lead] for lead in group if lead in number] for group in groups]
        masks = _draw(config, [group for group in subgroups if group], patches, seed, purpose, positions[rows])
        intra[np.ix_(rows, leads)], inter[np.ix_(rows, leads)] = masks
    return DualMask(intra, inter, kept)


def _draw_kept_leads(config: MaskConfig, channels: int, seed: int, purpose: str, positions: Int64Array) -> BoolArray:
    """Leads that each sample keeps, bool ``[batch, channels]``."""
    draw = _uniform(seed, f"{purpose}/drop", positions, 3)
    kept = np.ones((len(positions), channels), dtype=np.bool_)
    kind = (draw[:, 1] * len(config.layouts)).astype(np.int64)
    for row in np.flatnonzero(draw[:, 0] < config.lead_dropout):
        sets = config.layouts[kind[row]]
        kept[row] = np.isin(np.arange(channels), sets[int(draw[row, 2] * len(sets))])
    return kept


def _draw(
    config: MaskConfig,
    groups: Sequence[Sequence[int]],
    patches: int,
    seed: int,
    purpose: str,
    positions: Int64Array,
) -> tuple[BoolArray, BoolArray]:
    """Draw ``intra`` and ``inter`` of samples with all channels in ``groups``."""
    channels = sum(len(group) for group in groups)
    in_time = config.intra_ratio > 0.0 and patches > 1
    by_lead = config.inter_ratio > 0.0 and channels > 1
    if not in_time and not by_lead:
        missing = "mask.inter_ratio needs a second channel, mask.intra_ratio a second patch"
        raise UserError(f"windows of {channels} channels x {patches} patches: nothing to hide; {missing}")

    batch = len(positions)
    group_of = np.empty(channels, dtype=np.int64)
    for number, group in enumerate(groups):
        group_of[list(group)] = number

    def uniform(part: str, *shape: int) -> Float64Array:
        return _uniform(seed, f"{purpose}/{part}", positions, math.prod(shape)).reshape(batch, *shape)

    whole = np.zeros((batch, channels), dtype=np.bool_)
    if by_lead:
        draw = uniform("group", len(groups))
        hidden = _hide_groups(draw, config.inter_ratio)
        keeps = uniform("keep", len(groups)) < 0.5
        whole = _hide_leads(groups, draw, hidden, keeps, uniform("which", len(groups)))
    intra = np.zeros((batch, channels, patches), dtype=np.bool_)
    if in_time:
        count = min(max(math.floor(config.intra_ratio * patches + 0.5), 1), patches - 1)
        spot, start = uniform("scatter", len(groups), patches), uniform("span", len(groups))
        if config.span is None:
            scattered = uniform("style", 1) < 0.5
            intra = _hide_in_time(count, scattered, spot, start)[:, group_of]
        elif config.span <= 1.0:
            intra = _hide_in_time(count, np.ones((batch, 1), dtype=np.bool_), spot, start)[:, group_of]
        else:
            spans = np.floor(count / config.span + uniform("spans", len(groups))).astype(np.int64)
            intra = _hide_spans(count, spans, spot, start)[:, group_of]
    if config.mode == "alternating" and in_time and by_lead:
        lead_wise = uniform("mode", 1) < 0.5
        whole &= lead_wise
        intra &= ~lead_wise[:, :, None]
    inter = np.broadcast_to(whole[:, :, None], intra.shape).copy()
    return intra & ~inter, inter


def _hide_groups(draw: Float64Array, ratio: float) -> BoolArray:
    """Groups to hide, bool ``[batch, groups]``: those drawn below ``ratio``, at least one."""
    hidden = draw < ratio
    none = ~hidden.any(axis=1)
    hidden[none, draw[none].argmin(axis=1)] = True
    return hidden


def _hide_leads(
    groups: Sequence[Sequence[int]],
    draw: Float64Array,
    hidden: BoolArray,
    keeps: BoolArray,
    which: Float64Array,
) -> BoolArray:
    """Leads to hide as a whole, bool ``[batch, channels]``; at least one stays visible."""
    several = np.array([len(group) > 1 for group in groups])
    keeps = keeps & several
    dark = (hidden & ~keeps).all(axis=1)
    if len(groups) == 1:
        keeps[dark] = True
    else:
        hidden = hidden.copy()
        hidden[dark, draw[dark].argmax(axis=1)] = False
    whole = np.zeros((len(hidden), sum(len(group) for group in groups)), dtype=np.bool_)
    for number, group in enumerate(groups):
        leads = np.array(group)
        whole[:, leads] = hidden[:, number, None]
        rows = np.flatnonzero(hidden[:, number] & keeps[:, number])
        whole[rows, leads[(which[rows, number] * len(group)).astype(np.int64)]] = False
    return whole


def _hide_in_time(count: int, scattered: BoolArray, spot: Float64Array, start: Float64Array) -> BoolArray:
    """Hide ``count`` patches of every group, scattered or in one span.

    Args:
        count: number of patches.
        scattered: bool ``[batch, 1]``.
        spot: uniform draws ``[batch, groups, patches]``.
        start: uniform draws ``[batch, groups]``.

    Returns:
        bool ``[batch, groups, patches]``.
    """
    patches = spot.shape[2]
    rank = spot.argsort(axis=2, kind="stable").argsort(axis=2, kind="stable")
    first = (start * patches).astype(np.int64)[:, :, None]
    after = (np.arange(patches) - first) % patches
    chosen: BoolArray = np.where(scattered[:, :, None], rank, after) < count
    return chosen


def _hide_spans(count: int, spans: Int64Array, spot: Float64Array, start: Float64Array) -> BoolArray:
    """Hide ``count`` patches of every group in ``spans`` ``[batch, groups]`` spans; otherwise as `_hide_in_time`.

    The partitions of the hidden patches into spans, and of the others into gaps, are drawn uniformly.
    """
    patches = spot.shape[2]
    cuts = np.clip(spans, 1, min(count, patches - count))[:, :, None] - 1

    def part(draw: Float64Array) -> Int64Array:
        """Number of the part that each patch belongs to; cuts fall between two patches."""
        rank = draw[:, :, 1:].argsort(axis=2, kind="stable").argsort(axis=2, kind="stable")
        numbers: Int64Array = np.zeros(draw.shape, dtype=np.int64)
        numbers[:, :, 1:] = (rank < cuts).cumsum(axis=2)
        return numbers

    # Alternating spans and gaps: sorted by twice the number of the part, plus one for gaps.
    order = np.concatenate([2 * part(spot[:, :, :count]), 2 * part(spot[:, :, count:]) + 1], axis=2)
    hidden = order.argsort(axis=2, kind="stable") < count
    first = (start * patches).astype(np.int64)[:, :, None]
    turned: BoolArray = np.take_along_axis(hidden, (np.arange(patches) - first) % patches, axis=2)
    return turned


def _mix(x: UInt64Array) -> UInt64Array:
    """The output function of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _uniform(seed: int, purpose: str, positions: Int64Array, count: int) -> Float64Array:
    """Uniform draws in [0, 1), ``[batch, count]``: a hash of (seed, purpose, position, number of the draw).

    A counter-based hash is vectorised over samples and, unlike NumPy's generators, fixed for all future releases.
    """
    key = np.uint64(seed_of(f"{seed}\n{purpose}", byteorder="little"))
    position = np.asarray(positions).astype(np.uint64).reshape(-1, 1)
    number = np.arange(1, count + 1, dtype=np.uint64)
    bits = _mix(_mix(position * _GAMMA + key) + number * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class LossTerms:
    """Loss terms of each sample, ``[batch]``, fp32 (fp64 for fp64 input).

    Attributes:
        loss: mean error over all hidden and valid patches; see :func:`dual_mask_loss`.
        intra, inter: mean error over the patches of one term; 0 if there are none.
        has_intra, has_inter: 1 if the sample has patches of the term, else 0.
    """

    loss: Tensor
    intra: Tensor
    inter: Tensor
    has_intra: Tensor
    has_inter: Tensor


def dual_mask_loss(
    predicted: Tensor, target: Tensor, intra: Tensor, inter: Tensor, valid: Tensor | None = None, kind: str = "squared"
) -> LossTerms:
    """Mean error over hidden and valid patches of each sample.

    The kind ``squared`` is the squared error, in units of the input squared; it is dominated by samples and leads of
    large amplitude. The kind ``relative`` divides it, lead by lead, by the lead's mean square in the sample (hidden or
    not) plus that of 10 uV, so that predicting zero gives about 1 everywhere.

    Args:
        predicted: ``[batch, channel, patch, 200]``, in units of 100 uV.
        target: of the same shape. May be NaN except in hidden and valid patches; for ``relative``, in valid ones.
        intra, inter: disjoint, bool ``[batch, channel, patch]``.
        valid: bool of that shape; None if everything is.
        kind: ``squared`` or ``relative``.
    """
    if valid is not None:
        intra, inter = intra & valid, inter & valid
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    error = predicted.to(dtype) - target.to(dtype)
    # Before the square, so that the gradient of an excluded patch is zero and not 0 x NaN.
    error = torch.where((intra | inter).unsqueeze(-1), error, 0.0)
    per_patch = error.square().mean(dim=-1)
    if kind == "relative":
        per_patch = per_patch / (_mean_square(target.to(dtype), valid) + _QUIET)

    def total(mask: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(mask, per_patch, 0.0).sum(dim=(1, 2)), mask.sum(dim=(1, 2)).to(dtype)

    intra_sum, intra_count = total(intra)
    inter_sum, inter_count = total(inter)
    return LossTerms(
        loss=(intra_sum + inter_sum) / (intra_count + inter_count).clamp_min(1.0),
        intra=intra_sum / intra_count.clamp_min(1.0),
        inter=inter_sum / inter_count.clamp_min(1.0),
        has_intra=intra_count.clamp_max(1.0),
        has_inter=inter_count.clamp_max(1.0),
    )


def _mean_square(x: Tensor, valid: Tensor | None) -> Tensor:
    """Mean square of each channel over its valid patches, ``[batch, channel, 1]``; 0 if there are none."""
    if valid is None:
        return x.square().mean(dim=(2, 3)).unsqueeze(-1)
    power = torch.where(valid.unsqueeze(-1), x, 0.0).square().mean(dim=-1)
    return power.sum(dim=-1, keepdim=True) / valid.sum(dim=-1, keepdim=True).clamp_min(1)
