"""The dual mask: which patches are hidden, how well the hidden ones are predicted, and whom to beat.

Two terms. *Inter*: a lead hidden as a whole, to be told from the other leads. *Intra*: patches hidden in
time, to be told from the lead's own context. The source (arXiv 2512.15250) publishes neither ratios nor how
the two combine; what stands here is our own design. Its one hard rule: limb leads are linearly dependent
(III = II - I, aVR = -(I + II)/2, aVL = I - II/2, aVF = II - I/2), so two visible ones give all others by
arithmetic. At every patch the number of visible limb leads is therefore none, one or all of them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from physio_dist.errors import UserError

# Constants of splitmix64 (Steele, Lea, Flood 2014).
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class MaskConfig:
    """How much is hidden.

    ``intra_ratio``: share of patches hidden in time in every group of leads; ``inter_ratio``: probability
    that a single lead, or the limb leads together, are hidden as a whole. Raises ``UserError`` outside 0 <=
    ratio < 1 (at 1 everything would be hidden) or with both 0.
    """

    intra_ratio: float
    inter_ratio: float

    def __post_init__(self) -> None:
        for name in ("intra_ratio", "inter_ratio"):
            value = getattr(self, name)
            if not 0.0 <= value < 1.0:
                raise UserError(f"mask.{name} is {value}: it has to be at least 0 and below 1")
        if self.intra_ratio == 0.0 and self.inter_ratio == 0.0:
            raise UserError("mask.intra_ratio and mask.inter_ratio are both 0: nothing would be hidden")


@dataclass(frozen=True)
class DualMask:
    """Disjoint bool arrays ``[batch, channel, patch]``; a lead hidden as a whole counts as ``inter``."""

    intra: NDArray[np.bool_]
    inter: NDArray[np.bool_]

    @property
    def hidden(self) -> NDArray[np.bool_]:
        """All that is hidden, ``[batch, channel, patch]``."""
        return self.intra | self.inter


def draw_masks(
    config: MaskConfig,
    groups: Sequence[Sequence[int]],
    patches: int,
    seed: int,
    purpose: str,
    positions: NDArray[np.int64],
) -> DualMask:
    """The masks of the samples at global ``positions`` ``[batch]``: functions of seed, purpose and position.

    ``groups`` partitions the channels: a group of several is a set of linearly dependent (limb) leads, a
    group of one an independent channel.

    In time every group hides round(``intra_ratio`` x ``patches``) patches, the same in all its leads, but
    at least one and never all of them; half of the samples draw them scattered, the other half as one span.
    The span goes around the end of the window, so that every patch is hidden equally often. As a whole each
    single channel, and the limb group, is hidden with probability ``inter_ratio``; a hidden limb group
    keeps, in one case of two, one lead drawn evenly. If no group came out hidden, the one nearest to it is;
    if nothing remained visible, the group farthest from being hidden is shown, or, where it is the only
    group, keeps its one lead. With one channel the lead-wise part, with one patch the part in time drops
    out.

    Expected shares at ratios of 0.5 and 0.5 with 12 leads (six limb leads in one group, V1-V6) and an even
    number of patches: 0.480 of all patches inter, 0.260 intra, 0.740 hidden.

    Raises ``UserError`` where that leaves nothing to hide, ``ValueError`` where ``groups`` is no partition.
    """
    channels = sum(len(group) for group in groups)
    if channels == 0 or sorted(c for group in groups for c in group) != list(range(channels)):
        raise ValueError(f"groups {groups!r} are not a partition of the channels 0..n-1")
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
        scattered = uniform("style", 1) < 0.5
        spot = uniform("scatter", len(groups), patches)
        start = uniform("span", len(groups))
        intra = _hide_in_time(count, scattered, spot, start)[:, group_of]
    inter = np.broadcast_to(whole[:, :, None], intra.shape).copy()
    return DualMask(intra=intra & ~inter, inter=inter)


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
    digest = hashlib.blake2b(f"{seed}\n{purpose}".encode(), digest_size=8).digest()
    key = np.uint64(int.from_bytes(digest, "little"))
    position = np.asarray(positions).astype(np.uint64).reshape(-1, 1)
    number = np.arange(1, count + 1, dtype=np.uint64)
    bits = _mix(_mix(position * _GAMMA + key) + number * _GAMMA)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


@dataclass(frozen=True)
class LossTerms:
    """Per-sample tensors ``[batch]``, fp32 (fp64 for fp64 input), in units of the input squared.

    ``loss``: mean squared error over all hidden and valid samples; ``intra``, ``inter``: over those of one
    term; ``has_intra``, ``has_inter``: 1 where the term exists in the sample, else 0, and the mean is then
    0.
    """

    loss: Tensor
    intra: Tensor
    inter: Tensor
    has_intra: Tensor
    has_inter: Tensor


def dual_mask_loss(
    predicted: Tensor, target: Tensor, intra: Tensor, inter: Tensor, valid: Tensor | None = None
) -> LossTerms:
    """Mean squared error over hidden and valid patches, sample by sample.

    ``predicted``, ``target``: ``[batch, channel, patch, 200]``; ``intra``, ``inter`` (disjoint) and
    ``valid``: bool ``[batch, channel, patch]``. The target may hold anything, NaN included, where it is not
    both hidden and valid. The caller weights samples and averages them.
    """
    if valid is not None:
        intra, inter = intra & valid, inter & valid
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    error = predicted.to(dtype) - target.to(dtype)
    # where before the square: the gradient at a patch left out is then zero and not 0 x NaN.
    error = torch.where((intra | inter).unsqueeze(-1), error, 0.0)
    per_patch = error.square().mean(dim=-1)

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


def predict_zero(x: Tensor) -> Tensor:
    """The predictor that says zero everywhere, ``[batch, channel, patch, 200]``."""
    return torch.zeros_like(x)


def predict_interpolation(x: Tensor, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
    """The predictor that draws a straight line in time, lead by lead, across what is hidden or invalid.

    ``x`` ``[batch, channel, patch, samples]``, patches following one another without a gap; ``hidden`` and
    ``valid`` bool ``[batch, channel, patch]``. The line joins the nearest visible samples on both sides;
    before the first and after the last visible sample their value is held; a lead with nothing visible is
    zero. Visible patches come back as they are. Finite wherever the visible patches are.
    """
    visible = ~hidden if valid is None else ~hidden & valid
    patches, samples = x.shape[2], x.shape[3]
    number = torch.arange(patches, device=x.device).expand(visible.shape)
    before = torch.where(visible, number, -1).cummax(dim=2).values
    after = torch.where(visible, number, patches).flip(2).cummin(dim=2).values.flip(2)
    has_before, has_after = before >= 0, after < patches

    left = x[..., -1].gather(2, before.clamp_min(0))
    right = x[..., 0].gather(2, after.clamp_max(patches - 1))
    # Where one side has nothing visible the other's value is held on both ends of the line.
    left, right = torch.where(has_before, left, right), torch.where(has_after, right, left)

    time = (number * samples).unsqueeze(-1) + torch.arange(samples, device=x.device)
    begin = ((before + 1) * samples - 1).unsqueeze(-1)
    end = (after * samples).unsqueeze(-1)
    part = (time - begin).to(x.dtype) / (end - begin).clamp_min(1).to(x.dtype)
    line = left.unsqueeze(-1) + (right - left).unsqueeze(-1) * part
    line = torch.where((has_before | has_after).unsqueeze(-1), line, 0.0)
    return torch.where(visible.unsqueeze(-1), x, line)
