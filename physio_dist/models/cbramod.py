"""CBraMod checkpoints (Wang et al., arXiv 2412.07236): the published one and those of braindecode's ``CBraMod``.

Nothing here unpickles code: a ``.pth`` is read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from physio_dist import storage
from physio_dist.errors import DataError, UserError
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, EncoderConfig, MaskedModel
from physio_dist.models.tensor_files import Read, parse_safetensors, read_file, shape_differences
from physio_dist.storage import user_cache

CBRAMOD = "cbramod"
"""Short for the published checkpoint; a folder of that name is ``./cbramod``."""
CBRAMOD_URL = "https://huggingface.co/weighting666/CBraMod/resolve/main/pretrained_weights.pth"
CBRAMOD_BYTES = 19_775_842
CBRAMOD_SHA256 = "0792cb808c14e6b7a2bb2ce1dff379bc47bc54c49a779825bdfeb33bf8157178"
SAMPLING_RATE = 200.0
"""Hz of the signals that CBraMod takes."""

# The hub, its mirrors and copies that keep its paths. Another file called pretrained_weights.pth may be anything.
_PUBLISHED = re.compile(r"/weighting666/CBraMod/resolve/[^/]+/pretrained_weights\.pth$")
_HEADS = 8


@dataclass(frozen=True)
class CBraModReport:
    """Contents of a CBraMod checkpoint.

    Attributes:
        config: the shape read off the tensors.
        has_head: whether it holds the reconstruction head.
        mask_patch_is_zero: whether its mask patch is the usual one.
        layout: ``published`` or ``braindecode``.
        matched: number of its tensors that are used.
        left_out: names of the others.
    """

    config: EncoderConfig
    has_head: bool
    mask_patch_is_zero: bool
    layout: str
    matched: int
    left_out: tuple[str, ...]

    def summary_line(self) -> str:
        """All of it in one line."""
        left = f", left out: {', '.join(self.left_out)}" if self.left_out else ""
        head = "with" if self.has_head else "without"
        mask = "" if self.mask_patch_is_zero else "; its mask patch is not zero"
        return (
            f"CBraMod checkpoint, {self.layout} layout: {self.config.layers} layers, d {self.config.d}, {head} "
            f"reconstruction head; {self.matched} of {self.matched + len(self.left_out)} tensors matched, none "
            f"missing{left}{mask}"
        )


@dataclass(frozen=True)
class CBraModCheckpoint:
    """A loaded checkpoint: the encoder in eval mode, the file's sha256 and a report of its contents."""

    encoder: CrissCrossEncoder
    sha256: str
    report: CBraModReport


def is_checkpoint(url: str) -> bool:
    """True if a URL names a checkpoint file rather than an export folder."""
    return url.endswith((".pth", ".safetensors"))


def load_checkpoint(url: str) -> CBraModCheckpoint:
    """Load a checkpoint by path or URL; those from the web are cached under their URL.

    Raises:
        UserError: it cannot be read or is no CBraMod checkpoint.
        DataError: it is damaged, or the published checkpoint is not what was published.
    """
    data = fetch_checkpoint(url)
    published = read_cbramod(url, lambda _: data)
    try:
        state, report = from_cbramod(published)
    except UserError as error:
        raise UserError(f"{url}: {error}") from None
    model = MaskedModel(report.config)
    model.load_state_dict(state, strict=report.has_head)
    return CBraModCheckpoint(model.encoder.eval(), hashlib.sha256(data).hexdigest(), report)


def fetch_checkpoint(url: str) -> bytes:
    """The bytes of a checkpoint; the published one is verified against its size and hash.

    Raises:
        UserError: it cannot be read.
        DataError: the published checkpoint is not what was published.
    """
    published = _PUBLISHED.search(url) is not None
    web = url.startswith(("https://", "http://"))
    data = user_cache.read_cached(url, "weights") if web else None
    if data is not None and not (published and _unlike_published(data)):
        return data
    try:
        data = storage.read_bytes(url)
    except storage.StorageError as error:
        advice = "; where this machine reaches no web, give the path of a copy" if web else ""
        raise UserError(f"{error}{advice}") from None
    if published and (difference := _unlike_published(data)):
        raise DataError(f"{url} is not the published CBraMod checkpoint: {difference}; fetch it again")
    if web:
        user_cache.write_cached(url, "weights", data)
    return data


def _unlike_published(data: bytes) -> str:
    """The difference between ``data`` and the published checkpoint; empty if there is none."""
    sha256 = hashlib.sha256(data).hexdigest()
    if len(data) != CBRAMOD_BYTES:
        return f"{len(data)} bytes instead of {CBRAMOD_BYTES}, sha256 {sha256}"
    return "" if sha256 == CBRAMOD_SHA256 else f"sha256 {sha256} instead of {CBRAMOD_SHA256}"


def read_cbramod(url: str, read: Read = storage.read_bytes) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, ``.safetensors`` or a ``.pth`` read with ``weights_only=True``.

    Raises:
        UserError: it cannot be read, or holds anything but tensors.
        DataError: a damaged safetensors file.
    """
    data = read_file(url, read, "give a CBraMod checkpoint, .pth or .safetensors")
    if url.endswith(".safetensors"):
        return parse_safetensors(data, url)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # A broken pickle raises whatever its broken instruction leads to.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{url}: not a checkpoint of tensors alone ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{url}: not a plain dictionary of tensors")
    return {str(name): value for name, value in state.items()}


_CLASSIFIER = "final_layer."
# Ours -> theirs. The fused projections of torch's MultiheadAttention stack q, k, v as ours do.
_NAMES = {
    "encoder.embedding.mask_patch": "patch_embedding.mask_encoding",
    "encoder.embedding.conv1": "patch_embedding.proj_in.0",
    "encoder.embedding.norm1": "patch_embedding.proj_in.1",
    "encoder.embedding.conv2": "patch_embedding.proj_in.3",
    "encoder.embedding.norm2": "patch_embedding.proj_in.4",
    "encoder.embedding.conv3": "patch_embedding.proj_in.6",
    "encoder.embedding.norm3": "patch_embedding.proj_in.7",
    "encoder.embedding.spectrum": "patch_embedding.spectral_proj.0",
    "encoder.embedding.position": "patch_embedding.positional_encoding.0",
    "norm_attention": "norm1",
    "norm_feedforward": "norm2",
    "over_leads.out": "self_attn_s.out_proj",
    "over_time.out": "self_attn_t.out_proj",
    "over_leads.qkv.weight": "self_attn_s.in_proj_weight",
    "over_leads.qkv.bias": "self_attn_s.in_proj_bias",
    "over_time.qkv.weight": "self_attn_t.in_proj_weight",
    "over_time.qkv.bias": "self_attn_t.in_proj_bias",
    "widen": "linear1",
    "narrow": "linear2",
    "reconstruct": "proj_out.0",
}


def cbramod_name(name: str) -> str:
    """CBraMod's name for a tensor of ``MaskedModel``'s state."""
    layer = re.match(r"encoder\.layers\.(\d+)\.", name)
    prefix = f"encoder.layers.{layer[1]}." if layer else ""
    suffix = name.removeprefix(prefix)
    if suffix in _NAMES:
        return prefix + _NAMES[suffix]
    stem, _, kind = suffix.rpartition(".")
    return f"{prefix}{_NAMES[stem]}.{kind}"


def from_cbramod(
    state: Mapping[str, Tensor], heads: int = _HEADS, dropout: float = 0.1
) -> tuple[dict[str, Tensor], CBraModReport]:
    """Convert a CBraMod state to the state of ``MaskedModel``, with a report on it.

    ``braindecode.models.CBraMod`` keeps the published names and adds a classifier, ``final_layer.*``, which is
    left out; so is a ``proj_out`` that leads to another width than a patch's (its option ``emb_dim``), for it
    reconstructs nothing. DDP's prefix ``module.`` is understood. If the checkpoint has no reconstruction head the
    result has none either. Values and dtypes stay as they are.

    Args:
        state: tensors under CBraMod's names.
        heads: attention heads, half over channels, half over time; tensors do not tell the number.
        dropout: of the configuration.

    Raises:
        UserError: the checkpoint is of another architecture; lists what differs.
    """
    source = {name.removeprefix("module."): value for name, value in state.items()}
    braindecode = any(name.startswith(_CLASSIFIER) for name in source)
    config = _cbramod_config(source, heads, dropout)
    left_out = [name for name in source if name.startswith(_CLASSIFIER)]
    if (projection := source.get("proj_out.0.weight")) is not None and len(projection) != config.patch and braindecode:
        left_out += [name for name in source if name.startswith("proj_out.")]
    source = {name: value for name, value in source.items() if name not in left_out}
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MaskedModel(config).state_dict().items()}
    has_head = any(name.startswith("proj_out.") for name in source)
    if not has_head:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("reconstruct.")}
    differences = shape_differences({cbramod_name(name): shape for name, shape in shapes.items()}, source)
    if differences:
        raise UserError("not a CBraMod checkpoint: " + "; ".join(differences))
    mask = source["patch_embedding.mask_encoding"]
    layout = "braindecode" if braindecode else "published"
    report = CBraModReport(config, has_head, not bool(mask.any()), layout, len(shapes), tuple(left_out))
    return {name: source[cbramod_name(name)] for name in shapes}, report


def _cbramod_config(state: Mapping[str, Tensor], heads: int, dropout: float) -> EncoderConfig:
    """The encoder's shape, read off the tensors."""
    first = "encoder.layers.0.linear1.weight"
    numbers = {int(m[1]) for name in state if (m := re.match(r"encoder\.layers\.(\d+)\.", name))}
    if first not in state or state[first].ndim != 2:
        raise UserError(f"not a CBraMod checkpoint: {first} is missing or no matrix")
    ffn, d = state[first].shape
    return EncoderConfig(d=d, layers=max(numbers) + 1, heads=heads, ffn=ffn, dropout=dropout)
