"""Bad gradients, spikes, ranks that hang, averages of weights, and checkpoints on their way, under real launchers."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from physio_dist.errors import EXIT_STOPPED
from tests.conftest import S3
from tests.proxy import Proxy
from tests.system.launching import Run, end_session, physio, wait_until

Make = Callable[..., Run]
LEADS = "I,II,III,aVR,aVL,aVF,V1,V2,V3,V4,V5,V6"


def odd_set(simulated: str, folder: Path, uv_per_bit: str) -> str:
    """The simulated signals, told to be so much larger."""
    folder.mkdir()
    for tar in Path(simulated).glob("*.tar"):
        shutil.copy(tar, folder)
    done = physio("index", str(folder), f"channels={LEADS}", f"uv_per_bit={uv_per_bit}")
    assert done.returncode == 0, done.stderr
    return str(folder)


def mixed(simulated: str, odd: str) -> str:
    """One sample of each batch is of the odd set."""
    return f"data.index=[{{url: {simulated}, weight: 15}}, {{url: {odd}, weight: 1}}]"


@pytest.mark.parametrize(
    ("what", "uv_per_bit", "options"),
    [
        ("loss", "1e19", ("train.loss=squared", "train.precision=fp32", "zero.stage=1")),
        pytest.param(
            "gradient", "1e12", ("train.loss=squared", "train.precision=fp32", "zero.stage=0"), marks=pytest.mark.chaos
        ),
        ("gradient", "1e12", ("train.loss=squared", "train.precision=fp32", "zero.stage=1")),
    ],
)
def test_nonfinite_step_names_samples_and_saves_nothing(
    simulated: str, new_run: Make, tmp_path: Path, what: str, uv_per_bit: str, options: tuple[str, ...]
) -> None:
    run = new_run(*options, mixed(simulated, odd_set(simulated, tmp_path / "odd", uv_per_bit)), "train.save_every=1")
    assert run() == 1, run.said()
    messages = [line for line in run.said().splitlines() if "(exit status" in line]
    assert len(messages) == 1, run.said()
    assert f"the {what} of step 1 is not a finite number (rank " in messages[0]
    assert "no weight was changed" in messages[0]
    # The rank whose gradient it is, and not the one that got it from the other.
    assert messages[0].count("rank ") == 1
    (rank,) = [int(part[0]) for part in messages[0].split("rank ")[1:]]
    named = messages[0].split("samples ")[1].split(")")[0].split(", ")
    traced = json.loads((run.path / f"trace/rank-{rank}.jsonl").read_text().splitlines()[0])
    assert set(named) <= set(traced["keys"])
    assert not list(run.path.glob("checkpoints/*"))
    assert "Traceback" not in run.said()


def kill_rank_after(run: Run, step: int) -> None:
    """Start a run and kill one of its ranks after a step; return when the others have ended."""
    process = run.start()
    try:
        run.wait_for_step(process, step)
        random.choice(run.ranks()).kill()
        assert process.wait(timeout=90) != 0
        wait_until(lambda: not run.ranks(), "the ranks to end")
    finally:
        end_session(process)


def test_fp16_loss_scale_adapts_to_large_signals(simulated: str, new_run: Make, tmp_path: Path) -> None:
    odd = odd_set(simulated, tmp_path / "odd", "1000")
    # A later sample of the odd set is too large for a forward pass too.
    run = new_run("train.loss=squared", "train.precision=fp16", "train.steps=6", mixed(simulated, odd))
    assert run() == 0, run.said()
    lines = list(run.metrics().values())
    assert lines[0]["loss_scale"] == 1024
    left_out = [line["skipped"] for line in lines]
    assert sum(left_out) >= 1
    assert lines[-1]["loss_scale"] == 1024 / 2 ** sum(left_out[:-1])
    assert left_out[-1] == 0


def test_resumed_run_skips_same_spikes(undisturbed: Make, new_run: Make) -> None:
    options = ("train.loss=squared", "train.spike_factor=1.1", "train.skip_spikes=true", "train.steps=40")
    reference, run = undisturbed(*options), new_run(*options)
    spikes = [step for step, line in reference.metrics().items() if line["skipped"]]
    assert spikes and min(spikes) > 20
    assert f"spike in step {spikes[0]}, left out" in reference.said()
    kill_rank_after(run, random.randint(22, 36))
    assert run() == 0, run.said()
    ours, theirs = run.metrics(), reference.metrics()
    for name in ("loss", "grad_norm", "skipped"):
        assert [line[name] for line in ours.values()] == [line[name] for line in theirs.values()], name


def test_hanging_rank_is_named_and_run_finishes(new_run: Make) -> None:
    run = new_run("train.hang_timeout_s=4", "train.steps=30")
    process = run.start()
    try:
        run.wait_for_step(process, 5)
        stopped = run.ranks()[0]
        stopped.send_signal(signal.SIGSTOP)
        wait_until(lambda: "stalled: rank" in run.said(), "the other rank to say so", seconds=60)
        said = run.said()
        stopped.send_signal(signal.SIGCONT)
        assert process.wait(timeout=120) == 0, run.said()
    finally:
        end_session(process)
    assert "without progress, waiting for" in said
    assert "in fit" in said and "Current thread" in said, "the stacks of its threads"
    assert list(run.metrics()) == list(range(1, 31))


def test_ema_survives_kill_bit_equal_and_is_exported(undisturbed: Make, new_run: Make, tmp_path: Path) -> None:
    options = ("train.ema=0.9", "zero.stage=3")
    reference, run = undisturbed(*options), new_run(*options)
    kill_rank_after(run, random.randint(6, 13))
    assert run() == 0, run.said()
    last = "checkpoints/step-00000016"
    for name in ("model", "ema"):
        ours, theirs = (load_file(one.path / last / f"{name}.safetensors") for one in (run, reference))
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    averaged, raw = (load_file(reference.path / last / f"{name}.safetensors") for name in ("ema", "model"))
    key = "layers.0.widen.weight"
    for words, weights in (((), averaged), (("--raw",), raw)):
        out = tmp_path / f"export{len(words)}"
        done = physio("export", reference.url, str(out), *words)
        assert done.returncode == 0, done.stderr
        assert torch.equal(load_file(out / "encoder.safetensors")[key], weights[f"encoder.{key}"])
    assert not torch.equal(averaged[f"encoder.{key}"], raw[f"encoder.{key}"])
    # Another world and stage go on from it.
    assert run(1, extra=("train.steps=18", "zero.stage=1")) == 0, run.said()
    assert load_file(run.path / "checkpoints/step-00000018" / "ema.safetensors").keys() == averaged.keys()


def test_profile_covers_requested_steps(new_run: Make) -> None:
    run = new_run("train.profile=[3,4]", "train.steps=5")
    assert run() == 0, run.said()
    names = {event.get("name") for event in json.loads((run.path / "profile.json").read_text())["traceEvents"]}
    assert "aten::add" in names or "aten::add_" in names


@pytest.fixture()
def behind_proxy(s3: S3, simulated: str, tmp_path: Path) -> Iterator[tuple[Run, Path, Proxy]]:
    """A run into a bucket behind a proxy, its folder as the server has it, and the proxy."""
    proxy = Proxy(s3.port)
    env = {**s3.env, "AWS_ENDPOINT_URL": proxy.url}
    run = Run(tmp_path, "run", simulated, env=env, run_dir=f"{s3.bucket}/runs")
    yield run, s3.root / run.url.split("://", 1)[1], proxy
    proxy.stop()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("file", ["optimizer.safetensors", "manifest.json"])
def test_kill_during_checkpoint_upload_resumes_from_previous(
    behind_proxy: tuple[Run, Path, Proxy], undisturbed: Make, file: str
) -> None:
    run, there, proxy = behind_proxy
    held = proxy.inject(503, rf"^PUT .*step-00000010/{file}")
    process = run.start()
    try:
        wait_until(lambda: held.met > 0, "the checkpoint of step 10")
        # The loop does not wait for it.
        wait_until(lambda: "step 13/16" in run.said(), "step 13")
        for rank in run.ranks():
            rank.kill()
        assert process.wait(timeout=90) != 0
        wait_until(lambda: not run.ranks(), "the ranks to end")
    finally:
        end_session(process)
    assert not (there / "checkpoints/step-00000010/manifest.json").exists()
    assert (there / "checkpoints/step-00000005/manifest.json").exists()
    proxy.clear()
    assert run() == 0, run.said()
    assert [note["from_step"] for note in json.loads((there / "attempts.json").read_text())] == [0, 5]
    assert losses(there) == [line["loss"] for line in undisturbed().metrics().values()]


def test_sigterm_during_save_finishes_save(behind_proxy: tuple[Run, Path, Proxy]) -> None:
    run, there, proxy = behind_proxy
    run.options = ("train.steps=1000",)
    held = proxy.inject(503, r"^PUT .*step-00000010/optimizer.safetensors")
    process = run.start(launcher="deepspeed")
    try:
        wait_until(lambda: held.met > 0, "the checkpoint of step 10")
        run.ranks()[0].terminate()
        time.sleep(10)
        assert process.poll() is None, "it waits for what is on its way"
        proxy.clear()
        assert process.wait(timeout=90) == EXIT_STOPPED, run.said()
    finally:
        end_session(process)
    committed = sorted(file.parent.name for file in there.glob("checkpoints/*/manifest.json"))
    assert committed[:2] == ["step-00000005", "step-00000010"] and len(committed) == 3


def test_run_survives_storage_outage_during_upload(
    behind_proxy: tuple[Run, Path, Proxy], s3: S3, undisturbed: Make
) -> None:
    run, there, proxy = behind_proxy
    held = proxy.inject(503, r"^PUT .*step-00000010/model.safetensors")
    process = run.start()
    try:
        wait_until(lambda: held.met > 0, "the checkpoint of step 10")
        s3.stop()
        proxy.clear()
        time.sleep(60)
        assert process.poll() is None, run.said()
        assert "step 13/16" in run.said(), "the loop went on meanwhile"
        s3.start()
        assert process.wait(timeout=200) == 0, run.said()
    finally:
        s3.start()
        end_session(process)
    committed = sorted(file.parent.name for file in there.glob("checkpoints/*/manifest.json"))
    assert committed == ["step-00000010", "step-00000015", "step-00000016"]
    assert losses(there) == [line["loss"] for line in undisturbed().metrics().values()]
