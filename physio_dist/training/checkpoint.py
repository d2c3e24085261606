"""World-free checkpoints: whole tensors under plain names, committed by a manifest that is written last.

A folder without a manifest is not a checkpoint; one whose files disagree with their hashes is passed over with a
warning, and the one before it is used.
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

# 2 has the state of the judge of steps, and perhaps a moving average of the weights.
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
    """Where a run stands, in terms that know no ranks.

    Attributes:
        step: steps taken, which is also the number of global batches taken.
        samples: trained on, over all ranks.
        fingerprints: of the shard sets, in the mixture's order.
        order: what else decides which samples a step takes: seed, global batch, weights.
        encoder: the encoder's configuration.
        signal: facts an export states: channels, rate, simulated or not.
        guard: the losses, norms and the scale by which the next step is judged.
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
    """A loaded checkpoint; ``ema`` is None where the run keeps no moving average of its weights."""

    url: str
    progress: Progress
    model: Tensors
    optimizer: Tensors
    ema: Tensors | None = None


@dataclass(frozen=True)
class Draft:
    """A checkpoint whose files are there and whose manifest is not."""

    folder: str
    manifest: dict[str, Any]


def folder_of(run: str, step: int) -> str:
    """URL of a run's checkpoint."""
    return storage.join(run, FOLDER, f"step-{step:08d}")


def steps(run: str) -> list[int]:
    """Steps of the folders under ``checkpoints/``, newest first, committed or not."""
    names = storage.names(storage.join(run, FOLDER))
    found = [name.removeprefix("step-") for name in names if name.startswith("step-")]
    return sorted((int(name) for name in found if name.isdigit()), reverse=True)


def is_committed(folder: str) -> bool:
    """Whether a folder has its manifest."""
    return storage.exists(storage.join(folder, MANIFEST))


def write(run: str, progress: Progress, tensors: dict[str, Tensors]) -> Draft:
    """Write all of a checkpoint but its manifest (one process calls this).

    Args:
        run: URL of the run.
        progress: where the run stands.
        tensors: by file name: `MODEL`, `OPTIMIZER`, perhaps `EMA`. Each is taken out once it is written.

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
    """Write the manifest, from when on the checkpoint counts; the URL of its folder."""
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
    content = {name: _checked(folder, name, facts) for name, facts in manifest["files"].items()}
    try:
        progress = Progress(**json.loads(content[STATE]))
        return Checkpoint(
            url=folder, progress=progress, model=load_tensors(content[MODEL]),
            optimizer=load_tensors(content[OPTIMIZER]), ema=load_tensors(content[EMA]) if EMA in content else None,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder} is damaged: {error}") from None


def _checked(folder: str, name: str, facts: dict[str, Any]) -> bytes:
    where = storage.join(folder, name)
    try:
        data = storage.read_bytes(where)
    except storage.NotFoundError:
        raise DataError(f"{where} is missing, though the checkpoint was committed") from None
    if len(data) != facts["bytes"] or hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise DataError(f"{where} disagrees with its manifest: it was truncated or altered")
    return data


def newest(run: str, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest committed checkpoint that is whole; None where the run has none.

    The run may go on meanwhile: a checkpoint that is pruned while it is read is not taken for a damaged one.

    Raises:
        DataError: there are committed checkpoints, and every one is damaged.
    """
    damaged: list[str] = []
    tried: set[str] = set()
    # Listed again after each try, because a newer one may be there by then.
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

    Folders of later steps are left alone: they are not older than ``newest_step``, and may be worth a look.
    """
    kept = 0
    for step in steps(run):
        folder = folder_of(run, step)
        if step > newest_step:
            continue
        if is_committed(folder):
            kept += 1
            if kept <= keep:
                continue
            # The manifest goes first, so that a delete cut short leaves no damaged checkpoint.
            storage.remove(storage.join(folder, MANIFEST))
        storage.remove(folder, recursive=True)
