"""Encoders in and out: our export folder, and CBraMod checkpoints, the published one or braindecode's.

An export holds ``encoder.safetensors`` (plain names, fp32, the reconstruction head left out) and ``config.json``.
Nothing here unpickles: a published ``.pth`` is read with ``weights_only=True``.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from physio_dist import storage
from physio_dist.errors import DataError, UserError
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, EncoderConfig, MaskedModel

FORMAT = 1
WEIGHTS_FILE = "encoder.safetensors"
CONFIG_FILE = "config.json"
"""Pseudonyms of the people a run or an export was trained on, beside its other files."""

Read = Callable[[str], bytes]
"""From a URL to the bytes behind it; raises ``StorageError`` where there are none."""


def save_encoder(encoder: CrissCrossEncoder, about: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of an export folder: name -> bytes, the same for the same weights and ``about``.

    ``about`` is JSON of the caller's (channels, rate, unit_uv, data fingerprint, ...); it may not use the names
    ``format``, ``encoder`` and ``encoder_sha256``, which are ours.
    """
    state = {name: _storable(value) for name, value in encoder.state_dict().items()}
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    ours = {
        "format": FORMAT,
        "encoder": encoder.config.to_dict(),
        "encoder_sha256": hashlib.sha256(weights).hexdigest(),
    }
    taken = sorted(set(ours) & set(about))
    if taken:
        raise ValueError(f"export: {', '.join(taken)} may not be given from outside")
    config = json.dumps({**ours, **about}, indent=2, sort_keys=True) + "\n"
    return {WEIGHTS_FILE: weights, CONFIG_FILE: config.encode()}


def _storable(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).contiguous()


def read_export_config(url: str, read: Read = storage.read_bytes) -> dict[str, Any]:
    """``config.json`` of an export folder. Raises ``UserError`` where it is absent or not an export's."""
    where = f"{url.rstrip('/')}/{CONFIG_FILE}"
    try:
        config = json.loads(_bytes(where, read, "an export has encoder.safetensors and config.json"))
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not isinstance(config, dict) or "encoder" not in config:
        raise UserError(f"{where}: not the config.json of an export of ours")
    if config.get("format") != FORMAT:
        raise UserError(f"{where}: format {config.get('format')!r}, this version reads format {FORMAT}")
    return config


def load_encoder(url: str, read: Read = storage.read_bytes) -> CrissCrossEncoder:
    """The encoder of an export folder, in eval mode, on the CPU, in fp32.

    Called with float ``[batch, channel, patch, 200]`` in units of 100 uV, and optionally ``valid`` (bool
    ``[batch, channel, patch]``), it returns features ``[batch, channel, patch, d]``.

    Raises ``UserError`` where the folder is no export, ``DataError`` where the weights are not those that
    ``config.json`` was written with.
    """
    about = read_export_config(url, read)
    config = _encoder_config(about["encoder"], f"{url.rstrip('/')}/{CONFIG_FILE}")
    where = f"{url.rstrip('/')}/{WEIGHTS_FILE}"
    data = _bytes(where, read, "an export has encoder.safetensors and config.json")
    if hashlib.sha256(data).hexdigest() != about.get("encoder_sha256"):
        raise DataError(f"{where}: its sha256 is not the one in {CONFIG_FILE}; copy the export again")
    encoder = CrissCrossEncoder(config)
    _fill(encoder, _parse_safetensors(data, where), where)
    return encoder.eval()


def _encoder_config(given: object, where: str) -> EncoderConfig:
    names = {field.name for field in fields(EncoderConfig)}
    if not isinstance(given, dict) or not set(given) <= names:
        raise UserError(f"{where}: 'encoder' has to hold {', '.join(sorted(names))}")
    try:
        return EncoderConfig(**given)
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


def _fill(module: torch.nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    differences = _differences({k: v.shape for k, v in module.state_dict().items()}, state)
    if differences:
        raise UserError(f"{where}: the weights do not fit the configuration: " + "; ".join(differences))
    module.load_state_dict(dict(state))


def _differences(expected: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> list[str]:
    """What stands between ``state`` and the shapes it should have, in words, at most eight of them."""
    found = [f"{name} is missing" for name in expected if name not in state]
    found += [f"{name} is unknown" for name in state if name not in expected]
    found += [
        f"{name} is {list(state[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != tuple(shape)
    ]
    return found if len(found) <= 8 else [*found[:8], f"and {len(found) - 8} more"]


def _bytes(where: str, read: Read, advice: str) -> bytes:
    try:
        return read(where)
    except storage.StorageError as error:
        raise UserError(f"{error}; {advice}") from error


def _parse_safetensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise DataError(f"{where}: not a whole safetensors file ({error})") from error


def read_cbramod(url: str, read: Read = storage.read_bytes) -> dict[str, Tensor]:
    """The tensors of a published checkpoint, ``.safetensors`` or a ``.pth`` read with ``weights_only=True``."""
    data = _bytes(url, read, "give a CBraMod checkpoint, .pth or .safetensors")
    if url.endswith(".safetensors"):
        return _parse_safetensors(data, url)
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # A broken pickle raises whatever its broken instruction leads to.
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{url}: not a checkpoint of tensors alone ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{url}: not a plain dictionary of tensors")
    return {str(name): value for name, value in state.items()}


@dataclass(frozen=True)
class CBraModReport:
    """What a CBraMod checkpoint turned out to be.

    ``config``: the shape read off the tensors; ``has_head``: whether the reconstruction head was in it;
    ``mask_patch_is_zero``: whether its mask patch is the usual one; ``layout``: ``published`` or
    ``braindecode``; ``matched``: how many of its tensors are used; ``left_out``: the names of the others.
    """

    config: EncoderConfig
    has_head: bool
    mask_patch_is_zero: bool
    layout: str
    matched: int
    left_out: tuple[str, ...]

    def tell(self) -> str:
        """All of it in one line."""
        left = f", left out: {', '.join(self.left_out)}" if self.left_out else ""
        head = "with" if self.has_head else "without"
        mask = "" if self.mask_patch_is_zero else "; its mask patch is not zero"
        return (
            f"CBraMod checkpoint, {self.layout} layout: {self.config.layers} layers, d {self.config.d}, {head} "
            f"reconstruction head; {self.matched} of {self.matched + len(self.left_out)} tensors matched, none "
            f"missing{left}{mask}"
        )


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


def cbramod_name(ours: str) -> str:
    """CBraMod's name for a tensor of ``MaskedModel``'s state."""
    layer = re.match(r"encoder\.layers\.(\d+)\.", ours)
    head = f"encoder.layers.{layer[1]}." if layer else ""
    rest = ours.removeprefix(head)
    if rest in _NAMES:
        return head + _NAMES[rest]
    stem, _, kind = rest.rpartition(".")
    return f"{head}{_NAMES[stem]}.{kind}"


def from_cbramod(
    state: Mapping[str, Tensor], heads: int = 8, dropout: float = 0.1
) -> tuple[dict[str, Tensor], CBraModReport]:
    """A CBraMod state -> the state of our ``MaskedModel`` and a report on it.

    Tensors do not tell the number of ``heads`` (CBraMod: 8, half over channels, half over time). Where the
    checkpoint has no reconstruction head the state has none either. Values and dtypes stay as they are.

    ``braindecode.models.CBraMod`` keeps the published names and adds a classifier, ``final_layer.*``, which is
    left out; so is a ``proj_out`` that leads to another width than a patch's (its option ``emb_dim``), for it
    reconstructs nothing. DDP's prefix ``module.`` is understood.

    Raises ``UserError`` that lists what differs where the checkpoint is of another architecture.
    """
    theirs = {name.removeprefix("module."): value for name, value in state.items()}
    braindecode = any(name.startswith(_CLASSIFIER) for name in theirs)
    config = _cbramod_config(theirs, heads, dropout)
    left_out = [name for name in theirs if name.startswith(_CLASSIFIER)]
    if (projection := theirs.get("proj_out.0.weight")) is not None and len(projection) != config.patch and braindecode:
        left_out += [name for name in theirs if name.startswith("proj_out.")]
    theirs = {name: value for name, value in theirs.items() if name not in left_out}
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in MaskedModel(config).state_dict().items()}
    has_head = any(name.startswith("proj_out.") for name in theirs)
    if not has_head:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("reconstruct.")}
    differences = _differences({cbramod_name(name): shape for name, shape in shapes.items()}, theirs)
    if differences:
        raise UserError("not a CBraMod checkpoint: " + "; ".join(differences))
    mask = theirs["patch_embedding.mask_encoding"]
    layout = "braindecode" if braindecode else "published"
    report = CBraModReport(config, has_head, not bool(mask.any()), layout, len(shapes), tuple(left_out))
    return {name: theirs[cbramod_name(name)] for name in shapes}, report


def _cbramod_config(theirs: Mapping[str, Tensor], heads: int, dropout: float) -> EncoderConfig:
    """The shape of the network that the tensors ``theirs`` belong to."""
    first = "encoder.layers.0.linear1.weight"
    numbers = {int(m[1]) for name in theirs if (m := re.match(r"encoder\.layers\.(\d+)\.", name))}
    if first not in theirs or theirs[first].ndim != 2:
        raise UserError(f"not a CBraMod checkpoint: {first} is missing or no matrix")
    ffn, d = theirs[first].shape
    return EncoderConfig(d=d, layers=max(numbers) + 1, heads=heads, ffn=ffn, dropout=dropout)
