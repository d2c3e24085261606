"""The training loop in this process, over a fake backend."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from physio_dist.errors import Stopped
from physio_dist.runtime import watchdog
from physio_dist.storage import StorageError
from physio_dist.training import checkpoint
from physio_dist.training.nonfinite import NonFiniteError
from physio_dist.training.step_guard import FIRST_SCALE
from physio_dist.training.validation import Validation
from tests.training.fakes import MASK, Run, options_for

CONTRACT = (
    "step epoch samples loss loss_intra loss_inter val_loss lr grad_norm samples_per_s data_wait_frac mfu step_s time"
)


def committed_steps(run: Run) -> list[int]:
    steps = sorted(checkpoint.steps(run.folder))
    return [step for step in steps if checkpoint.is_committed(checkpoint.folder_of(run.folder, step))]


def test_metrics_lines_have_fields_of_contract(tmp_path: Path) -> None:
    run = Run(tmp_path, options_for(4, log_every=3))
    run.fit()
    assert [line["step"] for line in run.recorder.lines] == [1, 3, 4]
    assert all(set(CONTRACT.split()) <= set(line) for line in run.recorder.lines)
    last = run.recorder.lines[-1]
    assert (last["samples"], last["epoch"], last["val_loss"], last["mfu"]) == (16, 1, None, None)
    assert last["loss"] > 0 and last["grad_norm"] > 0 and 0 <= last["data_wait_frac"] <= 1
    assert run.backend.applied == 4


def test_loss_is_mean_over_global_batch_whatever_the_micro_steps(tmp_path: Path) -> None:
    single, double = Run(tmp_path / "1", options_for(1)), Run(tmp_path / "2", options_for(1))
    single.share = replace(single.share, micro=4, micro_steps=1)
    for run in (single, double):
        run.backend.train(False)  # No dropout, whose draws depend on the micro step.
        run.fit()
    assert single.losses == pytest.approx(double.losses)


def test_callbacks_hear_of_phases_in_order(tmp_path: Path) -> None:
    run = Run(tmp_path, options_for(2, save_every=2))
    run.fit()
    assert run.recorder.begun == [1, 2]
    step = [watchdog.DATA, watchdog.PASS, watchdog.AGREE, watchdog.MOVE]
    assert run.recorder.phases == [(1, phase) for phase in step] + [(2, phase) for phase in [*step, watchdog.SAVE]]


def test_batches_are_released_after_their_step_and_validation(tmp_path: Path) -> None:
    run = Run(tmp_path, options_for(3, val_every=3))
    released: dict[int, list[int]] = {}
    run.recorder.on_metrics = lambda step, line: released.update({step: list(run.dataset.released)})  # type: ignore
    run.fit(Validation(run.dataset, MASK, run.options, run.share))  # type: ignore[arg-type]
    # Batches of training count from 0; each of the three passes of validation reads a batch 0.
    assert released == {1: [0], 2: [0, 1], 3: [0, 1, 2, 0, 0, 0]}


def test_checkpoints_are_saved_every_save_every_steps_and_at_the_end(tmp_path: Path) -> None:
    run = Run(tmp_path, options_for(7, save_every=3, keep_checkpoints=10))
    run.fit()
    assert run.saved == [3, 6, 7] == committed_steps(run)


def test_resumed_run_is_bit_equal_to_uninterrupted_run(tmp_path: Path) -> None:
    whole = Run(tmp_path / "whole", options_for(6))
    whole.fit()
    first = Run(tmp_path / "parts", options_for(6, save_every=3))
    trainer = first.trainer()
    first.recorder.on_metrics = lambda step, line: interrupt(step)  # type: ignore[method-assign]

    def interrupt(step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    trainer.checkpointer.finish()
    second = Run(tmp_path / "parts", options_for(6, save_every=3))
    assert second.start == 3
    second.fit()
    assert second.losses == whole.losses[3:]
    assert all(torch.equal(value, whole.backend.weights()[name]) for name, value in second.backend.weights().items())


def test_preemption_saves_and_raises_stopped(tmp_path: Path) -> None:
    run = Run(tmp_path, options_for(9))
    run.recorder.on_metrics = lambda step, line: step == 3 and setattr(run.preemption, "reason", "SIGTERM")  # type: ignore
    with pytest.raises(Stopped, match="SIGTERM"):
        run.fit()
    assert run.saved == [4] == committed_steps(run)
    assert run.backend.applied == 4


def test_preemption_in_last_step_ends_run_normally(tmp_path: Path) -> None:
    run = Run(tmp_path, options_for(2))
    run.recorder.on_metrics = lambda step, line: step == 1 and setattr(run.preemption, "reason", "SIGINT")  # type: ignore
    run.fit()
    assert run.saved == [2]


def test_checkpoint_request_saves_and_training_goes_on(tmp_path: Path) -> None:
    run = Run(tmp_path, options_for(5, keep_checkpoints=10))
    run.recorder.on_metrics = lambda step, line: step == 2 and setattr(run.preemption, "save", True)  # type: ignore
    run.fit()
    assert run.saved == [3, 5]
    assert not run.preemption.save


def test_nonfinite_loss_raises_naming_samples_and_leaves_weights(tmp_path: Path) -> None:
    run = Run(tmp_path, options_for(4, save_every=1))
    bad = run.dataset.batch(3)
    bad.scale[2] = math.inf
    run.batches[3] = bad
    with pytest.raises(NonFiniteError, match=r"loss of step 3 .*rank 0, samples window-10\)"):
        run.fit()
    assert run.saved == [1, 2]
    saved = checkpoint.newest(run.folder, print)
    assert saved is not None
    assert all(torch.equal(value, saved.model[name]) for name, value in run.backend.weights().items())


def test_nonfinite_gradient_raises_naming_samples_of_its_microbatch(tmp_path: Path) -> None:
    run = Run(tmp_path, options_for(4))
    run.backend.bad_gradient_steps = {1}
    with pytest.raises(NonFiniteError, match=r"gradient of step 2 .*window-") as caught:
        run.fit()
    assert all(f"window-{i}" in str(caught.value) for i in range(4, 8))
    assert run.backend.applied == 1


@pytest.mark.parametrize("skip", [False, True])
def test_spike_warns_and_is_applied_unless_skipped(tmp_path: Path, skip: bool) -> None:
    run = Run(tmp_path, options_for(25, spike_factor=10.0, skip_spikes=skip, log_every=5, loss="squared"))
    loud = run.dataset.batch(22)
    loud.scale[1] = 1000.0
    run.batches[22] = loud
    run.fit()
    (warning,) = run.recorder.warnings
    assert "spike in step 22" in warning and "samples window-85," in warning
    assert ("left out:" in warning) == skip
    assert (run.backend.applied, run.backend.skipped) == ((24, 1) if skip else (25, 0))
    assert [line["skipped"] for line in run.recorder.lines] == [0, 0, 0, 0, 0, int(skip)]


def test_fp16_overflow_skips_step_and_halves_scale(tmp_path: Path) -> None:
    run = Run(tmp_path, options_for(3, precision="fp16"))
    run.backend.bad_gradient_steps = {1}
    run.fit()
    assert [line["loss_scale"] for line in run.recorder.lines] == [FIRST_SCALE, FIRST_SCALE, FIRST_SCALE / 2]
    assert (run.backend.applied, run.backend.skipped) == (2, 1)


def test_checkpoint_error_ends_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise StorageError("the disk is full")

    run = Run(tmp_path, options_for(50, save_every=1))
    monkeypatch.setattr(checkpoint, "write", fail)
    with pytest.raises(StorageError, match="disk is full"):
        run.fit()
    assert not committed_steps(run)


def test_validation_joins_metrics_lines_with_baselines(tmp_path: Path) -> None:
    options = options_for(5, val_every=2, log_every=100, val_samples=6)
    run = Run(tmp_path, options)
    dataset: Any = run.dataset
    run.fit(Validation(dataset, MASK, options, run.share))
    lines = {line["step"]: line for line in run.recorder.lines}
    assert [step for step, line in lines.items() if line["val_loss"] is not None] == [2, 4, 5]
    assert lines[1]["val_loss"] is None
    assert {"val_intra", "val_inter", "val_zero_loss", "val_interp_loss"} <= set(lines[5])
    assert lines[2]["val_zero_loss"] == lines[5]["val_zero_loss"] > 0
    assert len(run.recorder.examples) == 3


def test_validation_with_no_windows_is_left_out(tmp_path: Path) -> None:
    options = options_for(2, val_every=1, val_samples=0)
    run = Run(tmp_path, options)
    dataset: Any = run.dataset
    run.fit(Validation(dataset, MASK, options, run.share))
    assert [line["val_loss"] for line in run.recorder.lines] == [None, None]
