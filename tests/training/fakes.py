"""A backend, a dataset and snapshots for training in this process, without DeepSpeed or a process group."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from physio_dist.config import PretrainConfig
from physio_dist.data.loading.dataset import Batch
from physio_dist.models.encoders.criss_cross import preset
from physio_dist.objectives.dual_mask import MaskConfig
from physio_dist.runtime.distributed import BatchShare
from physio_dist.runtime.preemption import PreemptionHandler
from physio_dist.training import checkpoint
from physio_dist.training.async_checkpoint import AsyncCheckpointer
from physio_dist.training.backends.base import Tensors
from physio_dist.training.batch import MaskedBatch, prepare_batch
from physio_dist.training.callbacks import Callback
from physio_dist.training.snapshot import Snapshots
from physio_dist.training.step_guard import StepGuard
from physio_dist.training.trainer import Trainer

BATCH, CHANNELS, PATCHES = 4, 3, 4
MASK = MaskConfig(0.5, 0.3)
MOMENTS = ("exp_avg", "exp_avg_sq")


class LinearModel(nn.Module):
    """Predicts a patch linearly from the visible part of the window, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(PATCHES, PATCHES)
        self.gain = nn.Parameter(torch.ones(CHANNELS, 1, 1))

    def forward(self, x: Tensor, hidden: Tensor, valid: Tensor | None) -> Tensor:
        visible = torch.where(hidden.unsqueeze(-1), 0.0, x)
        mixed = self.mix(visible.transpose(2, 3)).transpose(2, 3) * self.gain
        return nn.functional.dropout(mixed, 0.1, self.training)


class FakeBackend:
    """AdamW in one process; see `physio_dist.training.backends.base.Backend`.

    Attributes:
        applied, skipped: numbers of optimizer steps taken and dropped.
        bad_gradient_steps: numbers of optimizer steps whose gradient is made infinite.
    """

    device = torch.device("cpu")

    def __init__(self, options: PretrainConfig) -> None:
        torch.manual_seed(options.run.seed)
        self.model, self.scale = LinearModel(), 1.0
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=options.train.lr)
        self.max_grad_norm = options.train.max_grad_norm
        self.applied = self.skipped = 0
        self.bad_gradient_steps: set[int] = set()

    def __call__(self, *inputs: Any) -> Tensor:
        result: Tensor = self.model(*inputs)
        return result

    def train(self, mode: bool) -> None:
        self.model.train(mode)

    def set_lr(self, lr: float) -> None:
        self.optimizer.param_groups[0]["lr"] = lr

    def prepare(self, inputs: tuple[Any, ...]) -> None:
        (self(*inputs) * 0.0).sum().backward()  # type: ignore[no-untyped-call]
        self.set_lr(0.0)
        self.step(0.0)
        self.applied = 0
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def backward(self, loss: Tensor, last: bool, micro_steps: int) -> None:
        if self.applied + self.skipped in self.bad_gradient_steps:
            loss = loss + (self.model.gain * 0.0).square().sum().sqrt()
        loss.backward()  # type: ignore[no-untyped-call]

    def gradient_norm(self) -> Tensor:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return torch.where(torch.isfinite(norm), norm, torch.nan)

    def step(self, norm: float) -> None:
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_grad_norm, torch.tensor(norm))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.applied += 1

    def skip(self) -> None:
        self.optimizer.zero_grad()
        self.skipped += 1

    @contextlib.contextmanager
    def own_norms(self) -> Iterator[list[Tensor]]:
        norms: list[Tensor] = []
        hooks = [p.register_hook(lambda grad: norms.append(grad.norm())) for p in self.model.parameters()]
        self.skipped -= 1  # The step under diagnosis is repeated.
        yield norms
        self.skipped += 1
        for hook in hooks:
            hook.remove()

    def weights(self, keep: bool = True) -> Tensors:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def optimizer_state(self, keep: bool = True) -> Tensors:
        named = dict(self.model.named_parameters())
        state = {f"{m}/{name}": self.optimizer.state[p][m].clone() for m in MOMENTS for name, p in named.items()}
        return {**state, "step": torch.tensor(float(next(iter(self.optimizer.state.values()))["step"]))}

    def ema_weights(self, keep: bool = True) -> Tensors:
        return {}

    def load_optimizer_state(self, state: Tensors) -> None:
        for name, p in self.model.named_parameters():
            for moment in MOMENTS:
                self.optimizer.state[p][moment].copy_(state[f"{moment}/{name}"])
            self.optimizer.state[p]["step"].fill_(float(state["step"]))

    def load_ema(self, average: Tensors) -> None:
        pass


class FakeDataset:
    """The part of `ShardDataset` that the loop needs: windows of noise."""

    signal = "ecg"
    sets = (SimpleNamespace(rate=200, simulated=True),)
    info = SimpleNamespace(channels=["V1", "V2", "V3"], samples=PATCHES * 200)

    def __init__(self) -> None:
        self.released: list[int] = []

    def keys(self, samples: tuple[np.ndarray, np.ndarray]) -> list[str]:
        return [f"window-{i}" for i in samples[1]]

    def members(self, split: str) -> list[np.ndarray]:
        return [np.arange(100, 106)]

    def read_batch(
        self, step: int, sets: np.ndarray, ids: np.ndarray, positions: np.ndarray, size: int, fetching: bool = True
    ) -> Batch:
        signal = np.zeros((size, CHANNELS, PATCHES * 200), np.int16)
        for row, sample in enumerate(ids):
            rng = np.random.default_rng(int(sample))
            signal[row] = (100 * rng.standard_normal(signal[row].shape)).astype(np.int16)
        weight = (np.arange(size) < len(ids)).astype(np.float32)
        padded = np.concatenate([positions, np.zeros(size - len(ids), np.int64)])
        valid = np.ones((size, CHANNELS), dtype=bool)
        release = functools.partial(self.released.append, step)
        return Batch(step, signal, np.ones(size, np.float32), valid, weight, padded, (sets, ids), release)

    def batch(self, step: int, seed: int = 0) -> MaskedBatch:
        """The global batch of a step (from 1) with its masks."""
        ids = np.arange((step - 1) * BATCH, step * BATCH)
        batch = self.read_batch(step - 1, np.zeros_like(ids), ids, ids, BATCH)
        return prepare_batch(batch, MASK, [[0], [1], [2]], seed, "train")


class Recorder(Callback):
    """Keeps what the loop tells its callbacks."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.phases: list[tuple[int, str]] = []
        self.begun: list[int] = []
        self.examples: list[bytes] = []

    def on_step_begin(self, step: int) -> None:
        self.begun.append(step)

    def on_phase(self, step: int, phase: str) -> None:
        self.phases.append((step, phase))

    def on_metrics(self, step: int, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def on_warning(self, message: str) -> None:
        self.warnings.append(message)

    def on_examples(self, data: bytes) -> None:
        self.examples.append(data)


def options_for(steps: int, **train: Any) -> PretrainConfig:
    """Options of a run of four windows a step, in two micro steps, whose every step is logged."""
    options = PretrainConfig()
    values = {"steps": steps, "global_batch": BATCH, "log_every": 1, "save_every": 1000, "val_every": 1000,
              "warmup_steps": 0, "lr": 1e-2, "precision": "fp32", "ema": 0.0, **train}  # fmt: skip
    for name, value in values.items():
        setattr(options.train, name, value)
    return options


class Run:
    """A run in a folder: everything that a trainer is made of, resumed from the folder's newest checkpoint.

    Attributes:
        saved: steps of the checkpoints committed.
        batches: of the steps that differ from those of `FakeDataset`.
    """

    def __init__(self, folder: Path, options: PretrainConfig) -> None:
        self.folder, self.options, self.dataset = str(folder), options, FakeDataset()
        self.backend, self.recorder, self.preemption = FakeBackend(options), Recorder(), PreemptionHandler()
        self.saved: list[int] = []
        self.batches: dict[int, MaskedBatch] = {}
        self.share = BatchShare(0, 1, 2, BATCH // 2, 1000)
        saved = checkpoint.newest(self.folder, self.recorder.warnings.append)
        self.start = saved.progress.step if saved else 0
        micro = torch.zeros(2, CHANNELS, PATCHES, 200)
        if saved:
            self.backend.model.load_state_dict(saved.model)
        self.backend.prepare((micro, torch.zeros(2, CHANNELS, PATCHES, dtype=torch.bool), None))
        if saved:
            self.backend.load_optimizer_state(saved.optimizer)
        self.guard = StepGuard(options.train, saved.progress.guard if saved else {})
        run_dir = SimpleNamespace(url=self.folder, sync=lambda: None)
        logger: Any = SimpleNamespace(
            first=True, options=options, run_dir=run_dir, newest={}, flush=lambda: None
        )  # fmt: skip
        source: Any = SimpleNamespace(dataset=self.dataset, fingerprints=["f" * 64], order_facts={})
        lease: Any = SimpleNamespace(check=lambda: None)
        self.snapshots = Snapshots(
            backend=self.backend, guard=self.guard, source=source, encoder=preset("tiny"), logger=logger, lease=lease,
            on_commit=lambda step, _: self.saved.append(step),
        )  # fmt: skip

    def trainer(self, validation: Any = None) -> Trainer:
        """The trainer of this run, without validation unless one is given."""
        dataset: Any = self.dataset
        return Trainer(
            options=self.options, share=self.share, backend=self.backend, dataset=dataset, loader=self._loader(),
            epoch_of=lambda batch: batch // 3, validation=validation or SimpleNamespace(total=0), guard=self.guard,
            checkpointer=AsyncCheckpointer(True, self.snapshots.take), preemption=self.preemption,
            callbacks=self.recorder,
        )  # fmt: skip

    def fit(self, validation: Any = None) -> None:
        """Train to the end."""
        self.trainer(validation).fit(self.start)

    @property
    def losses(self) -> list[float]:
        """Losses of the steps so far."""
        return [line["loss"] for line in self.recorder.lines]

    def _loader(self) -> Iterator[MaskedBatch]:
        for step in range(self.start + 1, self.options.train.steps + 1):
            yield self.batches.get(step) or self.dataset.batch(step)
