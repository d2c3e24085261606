"""Checkpoints that a run may continue."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from physio_dist.errors import UserError
from physio_dist.models.encoders.criss_cross import preset
from physio_dist.training import checkpoint
from physio_dist.training.checkpoint import Checkpoint, Progress
from physio_dist.training.resume import check_compatible, find_checkpoint

ORDER = {"seed": 0, "global_batch": 4, "weights": [1.0]}


def progress(step: int = 3, **changes: Any) -> Progress:
    facts: dict[str, Any] = {
        "step": step, "samples": 4 * step, "fingerprints": ["a" * 64], "order": ORDER,
        "encoder": preset("tiny").to_dict(), "signal": {"channels": ["I", "II"]},
    }  # fmt: skip
    return Progress(**{**facts, **changes})


def source() -> Any:
    dataset = SimpleNamespace(info=SimpleNamespace(channels=["I", "II"]))
    return SimpleNamespace(dataset=dataset, fingerprints=["a" * 64], order_facts=ORDER)


def save(run: Path, step: int) -> str:
    tensors = {"model.safetensors": {"w": torch.ones(1)}, "optimizer.safetensors": {"w": torch.ones(1)}}
    return checkpoint.commit(checkpoint.write(str(run), progress(step), tensors))


def test_check_compatible_accepts_same_model_data_and_order() -> None:
    check_compatible(Checkpoint("run/3", progress(), {}, {}), source(), preset("tiny"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {**preset("tiny").to_dict(), "layers": 5}}, "another encoder .layers: 5 there, 4 now"),
        ({"signal": {"channels": ["V1"]}}, "trained on the channels"),
        ({"fingerprints": ["b" * 64]}, "trained on other data"),
        ({"order": {**ORDER, "seed": 1}}, "in another order"),
    ],
)
def test_check_compatible_raises_on_difference(changes: dict[str, Any], message: str) -> None:
    saved = Checkpoint("run/3", progress(**changes), {}, {})
    with pytest.raises(UserError, match=message):
        check_compatible(saved, source(), preset("tiny"))


def test_find_checkpoint_prefers_newest_of_own_run(tmp_path: Path) -> None:
    other = save(tmp_path / "other", 9)
    assert find_checkpoint(str(tmp_path / "run"), None, True, print) is None
    from_url = find_checkpoint(str(tmp_path / "run"), other, True, print)
    assert from_url is not None and from_url.progress.step == 9
    from_run = find_checkpoint(str(tmp_path / "run"), f"{tmp_path}/other/", True, print)
    assert from_run is not None and from_run.progress.step == 9
    save(tmp_path / "run", 3)
    save(tmp_path / "run", 4)
    own = find_checkpoint(str(tmp_path / "run"), other, True, print)
    assert own is not None and own.progress.step == 4


def test_find_checkpoint_raises_on_url_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="resume="):
        find_checkpoint(str(tmp_path / "run"), str(tmp_path / "none"), True, print)
