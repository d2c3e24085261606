"""Logging of a training run: metrics, TensorBoard, sample traces, a tracker, and progress on the console."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch.utils.tensorboard import SummaryWriter

from physio_dist import __version__, storage
from physio_dist.config import PretrainConfig
from physio_dist.runs.run_dir import METRICS, PEOPLE_FILE, RunDir
from physio_dist.runs.run_files import ATTEMPTS, DATA, EXAMPLES, Attempt, DataFacts, ShardSetFacts
from physio_dist.runs.trackers import Tracker, open_tracker
from physio_dist.runs.typed_json import to_json
from physio_dist.runtime.distributed import DistInfo
from physio_dist.runtime.progress import Progress


@dataclass(frozen=True)
class TrainingData:
    """The facts of a run's training data that are logged and written beside its checkpoints.

    Attributes:
        indexes: facts of each shard set.
        people: pseudonyms of everybody in the train split, as hexadecimal numbers, sorted.
        windows: in the train split.
        channels: of each window.
        simulated: whether any of it is.
    """

    indexes: list[ShardSetFacts]
    people: list[str]
    windows: int
    channels: int
    simulated: bool


class RunLogger:
    """The run's growing files, the first rank's display, and a tracker where one is asked for.

    Args:
        options: of the run.
        place: of this rank.
        run_dir: of the run.
        data: what it trains on.
        say: prints a line (first rank only does something with it).
        attempt: number of this start.

    Attributes:
        newest: the newest line of metrics; empty on all ranks but the first.
    """

    def __init__(
        self, options: PretrainConfig, place: DistInfo, run_dir: RunDir, data: TrainingData, say: Callable[[str], None],
        attempt: int,
    ) -> None:  # fmt: skip
        self.options, self.place, self.run_dir, self.data = options, place, run_dir, data
        self.say, self.attempt = say, attempt
        self.first = place.rank == 0
        self.newest: dict[str, Any] = {}
        self._trace_name = f"trace/rank-{place.rank}.jsonl"
        self._tensorboard: SummaryWriter | None = None
        self._tracker: Tracker | None = None
        self._progress: Progress | None = None

    def open(self, start: int, device: torch.device, versions: dict[str, str]) -> None:
        """Open the growing files, and note what this start trains on and with."""
        if self.options.train.log_sample_keys:
            self.run_dir.open_lines(self._trace_name)
        if not self.first:
            return
        self.run_dir.open_lines(METRICS, keep_up_to=start)
        folder = self.run_dir.spool / "tensorboard"
        self._tensorboard = SummaryWriter(str(folder), purge_step=start + 1 if start else None, flush_secs=10)
        self._tracker = open_tracker(self.options, self.run_dir, self.say)
        storage.write_json(self.run_dir.file(DATA), to_json(DataFacts(self.data.indexes)))
        # Fusion must be able to tell later whether a person of its test set was seen here.
        storage.write_bytes(self.run_dir.file(PEOPLE_FILE), (json.dumps(self.data.people) + "\n").encode())
        self._note_attempt(start, device, versions)

    def _note_attempt(self, start: int, device: torch.device, versions: dict[str, str]) -> None:
        name = self.run_dir.file(ATTEMPTS)
        try:
            earlier = storage.read_json(name)
        except storage.NotFoundError:
            earlier = []
        ours = {"physio-dist": __version__, "torch": torch.__version__, **versions}
        attempt = Attempt(
            attempt=self.attempt, from_step=start, world=self.place.world, zero_stage=self.options.zero.stage,
            precision=self.options.train.precision, device=device_name(device), threads=torch.get_num_threads(),
            versions={**ours, "python": platform.python_version(), "numpy": numpy.__version__},
        )  # fmt: skip
        storage.write_json(name, [*earlier, to_json(attempt)])

    def log_banner(self, start: int, micro: int, passes: int, parameters: int, device: torch.device) -> None:
        """Print model, data and batch sizes before training starts."""
        options, data = self.options, self.data
        simulated = " SIMULATED" if data.simulated else ""
        epochs = options.train.steps * options.train.global_batch / max(data.windows, 1)
        self.say(
            f"{options.model.preset} encoder, {parameters / 1e6:.2f} M parameters, {options.train.precision}, ZeRO "
            f"stage {options.zero.stage}, {self.place.world} rank(s) on {device_name(device)}"
        )
        self.say(
            f"{data.windows}{simulated} windows of {data.channels} leads to train on; global batch "
            f"{options.train.global_batch} = {self.place.world} rank(s) x {passes} pass(es) x {micro}; "
            f"{options.train.steps} steps are {epochs:.1f} epochs"
        )
        where = f"going on after step {start}" if start else "starting"
        self.say(f"{where}: {self.run_dir.url} (attempt {self.attempt})")
        if self.first:
            self._progress = Progress(options.train.steps, "step", initial=start, log=self.say)

    def log(self, line: dict[str, Any]) -> None:
        """Write a line of metrics (first rank)."""
        clean = to_json(line)
        self.newest = clean
        self.run_dir.add_line(METRICS, clean)
        numbers = {
            name: value for name, value in clean.items()
            if isinstance(value, int | float) and name not in ("step", "time")
        }  # fmt: skip
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, line["step"])
        if self._tracker is not None:
            self._tracker.log(numbers, line["step"])

    def trace(self, step: int, keys: list[str]) -> None:
        """Write the sample keys of this rank's step."""
        self.run_dir.add_line(self._trace_name, {"step": step, "attempt": self.attempt, "keys": keys})

    def examples(self, data: bytes) -> None:
        """Write the newest validation's held-out windows."""
        storage.write_bytes(self.run_dir.file(EXAMPLES), data)

    def log_progress(self, step: int, loss: float, rate: float, wait: float) -> None:
        """Show step, loss, samples per second and share of time spent waiting for data (first rank)."""
        if self._progress is not None:
            self._progress.report(step, f"loss {loss:.4f}, {rate:.0f} samples/s, data wait {wait:.1%}")

    def flush(self) -> None:
        """Flush TensorBoard's files."""
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Close all files and send the rest."""
        if self._progress is not None:
            self._progress.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._tracker is not None:
            self._tracker.close()
        self.run_dir.close()


def device_name(device: torch.device) -> str:
    """Name of the GPU, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
