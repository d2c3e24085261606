"""Starts the real launchers and looks at what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CONFIG = str(ROOT / "configs" / "pretrain" / "quickstart.yaml")
# Small and quick, with every part of a run in it.
SMALL = (
    "train.steps=16", "train.global_batch=16", "train.warmup_steps=3", "train.log_every=1", "train.val_every=8",
    "train.val_samples=16", "train.save_every=5", "train.log_sample_keys=true", "train.threads=1",
)  # fmt: skip
EXACT = ("loss", "loss_intra", "loss_inter", "val_loss", "grad_norm", "lr")


@dataclass
class Run:
    """A run to be launched, perhaps several times with the same options."""

    folder: Path
    name: str
    index: str
    options: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    run_dir: str | None = None

    @property
    def url(self) -> str:
        return f"{self.run_dir or self.folder / 'runs'}/{self.name}"

    @property
    def path(self) -> Path:
        return Path(self.url)

    @property
    def log(self) -> Path:
        return self.folder / f"{self.name}.log"

    def copied(self, folder: Path) -> Run:
        """The run as it stands now, in another folder; where a run lies is no part of it."""
        copy = replace(self, folder=folder)
        shutil.copytree(self.path, copy.path)
        return copy

    def words(self) -> list[str]:
        where = f"run.dir={self.run_dir or self.folder / 'runs'}"
        cache = f"data.cache_dir={self.folder / 'cache'}"
        return [where, f"run.name={self.name}", f"data.index={self.index}", cache, *SMALL, *self.options]

    def start(self, ranks: int = 2, launcher: str = "ranks", extra: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Start the launcher in a session of its own, as a shell would start it in a terminal."""
        script = [str(ROOT / "physio_dist" / "pretrain.py"), "--config", CONFIG, *self.words(), *extra]
        command = {
            "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()), *script],
            "torchrun": [str(BIN / "torchrun"), "--standalone", f"--nproc-per-node={ranks}", *script],
            "ranks": [sys.executable, str(ROOT / "tests" / "system" / "launch_ranks.py"), sys.executable, *script],
            "python": [sys.executable, *script],
        }[launcher]
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "xdg"), **self.env}
        if launcher == "ranks":
            environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip

    def __call__(self, ranks: int = 2, launcher: str = "ranks", extra: tuple[str, ...] = ()) -> int:
        """Launch and wait; the launcher's exit status."""
        process = self.start(ranks, launcher, extra)
        try:
            return process.wait(timeout=240)
        finally:
            end_session(process)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """Living ranks of this run."""
        found = []
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                alive = process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                continue
            script = any(word.endswith("pretrain.py") for word in words)
            launched = any("launch" in word or word.endswith(("deepspeed", "torchrun")) for word in words[:6])
            ours = f"run.name={self.name}" in words and f"data.cache_dir={self.folder / 'cache'}" in words
            if script and not launched and alive and ours:
                found.append(process)
        return found

    def metrics(self) -> dict[int, dict[str, Any]]:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]
        steps = [line["step"] for line in lines]
        assert steps == sorted(set(steps)), "a step is logged once, in order"
        return {line["step"]: line for line in lines}

    def trace(self) -> dict[int, list[str]]:
        """Keys trained on in each step; of a step the highest attempt counts."""
        found: dict[int, dict[int, list[str]]] = {}
        for file in (self.path / "trace").glob("rank-*.jsonl"):
            for line in map(json.loads, file.read_text().splitlines()):
                found.setdefault(line["step"], {}).setdefault(line["attempt"], []).extend(line["keys"])
        return {step: sorted(attempts[max(attempts)]) for step, attempts in sorted(found.items())}

    def starts(self) -> list[int]:
        """The step each attempt went on from."""
        return [note["from_step"] for note in json.loads((self.path / "attempts.json").read_text())]

    def wait_for_step(self, process: subprocess.Popen[bytes], step: int) -> None:
        """Wait until a step is logged."""
        file = self.path / "metrics.jsonl"
        wait_until(
            lambda: process.poll() is not None or (file.exists() and file.read_text().count("\n") >= step),
            f"step {step} of {self.name}",
        )
        assert process.poll() is None, self.said()


def agree(run: Run, reference: Run) -> None:
    """The same samples, and bit-equal losses."""
    assert run.trace() == reference.trace()
    ours, theirs = run.metrics(), reference.metrics()
    assert list(ours) == list(theirs)
    for step, line in theirs.items():
        assert {name: ours[step][name] for name in EXACT} == {name: line[name] for name in EXACT}, f"step {step}"


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Poll; a condition that never comes true is a failure."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a launcher's session, so that no test leaves a process behind."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def physio(
    *words: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the console script."""
    return subprocess.run(
        [str(BIN / "physio-dist"), *words], env={**os.environ, **(env or {})}, cwd=cwd, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
