"""Processes that die and signals that come, each at a random moment: what is trained on stays exact."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.system.launching import Run, agree, end_session, wait_until

Make = Callable[..., Run]
FP32 = ("train.precision=fp32", "model.dropout=0")
RANDOM = random.Random(os.environ.get("PHYSIO_DIST_TEST_SEED"))


def kill_rank(process: subprocess.Popen[bytes], run: Run) -> None:
    RANDOM.choice(run.ranks()).kill()


def kill_launcher(process: subprocess.Popen[bytes], run: Run) -> None:
    process.kill()


def kill_inner_launcher(process: subprocess.Popen[bytes], run: Run) -> None:
    (inner,) = psutil.Process(process.pid).children()
    inner.kill()


def interrupt(process: subprocess.Popen[bytes], run: Run) -> None:
    # A terminal sends Ctrl-C to the whole foreground group.
    os.killpg(process.pid, signal.SIGINT)


def terminate(process: subprocess.Popen[bytes], run: Run) -> None:
    process.terminate()


def terminate_rank(process: subprocess.Popen[bytes], run: Run) -> None:
    RANDOM.choice(run.ranks()).terminate()


Fault = Callable[[subprocess.Popen[bytes], Run], None]


def disturb(run: Run, fault: Fault, moments: tuple[int, int] = (8, 13), extra: tuple[str, ...] = ()) -> int:
    """Start a run, strike after a random step, see that no rank lives on; the launcher's status.

    A checkpoint counts some steps after its own, because the loop does not wait for it.
    """
    moment = RANDOM.randint(*moments)
    process = run.start(launcher="deepspeed", extra=extra)
    try:
        run.wait_for_step(process, moment)
        fault(process, run)
        status = process.wait(timeout=90)
        wait_until(lambda: not run.ranks(), f"the ranks of {run.name} to end", seconds=90)
    finally:
        end_session(process)
    print(f"{fault.__name__} after step {moment}: status {status}")
    return status


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_killed_rank_resumes_bit_equal_at_every_zero_stage(undisturbed: Make, new_run: Make, stage: int) -> None:
    """Bit-equal to the undisturbed run, dropout on."""
    run, reference = new_run(f"zero.stage={stage}"), undisturbed(f"zero.stage={stage}")
    assert disturb(run, kill_rank) != 0
    assert run() == 0, run.said()
    assert run.starts() in ([0, 5], [0, 10])
    agree(run, reference)


def test_interrupted_launchers_and_ranks_end_together_and_resume_bit_equal(undisturbed: Make, new_run: Make) -> None:
    """One run that is disturbed in one way after the other, each time some steps on."""
    run, reference = new_run("train.steps=40"), undisturbed("train.steps=40")
    # With no checkpoint near, what is gone on from is the step that the rank was in.
    assert disturb(run, terminate_rank, extra=("train.save_every=1000",)) == 75
    assert "stopped" in run.said().splitlines()[-1] or "exit status 75" in run.said()
    saved = max(run.metrics())
    faults: list[tuple[Fault, set[int]]] = [
        (kill_inner_launcher, {0, 1, 75, 255, -signal.SIGKILL}),
        (interrupt, {1, 130, -signal.SIGINT}),
        (terminate, {143, -signal.SIGTERM}),
    ]
    for fault, statuses in faults:
        reached = max(run.metrics())
        assert disturb(run, fault, (reached + 2, reached + 6)) in statuses
    assert run() == 0, run.said()
    assert run.starts()[:2] == [0, saved]
    assert len(run.starts()) == 5
    agree(run, reference)


def test_sigusr1_saves_checkpoint_and_training_continues(undisturbed: Make, new_run: Make) -> None:
    """Any rank may be asked; training goes on, and a kill afterwards costs nothing that was before it."""
    run, reference = new_run("train.steps=40", "train.save_every=1000"), undisturbed("train.steps=40")
    process = run.start()
    try:
        run.wait_for_step(process, 5)
        RANDOM.choice(run.ranks()).send_signal(signal.SIGUSR1)
        folder = run.path / "checkpoints"
        wait_until(lambda: any(folder.glob("*/manifest.json")), "the checkpoint")
        (asked,) = [int(file.parent.name.removeprefix("step-")) for file in folder.glob("*/manifest.json")]
        run.wait_for_step(process, asked + 2)
        RANDOM.choice(run.ranks()).kill()
        assert process.wait(timeout=90) != 0
        wait_until(lambda: not run.ranks(), "the ranks to end", seconds=90)
    finally:
        end_session(process)
    assert run() == 0, run.said()
    assert run.starts() == [0, asked]
    agree(run, reference)


def test_killed_launcher_ends_its_ranks(undisturbed: Make, new_run: Make) -> None:
    """It can pass no signal on, so its ranks have to notice."""
    run, reference = new_run("zero.stage=1"), undisturbed("zero.stage=1")
    assert disturb(run, kill_launcher) == -signal.SIGKILL
    assert run() == 0, run.said()
    agree(run, reference)


@pytest.fixture(scope="module")
def killed(simulated: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with two checkpoints, of which a rank was killed."""
    run = Run(tmp_path_factory.mktemp("killed"), "run", simulated, (*FP32, "zero.stage=1"))
    assert disturb(run, kill_rank, (13, 13)) != 0
    return run


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [(3, 2), (2, 0), (1, 3), pytest.param(1, 1, marks=pytest.mark.chaos), pytest.param(3, 3, marks=pytest.mark.chaos)],
)
def test_killed_run_resumes_at_other_world_size_and_zero_stage(
    undisturbed: Make, killed: Run, tmp_path: Path, ranks: int, stage: int
) -> None:
    run, reference = killed.copied(tmp_path), undisturbed(*FP32, "zero.stage=1")
    assert run(ranks, extra=(f"zero.stage={stage}", "train.micro_batch=5")) == 0, run.said()
    assert run.trace() == reference.trace()
    ours = [line["loss"] for line in run.metrics().values()]
    np.testing.assert_allclose(ours, [line["loss"] for line in reference.metrics().values()], atol=1e-3)


def test_resume_accepts_other_precision_and_more_steps(undisturbed: Make, tmp_path: Path) -> None:
    run = undisturbed("model.dropout=0", "train.precision=bf16", "zero.stage=1").copied(tmp_path)
    assert run(extra=("train.precision=fp32", "train.steps=20")) == 0, run.said()
    assert run.starts() == [0, 16]
    assert list(run.metrics()) == list(range(1, 21))


def test_finished_run_restarted_does_nothing(undisturbed: Make, tmp_path: Path) -> None:
    run = undisturbed().copied(tmp_path)
    before = (run.path / "metrics.jsonl").read_bytes()
    assert run(launcher="deepspeed") == 0, run.said()
    assert (run.path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", [pytest.param("truncate", marks=pytest.mark.chaos), "flip", "no_manifest"])
def test_damaged_newest_checkpoint_falls_back_to_previous(
    undisturbed: Make, killed: Run, tmp_path: Path, damage: str
) -> None:
    run = killed.copied(tmp_path)
    newest = sorted((run.path / "checkpoints").glob("*/manifest.json"))[-1].parent
    victim = newest / ("manifest.json" if damage == "no_manifest" else "optimizer.safetensors")
    data = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(data[:-100])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        victim.unlink()
    assert run() == 0, run.said()
    if damage != "no_manifest":
        assert "going back" in run.said()
    assert run.starts()[1] == int(newest.name.removeprefix("step-")) - 5
    assert run.trace() == undisturbed(*FP32).trace()


def test_run_starts_from_checkpoint_of_another_run(undisturbed: Make, new_run: Make) -> None:
    other = undisturbed()
    run = new_run(f"resume={other.path / 'checkpoints' / 'step-00000010'}")
    assert run() == 0, run.said()
    assert run.starts() == [10]
    assert {step: run.trace()[step] for step in range(11, 17)} == {step: other.trace()[step] for step in range(11, 17)}
    assert run.metrics()[16]["loss"] == other.metrics()[16]["loss"]
