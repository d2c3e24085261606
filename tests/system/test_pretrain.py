"""Whole runs under the real launchers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from physio_dist.models.export import load_encoder
from tests.system.launching import Run, physio

Make = Callable[..., Run]
FP32 = ("train.precision=fp32", "model.dropout=0")


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.metrics().values()]


def test_run_writes_documented_files_and_fields(undisturbed: Make) -> None:
    run = undisturbed()
    lines = run.metrics()
    assert list(lines) == list(range(1, 17))
    fields = (
        "step epoch samples loss loss_intra loss_inter val_loss lr grad_norm samples_per_s data_wait_frac mfu"
        " step_s time"
    )
    for line in lines.values():
        assert set(fields.split()) <= set(line)
        assert line["samples"] == 16 * line["step"]
        assert 0 <= line["data_wait_frac"] <= 1
    assert [step for step, line in lines.items() if line["val_loss"] is not None] == [8, 16]
    # A new model predicts next to nothing, which by each lead's own mean square is an error of about 1.
    assert all(0.8 < lines[1][name] < 1.2 for name in ("loss", "loss_intra", "loss_inter"))
    assert 0.8 < lines[8]["val_zero_loss"] < 1.2
    assert (run.path / "config.yaml").is_file()
    assert list((run.path / "tensorboard").glob("events.out.tfevents.*"))
    names = sorted(folder.name for folder in (run.path / "checkpoints").iterdir())
    assert names == ["step-00000005", "step-00000010", "step-00000015", "step-00000016"][-3:]
    newest = run.path / "checkpoints" / "step-00000016"
    assert {file.suffix for file in newest.iterdir()} == {".safetensors", ".json"}
    whole = load_file(newest / "model.safetensors")
    assert whole["encoder.layers.0.widen.weight"].shape == (320, 80)
    # Thirty people, six windows each: an epoch has no sample twice.
    keys = [key for step in sorted(run.trace()) for key in run.trace()[step]]
    per_epoch = len(keys) // 16 * 16 if (n := _train_count(run)) >= len(keys) else n // 16 * 16
    assert len(set(keys[:per_epoch])) == per_epoch


def _train_count(run: Run) -> int:
    count: int = json.loads((run.path / "data.json").read_text())["indexes"][0]["splits"]["train"]
    return count


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_zero_stages_give_equal_losses(undisturbed: Make, stage: int) -> None:
    ours, reference = undisturbed(*FP32, f"zero.stage={stage}"), undisturbed(*FP32, "zero.stage=1")
    assert ours.trace() == reference.trace()
    np.testing.assert_allclose(losses(ours), losses(reference), atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_low_precision_stays_near_fp32(undisturbed: Make, precision: str, stage: int) -> None:
    low = undisturbed("model.dropout=0", f"train.precision={precision}", f"zero.stage={stage}")
    exact = losses(undisturbed(*FP32, "zero.stage=1"))
    np.testing.assert_allclose(losses(low), exact, rtol=0.02)
    assert losses(low) != exact


def test_same_seed_is_bit_equal_and_other_seed_differs(new_run: Make, undisturbed: Make) -> None:
    again, other = new_run(name="again"), new_run("run.seed=1", name="other")
    assert again(launcher="deepspeed") == 0, again.said()
    assert other() == 0
    assert losses(again) == losses(undisturbed())
    assert losses(other) != losses(again)
    assert other.trace() != again.trace()


@pytest.mark.parametrize(
    ("launcher", "ranks", "extra"),
    [("python", 1, ()), ("torchrun", 2, ("train.micro_batch=3",)), ("deepspeed", 3, ())],
    ids=["python", "torchrun, micro batches", "deepspeed, an uneven batch"],
)
def test_losses_do_not_depend_on_launcher_ranks_or_micro_batch(
    new_run: Make, undisturbed: Make, launcher: str, ranks: int, extra: tuple[str, ...]
) -> None:
    """The loss is a mean over samples, however they are shared out."""
    run = new_run(*FP32, "zero.stage=1")
    assert run(ranks, launcher, extra) == 0, run.said()
    assert run.trace() == undisturbed(*FP32, "zero.stage=1").trace()
    np.testing.assert_allclose(losses(run), losses(undisturbed(*FP32, "zero.stage=1")), atol=1e-3)


def test_second_export_replaces_list_of_subjects(undisturbed: Make, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed().path, run)
    out = tmp_path / "encoder"
    assert physio("export", str(run), str(out)).returncode == 0
    (run / "people.json").unlink()
    done = physio("export", str(run), str(out))
    assert done.returncode == 0 and "cannot tell whose signals" in done.stderr
    assert not (out / "people.json").exists()


def test_export_and_report_of_finished_run(undisturbed: Make, tmp_path: Path) -> None:
    run = undisturbed()
    out = tmp_path / "encoder"
    done = physio("export", run.url, str(out))
    assert done.returncode == 0, done.stderr
    assert "SIMULATED" in (out / "README.md").read_text()
    config = json.loads((out / "config.json").read_text())
    assert config["step"] == 16
    assert config["channels"][:3] == ["I", "II", "III"]
    people = json.loads((out / "people.json").read_text())
    assert people == json.loads((run.path / "people.json").read_text())
    assert config["sources"] == ["simulate"]
    encoder = load_encoder(str(out))
    features = encoder(torch.randn(2, 12, 10, 200))
    assert features.shape == (2, 12, 10, 80)
    trained = load_file(run.path / "checkpoints" / "step-00000016" / "model.safetensors")
    name = "layers.0.widen.weight"
    assert torch.equal(encoder.state_dict()[name], trained[f"encoder.{name}"])

    done = physio("report", run.url)
    assert done.returncode == 0, done.stderr
    page = (run.path / "report.html").read_text()
    assert "SIMULATED" in page
    assert page.count("<img") + page.count("<svg") >= 4


def test_export_of_missing_run_is_refused(tmp_path: Path) -> None:
    done = physio("export", str(tmp_path / "nowhere"), str(tmp_path / "out"))
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert not (tmp_path / "out").exists()
