"""Baseline predictors of hidden patches: zero, linear interpolation in time, and ridge regression across leads.

Leads are correlated beyond their exact identities, so the reconstruction of a hidden lead has to be compared with a
linear prediction from the visible ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LeadRidge:
    """Linear prediction of any leads from any others, sample by sample, with optional context in time.

    Attributes:
        moments: float64 ``[p, p]``, mean products of the regressors, p = 1 + channels x (2 context + 1): a one, then
            each channel at the times -context ... context.
        channels: number of channels.
        context: number of samples before and after.
        penalty: ridge penalty, as a fraction of the regressors' mean mean square.
    """

    moments: Tensor
    channels: int
    context: int
    penalty: float

    def weights(self, visible: Tensor, with_context: bool) -> Tensor:
        """Coefficients of all channels, float64 ``[regressors, channels]``; the intercept is not penalised.

        Args:
            visible: bool ``[channels]``.
            with_context: whether the regressors, an intercept and each visible channel's sample, include the context.
        """
        width = 2 * self.context + 1
        shifts = torch.arange(width) if with_context else torch.tensor([self.context])
        seen = 1 + (torch.nonzero(visible) * width + shifts).flatten()
        chosen = torch.cat([torch.zeros(1, dtype=torch.int64), seen])
        targets = 1 + torch.arange(self.channels) * width + self.context
        products = self.moments[chosen][:, chosen].clone()
        level = self.moments.diagonal()[1:].mean()
        products.diagonal()[1:] += self.penalty * level
        coefficients: Tensor = torch.linalg.solve(products, self.moments[chosen][:, targets])
        return coefficients

    def predict(self, x: Tensor, visible: Tensor) -> Tensor:
        """Predict hidden leads from visible ones.

        Args:
            x: ``[batch, channel, patch, samples]``, patches following one another without a gap; anything, NaN
                included, where it is not visible.
            visible: bool ``[batch, channel, patch]``.

        Returns:
            Tensor of the shape of ``x``, with visible patches unchanged. Context is used if every lead is visible as a
            whole or not at all; otherwise a patch's neighbours may be hidden, and only the same time is used. At the
            ends of a window its first and last samples are repeated.
        """
        batch, channels, patches, samples = x.shape
        seen = torch.where(visible.unsqueeze(-1), x, 0.0).double()
        whole_leads = bool((visible == visible[:, :, :1]).all())
        if whole_leads:
            rows, states = seen.reshape(batch, channels, patches * samples), visible[:, :, 0]
        else:
            rows = seen.transpose(1, 2).reshape(batch * patches, channels, samples)
            states = visible.transpose(1, 2).reshape(batch * patches, channels)
        predicted = torch.empty_like(rows)
        for state in torch.unique(states, dim=0):
            members = torch.nonzero((states == state).all(dim=1)).flatten()
            regressors = rows[members][:, state]
            if whole_leads and self.context:
                regressors = _with_context(regressors, self.context)
            weights = self.weights(state, whole_leads).to(rows.device)
            predicted[members] = torch.einsum("nft,fc->nct", regressors, weights[1:]) + weights[0][:, None]
        if whole_leads:
            guess = predicted.view(batch, channels, patches, samples)
        else:
            guess = predicted.view(batch, patches, channels, samples).transpose(1, 2)
        return torch.where(visible.unsqueeze(-1), x, guess.to(x.dtype))


def fit_lead_ridge(windows: Iterable[Tensor], context: int = 0, penalty: float = 1e-4) -> LeadRidge:
    """Fit the mean products, from which the coefficients of every combination of leads follow.

    Args:
        windows: batches ``[batch, channel, time]``, finite, with all channels valid.
        context: number of samples before and after.
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
    """Predict zero everywhere, ``[batch, channel, patch, 200]``."""
    return torch.zeros_like(x)


def predict_interpolation(x: Tensor, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
    """Interpolate linearly in time, lead by lead, across hidden or invalid patches.

    The line joins the nearest visible samples on both sides. Before the first and after the last visible sample their
    value is repeated; a lead without visible patches is zero. Visible patches are unchanged.

    Args:
        x: ``[batch, channel, patch, samples]``, consecutive patches; hidden and invalid ones may be NaN.
        hidden, valid: bool ``[batch, channel, patch]``.
    """
    visible = ~hidden if valid is None else ~hidden & valid
    patches, samples = x.shape[2], x.shape[3]
    number = torch.arange(patches, device=x.device).expand(visible.shape)
    before = torch.where(visible, number, -1).cummax(dim=2).values
    after = torch.where(visible, number, patches).flip(2).cummin(dim=2).values.flip(2)
    has_before, has_after = before >= 0, after < patches

    left = x[..., -1].gather(2, before.clamp_min(0))
    right = x[..., 0].gather(2, after.clamp_max(patches - 1))
    # If one side has nothing visible, the line is constant at the other's value.
    left, right = torch.where(has_before, left, right), torch.where(has_after, right, left)

    time = (number * samples).unsqueeze(-1) + torch.arange(samples, device=x.device)
    begin = ((before + 1) * samples - 1).unsqueeze(-1)
    end = (after * samples).unsqueeze(-1)
    part = (time - begin).to(x.dtype) / (end - begin).clamp_min(1).to(x.dtype)
    line = left.unsqueeze(-1) + (right - left).unsqueeze(-1) * part
    line = torch.where((has_before | has_after).unsqueeze(-1), line, 0.0)
    return torch.where(visible.unsqueeze(-1), x, line)
