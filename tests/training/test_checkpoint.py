"""A checkpoint is whole and verified, or invisible."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from physio_dist.errors import DataError, UserError
from physio_dist.training import checkpoint
from physio_dist.training.checkpoint import Progress


def progress(step: int) -> Progress:
    return Progress(step, step * 8, ["f" * 64], {"seed": 0}, {"d": 80}, {"channels": ["I"], "rate": 200.0})


def write(run: Path, step: int) -> Path:
    tensors = {"weight": torch.full((3, 2), float(step))}
    moments = {"exp_avg/weight": -tensors["weight"]}
    return Path(checkpoint.commit(draft(run, step, tensors, moments)))


def draft(run: Path, step: int, model: dict[str, torch.Tensor], optimizer: dict[str, torch.Tensor]) -> checkpoint.Draft:
    files = {"model.safetensors": model, "optimizer.safetensors": optimizer}
    return checkpoint.write(str(run), progress(step), files)


def test_read_returns_what_write_stored(tmp_path: Path) -> None:
    loaded = checkpoint.read(str(write(tmp_path, 7)))
    assert loaded.progress == progress(7)
    assert torch.equal(loaded.model["weight"], torch.full((3, 2), 7.0))
    assert torch.equal(loaded.optimizer["exp_avg/weight"], torch.full((3, 2), -7.0))


def test_write_leaves_manifest_to_commit(tmp_path: Path) -> None:
    draft(tmp_path, 7, {}, {})
    loaded = {file.name for file in (tmp_path / "checkpoints" / "step-00000007").iterdir()}
    assert loaded == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert checkpoint.newest(str(tmp_path), pytest.fail) is None


def test_read_returns_ema_only_if_written(tmp_path: Path) -> None:
    assert checkpoint.read(str(write(tmp_path, 3))).ema is None
    tensors = {name: {"weight": torch.ones(1)} for name in (checkpoint.MODEL, checkpoint.OPTIMIZER, checkpoint.EMA)}
    folder = checkpoint.commit(checkpoint.write(str(tmp_path), progress(4), tensors))
    loaded = checkpoint.read(folder).ema
    assert loaded is not None and torch.equal(loaded["weight"], torch.ones(1))


def test_read_accepts_format_1(tmp_path: Path) -> None:
    """Format 1 has no state of the step guard."""
    folder = write(tmp_path, 7)
    manifest, state = folder / "manifest.json", folder / "state.json"
    old = {k: v for k, v in json.loads(state.read_text()).items() if k != "guard"}
    state.write_text(json.dumps(old))
    document = json.loads(manifest.read_text())
    data = state.read_bytes()
    document["files"]["state.json"] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    manifest.write_text(json.dumps({**document, "format": 1}))
    loaded = checkpoint.newest(str(tmp_path), pytest.fail)
    assert loaded is not None and loaded.progress == progress(7)


def test_newest_ignores_folder_without_manifest(tmp_path: Path) -> None:
    write(tmp_path, 5)
    newer = write(tmp_path, 9)
    (newer / "manifest.json").unlink()
    loaded = checkpoint.newest(str(tmp_path), pytest.fail)
    assert loaded is not None and loaded.progress.step == 5
    with pytest.raises(UserError, match="not a committed checkpoint"):
        checkpoint.read(str(newer))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_newest_falls_back_on_damaged_checkpoint(tmp_path: Path, name: str, damage: str) -> None:
    write(tmp_path, 5)
    victim = write(tmp_path, 9) / name
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data[:-1] if damage == "truncate" else data)
    if damage == "remove":
        victim.unlink()
    warnings: list[str] = []
    loaded = checkpoint.newest(str(tmp_path), warnings.append)
    assert loaded is not None and loaded.progress.step == 5
    assert len(warnings) == 1 and name in warnings[0] and "step-00000009" in warnings[0]


def test_newest_raises_if_all_checkpoints_are_damaged(tmp_path: Path) -> None:
    (write(tmp_path, 5) / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        checkpoint.newest(str(tmp_path), lambda _: None)
    assert checkpoint.newest(str(tmp_path / "other"), pytest.fail) is None


def test_read_raises_on_later_format(tmp_path: Path) -> None:
    manifest = write(tmp_path, 5) / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format": 99}))
    with pytest.raises(UserError, match="99"):
        checkpoint.newest(str(tmp_path), lambda _: None)


def test_prune_keeps_newest_and_deletes_uncommitted_before_it(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 6):
        write(tmp_path, step)
    (write(tmp_path, 5) / "manifest.json").unlink()
    checkpoint.prune(str(tmp_path), keep=2, newest_step=4)
    assert checkpoint.steps(str(tmp_path)) == [6, 5, 4, 3]
    checkpoint.prune(str(tmp_path), keep=2, newest_step=6)
    assert checkpoint.steps(str(tmp_path)) == [6, 4]


def test_write_replaces_checkpoint_of_same_step(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    checkpoint.commit(draft(tmp_path, 5, {"weight": torch.zeros(1)}, {}))
    assert checkpoint.read(str(folder)).model["weight"].shape == (1,)


def test_newest_ignores_checkpoint_pruned_while_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 5)
    read_bytes = checkpoint.storage.read_bytes

    def overtaken(url: str, *ends: int) -> bytes:
        # A run that goes on commits step 9 and prunes step 5 between the reader's look and its read.
        if "step-00000005/model" in url and not checkpoint.is_committed(checkpoint.folder_of(str(tmp_path), 9)):
            write(tmp_path, 9)
            checkpoint.prune(str(tmp_path), keep=1, newest_step=9)
        return read_bytes(url, *ends)

    monkeypatch.setattr(checkpoint.storage, "read_bytes", overtaken)
    loaded = checkpoint.newest(str(tmp_path), pytest.fail)
    assert loaded is not None and loaded.progress.step == 9
