"""The criss-cross encoder: patch embedding, conditional position, attention over leads and over time.

The mathematics is CBraMod's (Wang et al., arXiv 2412.07236): with weights converted by
`physio_dist.models.cbramod` the features agree with the reference implementation to rounding. What is ours is
the arrangement (fused projections and attention, no operation whose output size depends on data) and
``valid``, which keeps patches of bad leads and of padding from influencing anything.

Arithmetic: normalisation statistics, the spectrum and the residual stream stay in fp32 (or fp64) under
autocast and when the module is cast to bf16 or fp16 as DeepSpeed does; matrix products and convolutions
take the low precision.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from physio_dist.errors import UserError, nearest
from physio_dist.models.encoders.primitives import at_least_fp32, attend, drop, like, linear

PATCH = 200
"""Samples in a patch: one second at 200 Hz."""
UNIT_UV = 100.0
"""The unit of an encoder's input, in microvolts, as in CBraMod."""

# The patch embedding's constants, all from the CBraMod paper: eight positions a patch, five norm groups.
_POSITIONS = 8
_NORM_GROUPS = 5
_FIRST_KERNEL = 49
_FIRST_STRIDE = 25
_NEXT_KERNEL = 3
_REACH = (19, 7)


@dataclass(frozen=True)
class EncoderConfig:
    """Shape of an encoder.

    Attributes:
        d: width of a feature.
        layers: number of layers.
        heads: attention heads of a layer, half of them over leads and half over time.
        ffn: width of the feed-forward layer.
        dropout: probability; at 0 no time is spent on it.
        patch: samples per patch.

    Raises:
        UserError: the numbers do not fit together.
    """

    d: int
    layers: int
    heads: int
    ffn: int
    dropout: float = 0.1
    patch: int = PATCH

    def __post_init__(self) -> None:
        unit = _POSITIONS * _NORM_GROUPS
        if self.patch != PATCH:
            raise UserError(f"encoder: patch is {self.patch}: the patch embedding is made for {PATCH} samples")
        if min(self.d, self.layers, self.heads, self.ffn) < 1:
            raise UserError("encoder: d, layers, heads and ffn have to be at least 1")
        if self.d % unit:
            raise UserError(f"encoder: d is {self.d}: it has to be a multiple of {unit}")
        if self.heads % 2 or (self.d // 2) % (self.heads // 2):
            raise UserError(
                f"encoder: heads is {self.heads}: half of them share {self.d // 2} features over leads, "
                f"half over time, so heads has to be even and {self.d // 2} divisible by half of it"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.dropout is {self.dropout}: it has to be at least 0 and below 1")

    @property
    def filters(self) -> int:
        """Filters of the patch embedding's convolutions."""
        return self.d // _POSITIONS

    def to_dict(self) -> dict[str, int | float]:
        """The fields as plain numbers, for JSON and ``EncoderConfig(**fields)``."""
        return asdict(self)


PRESETS: dict[str, EncoderConfig] = {
    "tiny": EncoderConfig(d=80, layers=4, heads=4, ffn=320),
    "base": EncoderConfig(d=200, layers=12, heads=8, ffn=800),
    "large": EncoderConfig(d=400, layers=16, heads=10, ffn=1600),
    "xl": EncoderConfig(d=800, layers=24, heads=20, ffn=3200),
}
"""``base`` has CBraMod's shape. The larger ones are ours; their heads are 40 wide, a multiple of 8, so that
tensor cores and fused attention kernels need no padding."""
# Presets with activation checkpointing.
CHECKPOINTED = ("large", "xl")


def preset(name: str, dropout: float = 0.1) -> EncoderConfig:
    """The configuration of a preset, with this dropout.

    Raises:
        UserError: unknown name.
    """
    if name not in PRESETS:
        raise UserError(f"model.preset {name!r} is unknown; {nearest(name, PRESETS)}")
    return replace(PRESETS[name], dropout=dropout)


class Dense(nn.Linear):
    """Linear layer computed by `primitives.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Apply it to the last axis of ``[batch, channel, patch, width]``."""
        return linear(input, self.weight, self.bias)


class PatchNorm(nn.GroupNorm):
    """GroupNorm over ``[batch, filters, patches, positions]`` with statistics of the valid patches only."""

    def forward(self, input: Tensor, valid: Tensor | None = None) -> Tensor:
        """``valid``: bool ``[batch, patches]`` or None. Returns fp32 (or fp64) of the shape of ``input``."""
        x = at_least_fp32(input)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        if valid is None:
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)
        batch, filters, patches, positions = x.shape
        grouped = x.view(batch, self.num_groups, filters // self.num_groups, patches, positions)
        # Moments patch by patch, then pooled over the valid ones (Chan, Golub, LeVeque 1983): one pass over
        # the data and no cancellation, which E[x^2] - E[x]^2 would have.
        var, mean = torch.var_mean(grouped, dim=(2, 4), correction=0)
        share = valid.to(x.dtype)
        share = (share / share.sum(1, keepdim=True).clamp_min(1.0)).unsqueeze(1)
        centre = (mean * share).sum(2, keepdim=True)
        spread = ((var + (mean - centre).square()) * share).sum(2, keepdim=True)
        inverse = torch.rsqrt(spread + self.eps)
        per_filter = (batch, self.num_groups, filters // self.num_groups)
        scale = inverse.expand(per_filter).reshape(batch, filters) * weight
        shift = bias - centre.expand(per_filter).reshape(batch, filters) * scale
        return torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])


class FeatureNorm(nn.LayerNorm):
    """LayerNorm that computes in its input's dtype, whatever the dtype of its weights."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise the last axis."""
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class PatchEmbedding(nn.Module):
    """Features of patches: convolutions, plus spectrum, plus a conditional position encoding."""

    mask_patch: Tensor

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        filters = config.filters
        # Fixed and zero by design. A buffer rather than a constant: a CBraMod checkpoint may bring its own.
        self.register_buffer("mask_patch", torch.zeros(config.patch))
        self.conv1 = nn.Conv2d(
            1, filters, (1, _FIRST_KERNEL), stride=(1, _FIRST_STRIDE), padding=(0, _FIRST_KERNEL // 2)
        )
        self.norm1 = PatchNorm(_NORM_GROUPS, filters)
        self.conv2 = nn.Conv2d(filters, filters, (1, _NEXT_KERNEL), padding=(0, _NEXT_KERNEL // 2))
        self.norm2 = PatchNorm(_NORM_GROUPS, filters)
        self.conv3 = nn.Conv2d(filters, filters, (1, _NEXT_KERNEL), padding=(0, _NEXT_KERNEL // 2))
        self.norm3 = PatchNorm(_NORM_GROUPS, filters)
        self.spectrum = Dense(config.patch // 2 + 1, config.d)
        padding = (_REACH[0] // 2, _REACH[1] // 2)
        self.position = nn.Conv2d(config.d, config.d, _REACH, padding=padding, groups=config.d)
        self.dropout = config.dropout

    def forward(self, x: Tensor, hidden: Tensor | None, valid: Tensor | None) -> Tensor:
        """Embed patches; arguments as of `CrissCrossEncoder.forward`."""
        batch, channels, patches, samples = x.shape
        x = at_least_fp32(x)
        if hidden is not None:
            x = torch.where(hidden.unsqueeze(-1), self.mask_patch.to(x.dtype), x)
        if valid is not None:
            # where, not a product: the content may be NaN.
            x = torch.where(valid.unsqueeze(-1), x, 0.0)
        with torch.no_grad():
            amplitude = torch.fft.rfft(x, dim=-1, norm="forward").abs()

        flat = None if valid is None else valid.reshape(batch, channels * patches)
        y = x.reshape(batch, 1, channels * patches, samples)
        y = F.gelu(self.norm1(self.conv1(like(y, self.conv1.weight)), flat))
        y = F.gelu(self.norm2(self.conv2(like(y, self.conv2.weight)), flat))
        y = F.gelu(self.norm3(self.conv3(like(y, self.conv3.weight)), flat))
        embedded = y.transpose(1, 2).reshape(batch, channels, patches, -1)

        spectral = drop(self.spectrum(amplitude), self.dropout, self.training)
        embedded = embedded + spectral
        if valid is not None:
            embedded = torch.where(valid.unsqueeze(-1), embedded, 0.0)
        position = self.position(like(embedded.permute(0, 3, 1, 2), self.position.weight))
        return cast(Tensor, embedded + position.permute(0, 2, 3, 1))


class AxisAttention(nn.Module):
    """Multi-head self-attention along one axis, for half of the features."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.qkv = Dense(width, 3 * width)
        self.out = Dense(width, width)
        self.heads = heads
        self.dropout = dropout

    def forward(self, x: Tensor, axis: int, bias: Tensor | None) -> Tensor:
        """Along ``axis`` (1: channels, 2: patches) of ``x`` ``[batch, channel, patch, width]`` -> the same shape.

        ``bias`` ``[batch * patch or batch * channel, 1, 1, length]``, -inf at keys to leave out.
        """
        batch, channels, patches, width = x.shape
        length, others = x.shape[axis], x.shape[3 - axis]
        # Tokens stay where they are but for one copy on the way to the heads and one on the way back.
        qkv: Tensor = self.qkv(x).view(batch, channels, patches, 3, self.heads, -1)
        rows = qkv.permute(3, 0, 3 - axis, 4, axis, 5).contiguous()
        q, k, v = rows.view(3, batch * others, self.heads, length, width // self.heads)
        y = attend(q, k, v, bias, self.dropout if self.training else 0.0)
        y = y.view(batch, others, self.heads, length, width // self.heads).permute(0, 3, 1, 2, 4)
        y = (y if axis == 1 else y.transpose(1, 2)).reshape(x.shape)
        return cast(Tensor, self.out(y))


class CrissCrossLayer(nn.Module):
    """Pre-norm layer: half of the features attend over leads, half over time, then a feed-forward part."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        half, heads = config.d // 2, config.heads // 2
        self.norm_attention = FeatureNorm(config.d)
        self.over_leads = AxisAttention(half, heads, config.dropout)
        self.over_time = AxisAttention(half, heads, config.dropout)
        self.norm_feedforward = FeatureNorm(config.d)
        self.widen = Dense(config.d, config.ffn)
        self.narrow = Dense(config.ffn, config.d)
        self.dropout = config.dropout

    def forward(self, x: Tensor, lead_bias: Tensor | None, time_bias: Tensor | None) -> Tensor:
        """``x`` ``[batch, channel, patch, d]`` -> the same shape."""
        leads, time = self.norm_attention(x).chunk(2, dim=-1)
        attended = torch.cat((self.over_leads(leads, 1, lead_bias), self.over_time(time, 2, time_bias)), dim=-1)
        x = x + drop(attended, self.dropout, self.training)
        wide = F.gelu(self.widen(self.norm_feedforward(x)))
        narrow = self.narrow(drop(wide, self.dropout, self.training))
        return x + drop(narrow, self.dropout, self.training)


class CrissCrossEncoder(nn.Module):
    """Float ``[batch, channel, patch, 200]`` in units of 100 uV -> features ``[batch, channel, patch, d]``.

    Initialisation: matrices by Xavier's normal rule, those that end a residual branch divided by
    sqrt(2 layers) (Radford et al. 2019) so that the stream's variance does not grow with depth; biases zero;
    convolutions and norms as torch does. With ``checkpoint_activations`` each layer is computed again in the
    backward pass instead of being remembered.
    """

    def __init__(self, config: EncoderConfig, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        self.embedding = PatchEmbedding(config)
        self.layers = nn.ModuleList(CrissCrossLayer(config) for _ in range(config.layers))
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, CrissCrossLayer):
                    for ending in (module.over_leads.out, module.over_time.out, module.narrow):
                        ending.weight.div_((2 * self.config.layers) ** 0.5)

    def forward(self, x: Tensor, hidden: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Features of every patch.

        ``x``: float ``[batch, channel, patch, 200]``, units of 100 uV; any number of channels and patches. No
        gradient with respect to ``x`` through the spectrum: it is data. ``hidden``: bool ``[batch, channel,
        patch]``, True = replaced by the mask patch before anything else. ``valid``: bool of that shape;
        what a patch that is not valid holds, NaN included, influences nothing, and its features are zero.

        Returns ``[batch, channel, patch, d]``, fp32 (fp64 for a double module).
        """
        y: Tensor = self.embedding(x, hidden, valid)
        lead_bias = time_bias = None
        if valid is not None:
            batch, channels, patches = valid.shape
            lead_bias = _key_bias(valid.transpose(1, 2).reshape(batch * patches, channels), y.dtype)
            time_bias = _key_bias(valid.reshape(batch * channels, patches), y.dtype)
        for layer in self.layers:
            if self.checkpoint_activations and torch.is_grad_enabled():
                y = checkpoint(layer, y, lead_bias, time_bias, use_reentrant=False)
            else:
                y = layer(y, lead_bias, time_bias)
        return y if valid is None else torch.where(valid.unsqueeze(-1), y, 0.0)


def _key_bias(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention bias ``[rows, 1, 1, length]``: -inf at keys that are not valid ``[rows, length]``.

    A row without a valid key attends to all, to avoid a softmax of 0/0; its queries are the same patches, so
    the result is discarded.
    """
    allowed = valid | ~valid.any(dim=1, keepdim=True)
    zero = torch.zeros((), dtype=dtype, device=valid.device)
    return torch.where(allowed, zero, float("-inf"))[:, None, None, :]


class MaskedModel(nn.Module):
    """Encoder with a reconstruction head, as trained in pretraining.

    The head starts at a tenth of Xavier's scale, so that training begins at the loss of predicting zero and not
    above it.
    """

    def __init__(self, config: EncoderConfig, checkpoint_activations: bool = False) -> None:
        super().__init__()
        self.config = config
        self.encoder = CrissCrossEncoder(config, checkpoint_activations)
        self.reconstruct = Dense(config.d, config.patch)
        nn.init.xavier_normal_(self.reconstruct.weight, gain=0.1)
        nn.init.zeros_(self.reconstruct.bias)

    def forward(self, x: Tensor, hidden: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
        """Arguments as the encoder's. Returns predictions ``[batch, channel, patch, 200]`` in 100 uV."""
        return cast(Tensor, self.reconstruct(self.encoder(x, hidden, valid)))


def count_parameters(config: EncoderConfig) -> int:
    """Parameters of ``MaskedModel(config)``: encoder and head, the fixed mask patch left out."""
    d, f, half = config.d, config.filters, config.d // 2
    convs = f * (_FIRST_KERNEL + 1) + 2 * f * (_NEXT_KERNEL * f + 1) + 3 * 2 * f
    embedding = convs + d * (config.patch // 2 + 2) + d * (_REACH[0] * _REACH[1] + 1)
    attention = 2 * (4 * half * half + 4 * half)
    layer = attention + 2 * 2 * d + 2 * d * config.ffn + config.ffn + d
    return embedding + config.layers * layer + config.patch * (d + 1)


def count_flops(config: EncoderConfig, channels: int, patches: int, reconstruct: bool = True) -> int:
    """Floating-point operations of one sample's forward pass, a multiply-add counted as two.

    Counted are matrix products and convolutions.

    Padding counts as work done, as in ``torch.utils.flop_counter``; norms, GELU, softmax and the FFT are
    left out. A training step takes three times this. ``reconstruct=False`` leaves the reconstruction head
    out.
    """
    d, f, half = config.d, config.filters, config.d // 2
    convs = _POSITIONS * (_FIRST_KERNEL * f + 2 * _NEXT_KERNEL * f * f)
    embedding = convs + (config.patch // 2 + 1) * d + _REACH[0] * _REACH[1] * d
    attention = 2 * 4 * half * half + 2 * half * (channels + patches)
    layer = attention + 2 * d * config.ffn
    head = d * config.patch if reconstruct else 0
    return 2 * channels * patches * (embedding + config.layers * layer + head)
