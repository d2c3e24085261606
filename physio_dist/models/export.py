"""Export folders: ``encoder.safetensors`` (plain names, fp32, without the reconstruction head) and ``config.json``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import safetensors.torch
from torch import Tensor

from physio_dist import storage
from physio_dist.errors import DataError, UserError
from physio_dist.models import cbramod
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, EncoderConfig
from physio_dist.models.tensor_files import Read, parse_safetensors, read_file, shape_differences

FORMAT = 1
WEIGHTS_FILE = "encoder.safetensors"
CONFIG_FILE = "config.json"

_ADVICE = "an export has encoder.safetensors and config.json"


def save_encoder(encoder: CrissCrossEncoder, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of an export folder by name; the same bytes for the same weights and metadata.

    Args:
        encoder: to export.
        metadata: JSON values to store in ``config.json`` (channels, rate, unit_uv, data fingerprints, ...). The keys
            ``format``, ``encoder`` and ``encoder_sha256`` are reserved.

    Raises:
        ValueError: ``metadata`` has a reserved key.
    """
    state = {name: _to_fp32(value) for name, value in encoder.state_dict().items()}
    weights = safetensors.torch.save(state, metadata={"format": "pt"})
    reserved = {
        "format": FORMAT,
        "encoder": encoder.config.to_dict(),
        "encoder_sha256": hashlib.sha256(weights).hexdigest(),
    }
    clashing = sorted(set(reserved) & set(metadata))
    if clashing:
        raise ValueError(f"export: {', '.join(clashing)} may not be given from outside")
    config = json.dumps({**reserved, **metadata}, indent=2, sort_keys=True) + "\n"
    return {WEIGHTS_FILE: weights, CONFIG_FILE: config.encode()}


def _to_fp32(value: Tensor) -> Tensor:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).contiguous()


def encoder_url(url: str) -> str:
    """The full URL of an encoder: the published checkpoint for ``cbramod``, the folder for a file of an export."""
    if url == cbramod.CBRAMOD:
        return cbramod.CBRAMOD_URL
    return url.rstrip("/").removesuffix("/" + WEIGHTS_FILE) or "/"


def load_encoder(url: str) -> CrissCrossEncoder:
    """Load an encoder for inference: in eval mode, on the CPU, in fp32.

    Called with float ``[batch, channel, patch, 200]`` in units of 100 uV, and optionally ``valid`` (bool
    ``[batch, channel, patch]``), it returns features ``[batch, channel, patch, d]``.

    Args:
        url: an export folder, or a CBraMod checkpoint (``.pth``, ``.safetensors``); a path or any URL that fsspec
            opens. ``cbramod`` is short for the published checkpoint. Checkpoints from the web are cached
            (``~/.cache/physio-dist/weights``).

    Raises:
        UserError: ``url`` cannot be read or holds no encoder.
        DataError: the weights are damaged: they differ from the hash in ``config.json`` or from the published file.
    """
    url = encoder_url(url)
    return cbramod.load_checkpoint(url).encoder if cbramod.is_checkpoint(url) else load_export(url)


def read_export_config(url: str, read: Read = storage.read_bytes) -> dict[str, Any]:
    """``config.json`` of an export folder.

    Raises:
        UserError: there is none, or it was not written by `save_encoder`.
    """
    file = f"{url.rstrip('/')}/{CONFIG_FILE}"
    try:
        config = json.loads(read_file(file, read, _ADVICE))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(config, dict) or "encoder" not in config:
        raise UserError(f"{file}: not the config.json of an export of ours")
    if config.get("format") != FORMAT:
        raise UserError(f"{file}: format {config.get('format')!r}, this version reads format {FORMAT}")
    return config


def load_export(url: str, read: Read = storage.read_bytes) -> CrissCrossEncoder:
    """The encoder of an export folder, in eval mode, on the CPU, in fp32.

    Raises:
        UserError: the folder is no export, or the weights do not fit its ``config.json``.
        DataError: the weights are not those that ``config.json`` was written with.
    """
    metadata = read_export_config(url, read)
    config = _encoder_config(metadata["encoder"], f"{url.rstrip('/')}/{CONFIG_FILE}")
    file = f"{url.rstrip('/')}/{WEIGHTS_FILE}"
    data = read_file(file, read, _ADVICE)
    if hashlib.sha256(data).hexdigest() != metadata.get("encoder_sha256"):
        raise DataError(f"{file}: its sha256 is not the one in {CONFIG_FILE}; copy the export again")
    encoder = CrissCrossEncoder(config)
    state = parse_safetensors(data, file)
    if differences := shape_differences({k: v.shape for k, v in encoder.state_dict().items()}, state):
        raise UserError(f"{file}: the weights do not fit the configuration: " + "; ".join(differences))
    encoder.load_state_dict(state)
    return encoder.eval()


def _encoder_config(values: object, file: str) -> EncoderConfig:
    names = {field.name for field in fields(EncoderConfig)}
    if not isinstance(values, dict) or not set(values) <= names:
        raise UserError(f"{file}: 'encoder' has to hold {', '.join(sorted(names))}")
    try:
        return EncoderConfig(**values)
    except TypeError as error:
        raise UserError(f"{file}: {error}") from error
