"""The predictors to beat: zero, a straight line in time, and ridge regression across leads.

Leads predict each other even where no identity ties them, so a model that reconstructs a hidden lead has learnt
something only if it does so better than this.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LeadRidge:
    """A linear predictor of any leads from any others, each from the samples of the others at the same time.

    Attributes:
        moments: float64 ``[p, p]``, mean products of the regressors, p = 1 + channels x (2 context + 1): a one, then
            each channel at the times -context ... context.
        channels: how many.
        context: samples before and after.
        penalty: added to each regressor's mean square, as a share of their mean.
    """

    moments: Tensor
    channels: int
    context: int
    penalty: float

    def weights(self, visible: Tensor, whole: bool) -> Tensor:
        """The coefficients that predict every channel, float64 ``[regressors, channels]``.

        ``visible``: bool ``[channels]``. Regressors are an intercept, then each visible channel's samples: with
        ``whole`` those in the context too, channel by channel. The intercept is not penalised.
        """
        width = 2 * self.context + 1
        shifts = torch.arange(width) if whole else torch.tensor([self.context])
        seen = 1 + (torch.nonzero(visible) * width + shifts).flatten()
        chosen = torch.cat([torch.zeros(1, dtype=torch.int64), seen])
        told = 1 + torch.arange(self.channels) * width + self.context
        products = self.moments[chosen][:, chosen].clone()
        level = self.moments.diagonal()[1:].mean()
        products.diagonal()[1:] += self.penalty * level
        found: Tensor = torch.linalg.solve(products, self.moments[chosen][:, told])
        return found

    def predict(self, x: Tensor, visible: Tensor) -> Tensor:
        """What visible leads say about the others.

        Args:
            x: ``[batch, channel, patch, samples]``, patches following one another without a gap; anything, NaN
                included, where it is not visible.
            visible: bool ``[batch, channel, patch]``.

        Returns:
            Of the shape of ``x``; visible patches as they are. Context is used of leads that are visible as a whole or
            not at all in a sample; elsewhere a patch's neighbours may be hidden, and only the same time counts. Before
            the first and after the last sample their values are held.
        """
        batch, channels, patches, samples = x.shape
        seen = torch.where(visible.unsqueeze(-1), x, 0.0).double()
        whole = bool((visible == visible[:, :, :1]).all())
        if whole:
            rows, states = seen.reshape(batch, channels, patches * samples), visible[:, :, 0]
        else:
            rows = seen.transpose(1, 2).reshape(batch * patches, channels, samples)
            states = visible.transpose(1, 2).reshape(batch * patches, channels)
        found = torch.empty_like(rows)
        for state in torch.unique(states, dim=0):
            mine = torch.nonzero((states == state).all(dim=1)).flatten()
            given = rows[mine][:, state]
            if whole and self.context:
                given = _with_context(given, self.context)
            weights = self.weights(state, whole).to(rows.device)
            found[mine] = torch.einsum("nft,fc->nct", given, weights[1:]) + weights[0][:, None]
        if whole:
            guess = found.view(batch, channels, patches, samples)
        else:
            guess = found.view(batch, patches, channels, samples).transpose(1, 2)
        return torch.where(visible.unsqueeze(-1), x, guess.to(x.dtype))


def fit_lead_ridge(windows: Iterable[Tensor], context: int = 0, penalty: float = 1e-4) -> LeadRidge:
    """Fit all combinations of leads at once: they share their mean products.

    Args:
        windows: batches ``[batch, channel, time]``, finite, with all channels valid.
        context: samples before and after.
        penalty: see `LeadRidge`.

    Raises:
        ValueError: no windows.
    """
    total: Tensor | None = None
    count, channels = 0, 0
    for batch in windows:
        if not len(batch):
            continue
        x = _with_context(batch.double(), context)
        if context:
            x = x[:, :, context:-context]
        flat = x.transpose(0, 1).reshape(x.shape[1], -1)
        z = torch.cat([torch.ones(1, flat.shape[1], dtype=torch.float64), flat])
        total = z @ z.T if total is None else total + z @ z.T
        count, channels = count + z.shape[1], batch.shape[1]
    if total is None:
        raise ValueError("no windows to fit on")
    return LeadRidge(total / count, channels, context, penalty)


def _with_context(x: Tensor, context: int) -> Tensor:
    """``[batch, channel, time]`` -> ``[batch, channel x (2 context + 1), time]``: each channel shifted."""
    if not context:
        return x
    held = torch.nn.functional.pad(x, (context, context), mode="replicate")
    return held.unfold(2, x.shape[2], 1).flatten(1, 2)


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
