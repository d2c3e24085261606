"""The dual mask: which patches are hidden, and how well the hidden ones are predicted.

Two terms. *Inter*: a lead hidden as a whole, to be told from the other leads. *Intra*: patches hidden in
time, to be told from the lead's own context. The source (arXiv 2512.15250) publishes neither ratios nor how
the two combine; what stands here is our own design. Its one hard rule: limb leads are linearly dependent
(III = II - I, aVR = -(I + II)/2, aVL = I - II/2, aVF = II - I/2), so two visible ones give all others by
arithmetic. At every patch the number of visible limb leads is therefore none, one or all of them.

A sample may also be shown with some of its leads only (`MaskConfig.lead_dropout`), as a recorder of 8, 2 or 1 leads
would have taken it; it is then masked as if it had no others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physio_dist.config.mask import MaskOptions
from physio_dist.errors import UserError
from physio_dist.runtime.seeding import seed_of

# Constants of splitmix64 (Steele, Lea, Flood 2014).
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


# Of `relative`: the mean square of 10 uV, in units of (100 uV)^2, below which a lead counts as having nothing to tell.
_QUIET = 0.01
Layouts = tuple[tuple[tuple[int, ...], ...], ...]
"""Kinds of recorders, each a choice of sets of channels of which a sample is shown one, drawn evenly."""


@dataclass(frozen=True)
class MaskConfig(MaskOptions):
    """Options of the mask, and what they mean for the data's channels.

    Attributes:
        layouts: sets of channels that ``lead_dropout`` shows a sample with.
    """

    layouts: Layouts = ()


@dataclass(frozen=True)
class DualMask:
    """Disjoint bool arrays ``[batch, channel, patch]``; a lead hidden as a whole counts as ``inter``.

    ``shown``: bool ``[batch, channel]``, False for leads that were dropped: they are neither seen nor told,
    and never ``intra`` or ``inter``.
    """

    intra: NDArray[np.bool_]
    inter: NDArray[np.bool_]
    shown: NDArray[np.bool_]

    @property
    def hidden(self) -> NDArray[np.bool_]:
        """All that is hidden, ``[batch, channel, patch]``."""
        return self.intra | self.inter


def sample_masks(
    config: MaskConfig,
    groups: Sequence[Sequence[int]],
    patches: int,
    seed: int,
    purpose: str,
    positions: NDArray[np.int64],
    valid: NDArray[np.bool_] | None = None,
) -> DualMask:
    """The masks of the samples at global ``positions`` ``[batch]``: functions of seed, purpose and position.

    ``groups`` partitions the channels: a group of several is a set of linearly dependent (limb) leads, a
    group of one an independent channel. ``valid`` bool ``[batch, channel]``: of a sample in which none of the
    leads to be shown is valid all are shown; nothing else depends on it.

    In time every group hides round(``intra_ratio`` x ``patches``) patches, the same in all its leads, but
    at least one and never all of them: scattered, or in spans, which go around the end of the window, so
    that every patch is hidden equally often. Spans are at least one visible patch apart, so that there may be
    fewer and longer ones than ``span`` asks for.

    As a whole each single channel, and the limb group, is hidden with probability ``inter_ratio``; a hidden
    limb group keeps, in one case of two, one lead drawn evenly. If no group came out hidden, the one nearest
    to it is; if nothing remained visible, the group farthest from being hidden is shown, or, where it is the
    only group, keeps its one lead. With one channel the lead-wise part, with one patch the part in time drops
    out.

    Expected shares at ratios of 0.5 and 0.5 with 12 leads (six limb leads in one group, V1-V6), both parts
    in every sample, and an even number of patches: 0.480 of all patches inter, 0.260 intra, 0.740 hidden.

    Raises ``UserError`` where that leaves nothing to hide, ``ValueError`` where ``groups`` is no partition.
    """
    channels = sum(len(group) for group in groups)
    if channels == 0 or sorted(c for group in groups for c in group) != list(range(channels)):
        raise ValueError(f"groups {groups!r} are not a partition of the channels 0..n-1")
    if config.lead_dropout == 0.0:
        whole = np.ones((len(positions), channels), dtype=np.bool_)
        return DualMask(*_draw(config, groups, patches, seed, purpose, positions), whole)
    if not config.layouts or patches < 2:
        raise UserError(
            f"mask.lead_dropout={config.lead_dropout}: windows of {channels} channels x {patches} patches leave "
            "nothing to drop or to hide; it is for ECG of several leads and seconds"
        )
    shown = _shown(config, channels, seed, purpose, positions)
    if valid is not None:
        shown |= ~(shown & valid).any(axis=1, keepdims=True)
    intra = np.zeros((len(positions), channels, patches), dtype=np.bool_)
    inter = np.zeros_like(intra)
    for leads in np.unique(shown, axis=0):
        rows = np.flatnonzero((shown == leads).all(axis=1))
        here = np.flatnonzero(leads)
        number = {int(lead): i for i, lead in enumerate(here)}
        left = [[number[lead] for lead in group if lead in number] for group in groups]
        found = _draw(config, [group for group in left if group], patches, seed, purpose, positions[rows])
        intra[np.ix_(rows, here)], inter[np.ix_(rows, here)] = found
    return DualMask(intra, inter, shown)


def _shown(
    config: MaskConfig, channels: int, seed: int, purpose: str, positions: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Which leads each sample is shown with, ``[batch, channels]``."""
    draw = _uniform(seed, f"{purpose}/drop", positions, 3)
    shown = np.ones((len(positions), channels), dtype=np.bool_)
    kind = (draw[:, 1] * len(config.layouts)).astype(np.int64)
    for row in np.flatnonzero(draw[:, 0] < config.lead_dropout):
        sets = config.layouts[kind[row]]
        shown[row] = np.isin(np.arange(channels), sets[int(draw[row, 2] * len(sets))])
    return shown


def _draw(
    config: MaskConfig,
    groups: Sequence[Sequence[int]],
    patches: int,
    seed: int,
    purpose: str,
    positions: NDArray[np.int64],
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """``intra`` and ``inter`` of samples that have all of the channels in ``groups``."""
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

    def uniform(part: str, *shape: int) -> NDArray[np.float64]:
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


def _hide_groups(draw: NDArray[np.float64], ratio: float) -> NDArray[np.bool_]:
    """Which groups are hidden, ``[batch, groups]``: those drawn below ``ratio``, and always at least one."""
    hidden = draw < ratio
    none = ~hidden.any(axis=1)
    hidden[none, draw[none].argmin(axis=1)] = True
    return hidden


def _hide_leads(
    groups: Sequence[Sequence[int]],
    draw: NDArray[np.float64],
    hidden: NDArray[np.bool_],
    keeps: NDArray[np.bool_],
    which: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Which leads are hidden as a whole, ``[batch, channels]``; at least one is not."""
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


def _hide_in_time(
    count: int, scattered: NDArray[np.bool_], spot: NDArray[np.float64], start: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """``count`` patches of every group, ``[batch, groups, patches]``.

    ``scattered`` ``[batch, 1]``, ``spot`` ``[batch, groups, patches]``, ``start`` ``[batch, groups]``:
    uniform draws.
    """
    patches = spot.shape[2]
    rank = spot.argsort(axis=2, kind="stable").argsort(axis=2, kind="stable")
    first = (start * patches).astype(np.int64)[:, :, None]
    after = (np.arange(patches) - first) % patches
    chosen: NDArray[np.bool_] = np.where(scattered[:, :, None], rank, after) < count
    return chosen


def _hide_spans(
    count: int, spans: NDArray[np.int64], spot: NDArray[np.float64], start: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """``count`` patches of every group in ``spans`` ``[batch, groups]`` spans, else as `_hide_in_time`.

    How the hidden patches are shared out among the spans, and the others among the gaps, is drawn evenly from
    all ways to do so.
    """
    patches = spot.shape[2]
    cuts = np.clip(spans, 1, min(count, patches - count))[:, :, None] - 1

    def part(draw: NDArray[np.float64]) -> NDArray[np.int64]:
        """For each of some patches in a row, in which of the parts it is: cuts fall between two of them."""
        rank = draw[:, :, 1:].argsort(axis=2, kind="stable").argsort(axis=2, kind="stable")
        numbers: NDArray[np.int64] = np.zeros(draw.shape, dtype=np.int64)
        numbers[:, :, 1:] = (rank < cuts).cumsum(axis=2)
        return numbers

    # Span, gap, span, gap: sorted by twice the number of the part, plus one for gaps.
    order = np.concatenate([2 * part(spot[:, :, :count]), 2 * part(spot[:, :, count:]) + 1], axis=2)
    hidden = order.argsort(axis=2, kind="stable") < count
    first = (start * patches).astype(np.int64)[:, :, None]
    turned: NDArray[np.bool_] = np.take_along_axis(hidden, (np.arange(patches) - first) % patches, axis=2)
    return turned


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def _uniform(seed: int, purpose: str, positions: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Uniform draws in [0, 1), ``[batch, count]``: a hash of (seed, purpose, position, number of the draw).

    A counter-based hash rather than a numpy generator: it is vectorised over samples and stays the same for
    ever, which numpy's streams do not promise.
    """
    key = np.uint64(seed_of(f"{seed}\n{purpose}", byteorder="little"))
    position = np.asarray(positions).astype(np.uint64).reshape(-1, 1)
    number = np.arange(1, count + 1, dtype=np.uint64)
    bits = _mix(_mix(position * _GAMMA + key) + number * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class LossTerms:
    """Per-sample tensors ``[batch]``, fp32 (fp64 for fp64 input).

    ``loss``: mean error over all hidden and valid samples, as :func:`dual_mask_loss` says; ``intra``, ``inter``: over
    those of one term; ``has_intra``, ``has_inter``: 1 where the term exists in the sample, else 0, as the mean then is.
    """

    loss: Tensor
    intra: Tensor
    inter: Tensor
    has_intra: Tensor
    has_inter: Tensor


def dual_mask_loss(
    predicted: Tensor, target: Tensor, intra: Tensor, inter: Tensor, valid: Tensor | None = None, kind: str = "squared"
) -> LossTerms:
    """Mean error over hidden and valid patches, sample by sample.

    ``kind`` ``squared``: the squared error, in units of the input squared. ``relative``: that, lead by lead, by the
    mean square of the lead in this sample, hidden or not, plus that of 10 uV (input in units of 100 uV): about 1 where
    zero is predicted. A squared error is mostly that of the few loudest samples and leads; this way each counts alike.

    ``predicted``, ``target``: ``[batch, channel, patch, 200]``; ``intra``, ``inter`` (disjoint) and
    ``valid``: bool ``[batch, channel, patch]``. The target may hold anything, NaN included, where it is not
    both hidden and valid; for ``relative`` where it is not valid. The caller weights samples and averages them.
    """
    if valid is not None:
        intra, inter = intra & valid, inter & valid
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    error = predicted.to(dtype) - target.to(dtype)
    # where before the square: the gradient at a patch left out is then zero and not 0 x NaN.
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
    """Of each channel over its valid patches, ``[batch, channel, 1]``; 0 where there is none."""
    if valid is None:
        return x.square().mean(dim=(2, 3)).unsqueeze(-1)
    power = torch.where(valid.unsqueeze(-1), x, 0.0).square().mean(dim=-1)
    return power.sum(dim=-1, keepdim=True) / valid.sum(dim=-1, keepdim=True).clamp_min(1)
