"""Frozen features of every window of a shard set, computed once for all trials.

``features-00000.safetensors``, ... hold ``values`` float32 ``[window, channel, patch, d]`` and ``valid`` bool
``[window, channel]`` in the set's storage order. ``index.json``, written last, names them with their hashes, the
encoder's hash, the set's fingerprint and the keys: without it there are no features.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save as save_safetensors

from physio_dist import storage
from physio_dist.data.format.index import ShardSet
from physio_dist.data.handle import ShardSetHandle
from physio_dist.data.loading.dataset import Batch, ShardDataset
from physio_dist.errors import DataError, UserError
from physio_dist.evaluation.backbones import Backbone
from physio_dist.evaluation.label_table import LabelTable
from physio_dist.models.encoders.criss_cross import PATCH, UNIT_UV, CrissCrossEncoder
from physio_dist.models.encoders.patches import to_patches
from physio_dist.runtime import processes
from physio_dist.runtime.arrays import BoolArray, Float32Array, Int16Array
from physio_dist.runtime.progress import Progress
from physio_dist.storage import sha256_of, user_cache

KIND = "physio-dist-features"
FORMAT = 1
INDEX = "index.json"

_IDENTITY = ("encoder_sha256", "encoder", "fingerprint", "signal")
_FILE = re.compile(r"features-\d{5,}\.safetensors")
_FILE_BYTES = 256e6
# Patches in a forward pass: its memory is proportional to them.
_CPU_PATCHES = 4096
_GPU_PATCHES = 65536


@dataclass(frozen=True)
class Features:
    """Frozen features of all windows of a shard set, in its storage order.

    Attributes:
        values: float32 ``[window, channel, patch, d]``, zero where a channel is not valid; a read-only memory map
            where they lie in one file.
        valid: bool ``[window, channel]``.
        keys: of the windows.
        signal: ``ecg`` or ``eeg``.
        encoder_sha256: of the encoder that made them.
        fingerprint: of the shard set.
    """

    values: Float32Array
    valid: BoolArray
    keys: list[str]
    signal: str
    encoder_sha256: str
    fingerprint: str


def check_fits(backbone: Backbone, shards: ShardSet) -> None:
    """Refuse a shard set whose signals are not what the encoder was trained on; channels may differ.

    Raises:
        UserError: the signal is absent, or rate, window length or units do not fit.
    """
    if backbone.signal not in shards.signals:
        raise UserError(
            f"{shards.url} holds no {backbone.signal} signal; it has: {', '.join(shards.signals)}. Convert the "
            f"recordings with signals={backbone.signal}, or give an encoder of another signal"
        )
    info = shards.signals[backbone.signal]
    if shards.rate != backbone.rate:
        raise UserError(
            f"{shards.url} is sampled at {shards.rate:g} Hz and {backbone.url} was trained at {backbone.rate:g} Hz; "
            f"convert the recordings with window.rate={backbone.rate:g}"
        )
    if info.samples % PATCH or not info.samples:
        raise UserError(
            f"{shards.url} has windows of {info.samples} samples and {backbone.url} takes whole patches of {PATCH}; "
            f"convert the recordings with window.seconds a multiple of {PATCH / backbone.rate:g}"
        )
    if backbone.unit_uv != UNIT_UV or not 0 < info.uv_per_bit < math.inf:
        raise UserError(
            f"{backbone.url} was trained in units of {backbone.unit_uv:g} uV, and signals of {shards.url} "
            f"({info.uv_per_bit:g} uV per bit) are given to encoders in units of {UNIT_UV:g} uV; give an encoder of "
            "these units"
        )


def cached_features(
    backbone: Backbone, data: ShardSetHandle, folder: str, table: LabelTable, say: Callable[[str], None]
) -> tuple[str, Features]:
    """Open an encoder's features of a shard set, computed first where ``folder`` has none.

    Args:
        backbone: the encoder.
        data: the shard set.
        folder: URL of a folder that features of several encoders and sets share.
        table: labelled windows of the set.
        say: receives progress messages.

    Returns:
        URL of the features, and the opened features.

    Raises:
        UserError: the set does not fit the encoder.
        DataError: features or shards are damaged.
    """
    name = f"{backbone.signal}-{backbone.sha256[:16]}-{data.index.fingerprint[:16]}"
    url = storage.join(folder, name)
    embed(backbone, data, url, say)
    features = open_features(url)
    if [features.keys[i] for i in table.sample] != table.keys:
        raise DataError(f"{url} holds features of other windows than the shard set's; remove it")
    return url, features


def embed(backbone: Backbone, data: ShardSetHandle, out: str, say: Callable[[str], None]) -> None:
    """Write the features of every window of a set, in all splits, to ``out``.

    Existing features of the same encoder and set are kept. Features are bit-equal where the device, the number of
    threads and the software are the same; otherwise equal to rounding.

    Args:
        backbone: see ``open_backbone``.
        data: the shard set.
        out: URL of a folder.
        say: receives progress messages.

    Raises:
        UserError: the set does not fit the encoder, or ``out`` holds something else.
        DataError: a shard disagrees with the index.
    """
    shards = data.index
    check_fits(backbone, shards)
    if not shards.nsamples:
        raise UserError(f"{shards.url} holds no windows")
    about = _about(backbone, shards)
    if (existing := _read_index(out)) is not None:
        if any(existing[name] != about[name] for name in _IDENTITY):
            raise UserError(
                f"{out} holds features of {_origin(existing)}, not of {_origin(about)}; choose another folder "
                "(--out, or tune.feature_cache, or probe.feature_cache)"
            )
        if {file["file"] for file in existing["files"]} <= set(storage.names(out)):
            say(f"features of {existing['windows']} windows are there already: {out}")
            return
        # A file is missing: without the index nothing is taken for finished.
        storage.remove(storage.join(out, INDEX))
    source = data.dataset(backbone.signal)
    files = []
    with Progress(shards.nsamples, "windows", f"embedding {backbone.signal}") as progress:
        for number, (values, valid) in enumerate(_parts(backbone, source, progress)):
            content = save_safetensors({"values": values, "valid": valid})
            name = f"features-{number:05d}.safetensors"
            storage.write_bytes(storage.join(out, name), content)
            digest = hashlib.sha256(content).hexdigest()
            files.append({"file": name, "windows": len(values), "sha256": digest, "bytes": len(content)})
    everything = np.arange(shards.nsamples, dtype=np.int64)
    keys = source.keys((np.zeros_like(everything), everything))
    storage.write_json(storage.join(out, INDEX), {**about, "files": files, "keys": keys})
    for stale in set(filter(_FILE.fullmatch, storage.names(out))) - {file["file"] for file in files}:
        storage.remove(storage.join(out, stale))
    say(f"features {about['shape']} of {shards.nsamples} {backbone.signal} windows -> {out}")


def _about(backbone: Backbone, shards: ShardSet) -> dict[str, Any]:
    """Index without files and keys."""
    info, config = shards.signals[backbone.signal], backbone.module.config
    return {
        "format": FORMAT,
        "kind": KIND,
        "encoder_sha256": backbone.sha256,
        "encoder": config.to_dict(),
        "fingerprint": shards.fingerprint,
        "signal": backbone.signal,
        "channels": list(info.channels),
        "shape": [len(info.channels), info.samples // PATCH, config.d],
        "dtype": "float32",
        "windows": shards.nsamples,
        "simulated": shards.simulated,
    }


def _origin(about: dict[str, Any]) -> str:
    return (
        f"encoder {about['encoder_sha256'][:12]} on the {about['signal']} signals of shard set "
        f"{about['fingerprint'][:12]}"
    )


def _parts(backbone: Backbone, source: ShardDataset, progress: Progress) -> Iterator[tuple[Float32Array, BoolArray]]:
    """Compute features and validity of all windows; yield one file's worth at a time."""
    info, config = source.info, backbone.module.config
    channels, patches, n = len(info.channels), info.samples // PATCH, source.sets[0].nsamples
    module, device, size = _ready(backbone.module, channels * patches)
    rows = max(1, int(_FILE_BYTES // (4 * channels * patches * config.d + channels)))

    def read(low: int, high: int) -> Batch:
        ids = np.arange(low, high, dtype=np.int64)
        return source.read_batch(0, np.zeros_like(ids), ids, ids, len(ids))

    with _exact(), ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        spans = [
            (low, min(low + size, start + rows, n)) for start in range(0, n, rows)
            for low in range(start, min(start + rows, n), size)
        ]  # fmt: skip
        pending = reader.submit(read, *spans[0])
        for i, (low, high) in enumerate(spans):
            batch = pending.result()
            if i + 1 < len(spans):
                pending = reader.submit(read, *spans[i + 1])
            if low % rows == 0:
                values = np.empty((min(rows, n - low), channels, patches, config.d), dtype=np.float32)
                valid = np.empty((len(values), channels), dtype=np.bool_)
            part = slice(low % rows, low % rows + high - low)
            values[part] = _forward(module, batch.signal, batch.scale, batch.valid, backbone.unit_uv, device)
            valid[part] = batch.valid
            batch.release()
            if not np.isfinite(values[part]).all():
                row = int(np.flatnonzero(~np.isfinite(values[part]).all(axis=(1, 2, 3)))[0])
                key = source.keys((np.zeros(1, dtype=np.int64), np.array([low + row])))[0]
                raise UserError(
                    f"{backbone.url} gives features of window {key} that are no numbers; export another checkpoint"
                )
            progress.update(high - low)
            if part.stop == len(values):
                yield values, valid


def features_of(
    encoder: CrissCrossEncoder, unit_uv: float, signal: Int16Array, uv_per_bit: float,
    valid: BoolArray,
) -> Float32Array:  # fmt: skip
    """Compute features of windows outside of a shard set, exactly as :func:`embed` does.

    Args:
        encoder: takes signals in units of ``unit_uv`` microvolts.
        unit_uv: microvolts.
        signal: ``[window, channel, time]``, whole patches, in steps of ``uv_per_bit`` microvolts.
        uv_per_bit: as conversion writes it.
        valid: ``[window, channel]``.

    Returns:
        float32 ``[window, channel, patch, d]``.
    """
    windows, channels, samples = signal.shape
    module, device, size = _ready(encoder, channels * (samples // PATCH))
    scale = np.full(windows, uv_per_bit, dtype=np.float32)
    features = np.empty((windows, channels, samples // PATCH, encoder.config.d), dtype=np.float32)
    with _exact():
        for low in range(0, windows, size):
            rows = slice(low, low + size)
            features[rows] = _forward(module, signal[rows], scale[rows], valid[rows], unit_uv, device)
    return features


def _ready(encoder: CrissCrossEncoder, patches: int) -> tuple[CrissCrossEncoder, torch.device, int]:
    """Move the encoder to its device; also return the device and the batch size for windows of ``patches`` patches."""
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    size = max(1, (_GPU_PATCHES if gpu else _CPU_PATCHES) // patches)
    return deepcopy(encoder).to(device).eval(), device, size


@torch.inference_mode()
def _forward(
    module: CrissCrossEncoder, signal: Int16Array, scale: Float32Array, valid: BoolArray,
    unit_uv: float, device: torch.device,
) -> Float32Array:  # fmt: skip
    x = to_patches(torch.from_numpy(signal).to(device), torch.from_numpy(scale).to(device), unit_uv)
    # Given even where all is valid, so that a window's features do not depend on what else is in its batch.
    mask = torch.from_numpy(valid).to(device)[:, :, None].expand(x.shape[:3])
    features: Float32Array = module(x, valid=mask).cpu().numpy()
    return features


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """Use all cores, and on a GPU full fp32 and deterministic algorithms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(processes.cores())
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_num_threads(threads)


def open_features(url: str) -> Features:
    """Open features that :func:`embed` wrote and verify every file; remote files are fetched to the user's cache.

    Raises:
        UserError: there are no finished features.
        DataError: a file disagrees with the index.
    """
    about = _read_index(url)
    if about is None:
        raise UserError(f"{url} holds no {INDEX}: there are no finished features; `physio-dist embed` makes them")
    n, shape = about["windows"], tuple(about["shape"])
    parts = (_map(storage.join(url, file["file"]), file, shape) for file in about["files"])
    if len(about["files"]) == 1:
        values, valid = next(parts)
    else:
        values, valid, low = np.empty((n, *shape), np.float32), np.empty((n, shape[0]), np.bool_), 0
        for some, flags in parts:
            values[low : low + len(some)], valid[low : low + len(some)] = some, flags
            low += len(some)
        values.flags.writeable = False
    return Features(
        values, np.array(valid), about["keys"], about["signal"], about["encoder_sha256"], about["fingerprint"]
    )


def _map(url: str, entry: dict[str, Any], shape: tuple[int, ...]) -> tuple[Float32Array, BoolArray]:
    """A file's tensors as read-only maps."""
    advice = "delete index.json beside it and run `physio-dist embed` again"
    try:
        path = (
            storage.local_path(url)
            if storage.is_local(url)
            else user_cache.fetch_cached(url, "features", entry["sha256"])
        )
        if path is None or sha256_of(path) != entry["sha256"]:
            raise DataError(f"{url} disagrees with {INDEX} (sha256): it was truncated or altered; {advice}")
        tensors = _tensors(path)
    except (storage.NotFoundError, FileNotFoundError):
        raise DataError(f"{url} is in {INDEX} but not there; {advice}") from None
    except OSError as error:
        raise storage.to_storage_error(url, "read", error) from error
    values, valid = tensors.get("values"), tensors.get("valid")
    n = entry["windows"]
    if values is None or valid is None or values.shape != (n, *shape) or valid.shape != (n, shape[0]):
        raise DataError(f"{url} is not of the shape that {INDEX} tells; {advice}")
    return values, valid


def _tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Memory-map a safetensors file: 8 bytes with the header's length, the header, the values."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    dtypes = {"F32": np.dtype("<f4"), "BOOL": np.dtype(np.bool_)}
    return {
        name: np.memmap(path, dtypes[entry["dtype"]], "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in header.items() if name != "__metadata__" and entry["dtype"] in dtypes
    }  # fmt: skip


def _read_index(url: str) -> dict[str, Any] | None:
    """Read the index at ``url``; None where there is none."""
    where = storage.join(url, INDEX)
    try:
        about = storage.read_json(where)
    except storage.NotFoundError:
        return None
    if not isinstance(about, dict) or about.get("kind") != KIND:
        raise UserError(f"{where} is not an index of features; choose another folder")
    if about.get("format") != FORMAT:
        raise UserError(f"{where} has format {about.get('format')!r}, this version reads format {FORMAT}; upgrade it")
    try:
        complete = (
            len(about["shape"]) == 3
            and all(isinstance(size, int) for size in (*about["shape"], about["windows"]))
            and all(isinstance(about[name], str) for name in ("encoder_sha256", "fingerprint", "signal"))
            and isinstance(about["encoder"], dict)
            # Names are joined to the folder: none may lead out of it.
            and all(_FILE.fullmatch(file["file"]) and isinstance(file["sha256"], str) for file in about["files"])
            and sum(file["windows"] for file in about["files"]) == len(about["keys"]) == about["windows"]
        )
    except (KeyError, TypeError):
        complete = False
    if not complete:
        raise DataError(f"{where} is damaged; delete it and run `physio-dist embed` again")
    return about
