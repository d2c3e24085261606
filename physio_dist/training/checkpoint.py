"""Checkpoints that any world size can load: whole tensors under plain names, and a manifest that is written last.

A folder without a manifest is not a checkpoint; one whose files disagree with their hashes is skipped with a warning,
and the one before it is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from physio_dist import storage
from physio_dist.errors import DataError, UserError

# 2 added the state of the step guard, and the moving average of the weights.
FORMAT = 2
_READABLE = (1, 2)
FOLDER = "checkpoints"
MANIFEST = "manifest.json"
MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
EMA = "ema.safetensors"
STATE = "state.json"

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Progress:
    """State of a run that does not depend on the number of ranks.

    Attributes:
        step: steps done, which is also the number of global batches used.
        samples: number of samples trained on, over all ranks.
        fingerprints: of the shard sets, in the mixture's order.
        order: everything else that determines the samples of a step: seed, global batch, weights.
        encoder: the encoder's configuration.
        signal: facts for the export: channels, rate, simulated or not.
        guard: state of the step guard.
    """

    step: int
    samples: int
    fingerprints: list[str]
    order: dict[str, Any]
    encoder: dict[str, Any]
    signal: dict[str, Any]
    guard: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint; ``ema`` is None if the run keeps no moving average of its weights."""

    url: str
    progress: Progress
    model: Tensors
    optimizer: Tensors
    ema: Tensors | None = None


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is written but not committed."""

    folder: str
    manifest: dict[str, Any]


def folder_of(run: str, step: int) -> str:
    """URL of a run's checkpoint."""
    return storage.join(run, FOLDER, f"step-{step:08d}")


def steps(run: str) -> list[int]:
    """Steps of the folders under ``checkpoints/``, newest first, committed or not."""
    names = storage.names(storage.join(run, FOLDER))
    numbers = [name.removeprefix("step-") for name in names if name.startswith("step-")]
    return sorted((int(number) for number in numbers if number.isdigit()), reverse=True)


def is_committed(folder: str) -> bool:
    """True if a folder has its manifest."""
    return storage.exists(storage.join(folder, MANIFEST))


def write(run: str, progress: Progress, tensors: dict[str, Tensors]) -> Draft:
    """Write all files of a checkpoint but its manifest (called by one process).

    Args:
        run: URL of the run.
        progress: state of the run.
        tensors: by file name: `MODEL`, `OPTIMIZER`, optionally `EMA`. Each is removed once it is written.

    Raises:
        StorageError: it could not be written; the folder has no manifest then.
    """
    folder = folder_of(run, progress.step)
    storage.remove(storage.join(folder, MANIFEST))
    draft = Draft(folder, {"format": FORMAT, "step": progress.step, "files": {}})
    for name in list(tensors):
        _put(draft, name, save_tensors(tensors.pop(name)))
    _put(draft, STATE, (json.dumps(asdict(progress), indent=1, sort_keys=True) + "\n").encode())
    return draft


def _put(draft: Draft, name: str, data: bytes) -> None:
    storage.write_bytes(storage.join(draft.folder, name), data)
    draft.manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def commit(draft: Draft) -> str:
    """Write the manifest, which makes the checkpoint valid; returns the URL of its folder."""
    storage.write_json(storage.join(draft.folder, MANIFEST), draft.manifest)
    return draft.folder


def read(folder: str) -> Checkpoint:
    """Read a checkpoint, checking every file against the manifest.

    Raises:
        UserError: there is no committed checkpoint, or a later version wrote it.
        DataError: it is damaged.
    """
    try:
        manifest = storage.read_json(storage.join(folder, MANIFEST))
    except storage.NotFoundError:
        raise UserError(f"{folder} is not a committed checkpoint: it has no {MANIFEST}") from None
    if not isinstance(manifest, dict) or "files" not in manifest:
        raise DataError(f"{folder}/{MANIFEST} is damaged")
    if manifest.get("format") not in _READABLE:
        raise UserError(
            f"{folder} has checkpoint format {manifest.get('format')!r}; this version of physio-dist reads up to "
            f"{FORMAT}: update it, or choose another run.name"
        )
    content = {name: _read_verified(folder, name, facts) for name, facts in manifest["files"].items()}
    try:
        progress = Progress(**json.loads(content[STATE]))
        return Checkpoint(
            url=folder, progress=progress, model=load_tensors(content[MODEL]),
            optimizer=load_tensors(content[OPTIMIZER]), ema=load_tensors(content[EMA]) if EMA in content else None,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder} is damaged: {error}") from None


def _read_verified(folder: str, name: str, facts: dict[str, Any]) -> bytes:
    url = storage.join(folder, name)
    try:
        data = storage.read_bytes(url)
    except storage.NotFoundError:
        raise DataError(f"{url} is missing, though the checkpoint was committed") from None
    if len(data) != facts["bytes"] or hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise DataError(f"{url} disagrees with its manifest: it was truncated or altered")
    return data


def newest(run: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest committed checkpoint that is intact; None if the run has none.

    The run may be training meanwhile: a checkpoint that is pruned while it is read does not count as damaged.

    Raises:
        DataError: there are committed checkpoints, and every one is damaged.
    """
    damaged: list[str] = []
    tried: set[str] = set()
    # Listed again after each try, because there may be a newer one by then.
    while untried := [folder for step in steps(run) if (folder := folder_of(run, step)) not in tried]:
        folder = untried[0]
        tried.add(folder)
        if not is_committed(folder):
            continue
        try:
            return read(folder)
        except DataError as error:
            if is_committed(folder):
                damaged.append(str(error))
                warn(f"{error}; going back to the checkpoint before it")
        except UserError:
            if is_committed(folder):
                raise
    if damaged:
        raise DataError(f"no checkpoint of {run} can be used: {damaged[0]}")
    return None


def prune(run: str, keep: int, newest_step: int) -> None:
    """Delete all but the ``keep`` newest committed checkpoints, and half-written ones before the newest.

    Folders of later steps than ``newest_step`` are kept.
    """
    count = 0
    for step in steps(run):
        folder = folder_of(run, step)
        if step > newest_step:
            continue
        if is_committed(folder):
            count += 1
            if count <= keep:
                continue
            # The manifest goes first, so that an interrupted delete leaves no damaged checkpoint.
            storage.remove(storage.join(folder, MANIFEST))
        storage.remove(folder, recursive=True)
