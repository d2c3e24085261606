"""The peer of the step bench: CBraMod's mathematics written the plain way, after the structure of its reference.

``nn.MultiheadAttention`` for both axes, an FFT, torch's own norms and dropout, boolean indexing for the mask and for
the loss. Modules have the reference's names, so that its checkpoints load as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from physio_dist.models.encoders.criss_cross import EncoderConfig


class PatchEmbedding(nn.Module):
    """Patches of 200 samples -> features."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        f, d = config.filters, config.d
        self.mask_encoding = nn.Parameter(torch.zeros(config.patch), requires_grad=False)
        self.proj_in = nn.Sequential(
            nn.Conv2d(1, f, (1, 49), stride=(1, 25), padding=(0, 24)), nn.GroupNorm(5, f), nn.GELU(),
            nn.Conv2d(f, f, (1, 3), padding=(0, 1)), nn.GroupNorm(5, f), nn.GELU(),
            nn.Conv2d(f, f, (1, 3), padding=(0, 1)), nn.GroupNorm(5, f), nn.GELU(),
        )  # fmt: skip
        self.spectral_proj = nn.Sequential(nn.Linear(config.patch // 2 + 1, d), nn.Dropout(config.dropout))
        self.positional_encoding = nn.Sequential(nn.Conv2d(d, d, (19, 7), padding=(9, 3), groups=d))

    def forward(self, x: Tensor, hidden: Tensor | None) -> Tensor:
        """``x`` ``[batch, channel, patch, 200]``, ``hidden`` bool ``[batch, channel, patch]`` -> features."""
        batch, channels, patches, samples = x.shape
        if hidden is not None:
            x = x.clone()
            x[hidden] = self.mask_encoding.to(x.dtype)
        embedded = self.proj_in(x.reshape(batch, 1, channels * patches, samples))
        embedded = embedded.permute(0, 2, 1, 3).reshape(batch, channels, patches, -1)
        spectrum = torch.fft.rfft(x, dim=-1, norm="forward").abs()
        embedded = embedded + self.spectral_proj(spectrum)
        position = self.positional_encoding(embedded.permute(0, 3, 1, 2))
        features: Tensor = embedded + position.permute(0, 2, 3, 1)
        return features


class Layer(nn.Module):
    """Criss-cross attention and a feed-forward part, norms first."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        d, p = config.d, config.dropout
        self.self_attn_s = nn.MultiheadAttention(d // 2, config.heads // 2, dropout=p, batch_first=True)
        self.self_attn_t = nn.MultiheadAttention(d // 2, config.heads // 2, dropout=p, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(d, config.ffn), nn.Linear(config.ffn, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.dropout, self.dropout1, self.dropout2 = nn.Dropout(p), nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[batch, channel, patch, d]`` -> the same shape."""
        x = x + self.dropout1(self._attend(self.norm1(x)))
        wide = self.dropout(F.gelu(self.linear1(self.norm2(x))))
        result: Tensor = x + self.dropout2(self.linear2(wide))
        return result

    def _attend(self, x: Tensor) -> Tensor:
        batch, channels, patches, d = x.shape
        s, t = x[..., : d // 2], x[..., d // 2 :]
        s = s.transpose(1, 2).reshape(batch * patches, channels, d // 2)
        t = t.reshape(batch * channels, patches, d // 2)
        s = self.self_attn_s(s, s, s, need_weights=False)[0]
        t = self.self_attn_t(t, t, t, need_weights=False)[0]
        s = s.reshape(batch, patches, channels, d // 2).transpose(1, 2)
        return torch.cat((s, t.reshape(batch, channels, patches, d // 2)), dim=3)


class Encoder(nn.Module):
    """The layers, one after the other."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` ``[batch, channel, patch, d]`` -> the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x


class PlainModel(nn.Module):
    """Plain implementation of ``MaskedModel`` without ``valid``."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.encoder = Encoder(config)
        self.proj_out = nn.Sequential(nn.Linear(config.d, config.patch))

    def features(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Features ``[batch, channel, patch, d]``."""
        features: Tensor = self.encoder(self.patch_embedding(x, hidden))
        return features

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Predictions ``[batch, channel, patch, 200]``."""
        predicted: Tensor = self.proj_out(self.features(x, hidden))
        return predicted


def plain_loss(predicted: Tensor, target: Tensor, hidden: Tensor) -> Tensor:
    """Mean over windows of the mean squared error over each window's hidden patches, gathered by the mask."""
    error = F.mse_loss(predicted[hidden].float(), target[hidden], reduction="none").mean(dim=-1)
    each = hidden.sum(dim=(1, 2))
    return (error / each.repeat_interleave(each)).sum() / len(each)
