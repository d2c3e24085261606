"""Many fusion heads of one shape trained at once: the folds and inner splits of a configuration.

A head is far too small to keep a core busy, so all of them are one batched model: their parameters are stacked, and
each still has its own rows, standardisation, batches and random draws. What becomes of one does not depend on the
others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from physio_dist.models.fusion import ConcatHead, Reduction
from physio_dist.shards.order import number_of, permutation

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# Steps of an epoch, from the size of the whole table: equal for all heads, so that one optimizer serves them, and
# bounded, so that a trial on a large set does not take for ever.
_ROWS_A_STEP = 128
_MOST_STEPS = 64
# Values of a stack of inputs, at most: 128 MB.
_MOST_VALUES = 1 << 25
# Up to this many values inputs are standardised once rather than in every step: 256 MB.
_MOST_READY = 1 << 26


@dataclass(frozen=True)
class Job:
    """One head to train.

    Attributes:
        inputs: for each modality float32 ``[n, f]``, all rows of the table.
        reductions: for each modality, what ``rows`` say of its features.
        label: int64 ``[n]``; only those of ``rows`` are read.
        rows: int64, rows of the table to train on.
        purpose: whatever tells its random draws from those of other heads, the run's seed among it.
    """

    inputs: Mapping[str, Floats]
    reductions: Mapping[str, Reduction]
    label: Ints
    rows: Ints
    purpose: str


class _Classify(nn.Module):
    """A head without its statistics, which are no part of what is trained."""

    def __init__(self, head: ConcatHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, keep: Sequence[Tensor] | None) -> Tensor:
        return self.head.classify(x, keep)


class Heads:
    """Heads of one configuration, one for each job.

    Args:
        jobs: their inputs have the same modalities and sizes.
        classes: number of classes.
        config: ``components depth width dropout label_smoothing lr weight_decay``.
    """

    def __init__(self, jobs: Sequence[Job], classes: int, config: Mapping[str, Any]) -> None:
        self.jobs = list(jobs)
        self.config = dict(config)
        self.epochs = 0
        self.classes = classes
        features = {name: values.shape[1] for name, values in jobs[0].inputs.items()}
        rows = len(jobs[0].label)
        self.steps = min(max(1, -(-rows // _ROWS_A_STEP)), _MOST_STEPS)
        self._ready: list[Tensor] | None = None
        with one_thread():
            self._heads = [self._new(job, features) for job in self.jobs]
            self._shape = self._empty(features).to("meta")
            self._classify = _Classify(self._shape)
            stacked, _ = stack_module_state([_Classify(head) for head in self._heads])  # type: ignore[arg-type]
            self.parameters = stacked
            if rows * len(self.jobs) * self._shape.inputs <= _MOST_READY:
                self._ready = [self._concatenated(i, slice(None)) for i in range(len(self.jobs))]
        self._dropout = [torch.Generator().manual_seed(_seed(job.purpose, "dropout")) for job in self.jobs]
        # Neither biases nor norms are pulled to zero.
        weights = [p for name, p in self.parameters.items() if p.ndim == 3]
        others = [p for name, p in self.parameters.items() if p.ndim < 3]
        groups = [{"params": weights, "weight_decay": config["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=config["lr"], fused=True)

    def _new(self, job: Job, features: Mapping[str, int]) -> ConcatHead:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(job.purpose, "weights"))
            head = self._empty(features)
        head.reduce_by(job.reductions)
        return head

    def _empty(self, features: Mapping[str, int]) -> ConcatHead:
        config = self.config
        # Dropout is drawn here, for each head from its own generator.
        return ConcatHead(features, self.classes, config["depth"], config["width"], 0.0, config["components"])

    def epoch(self) -> None:
        """Train every head once on each of its rows."""
        with one_thread():
            batches = []
            for job in self.jobs:
                order = permutation(len(job.rows), "head", job.purpose, self.epochs)
                batches.append(np.array_split(job.rows[order], self.steps))
            for step in range(self.steps):
                self._step([parts[step] for parts in batches])
            self.epochs += 1

    def _step(self, rows: Sequence[Ints]) -> None:
        x, weight = self._gather(rows)
        label = torch.zeros(weight.shape, dtype=torch.int64)
        for i, (job, mine) in enumerate(zip(self.jobs, rows, strict=True)):
            label[i, : len(mine)] = torch.from_numpy(job.label[mine])
        logits = self._logits(x, self._keep(rows, weight.shape[1]))
        loss = F.cross_entropy(
            logits.flatten(0, 1), label.flatten(), reduction="none", label_smoothing=self.config["label_smoothing"]
        ).view_as(weight)
        # The heads' losses share no parameter: the gradient of the sum is each one's own.
        total = (loss * weight / weight.sum(1, keepdim=True).clamp_min(1)).sum()
        self._optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _keep(self, rows: Sequence[Ints], longest: int) -> list[Tensor] | None:
        p, depth, width = self.config["dropout"], self.config["depth"], self.config["width"]
        if p == 0 or depth == 0:
            return None
        keep = torch.zeros(depth, len(rows), longest, width)
        for i, (mine, generator) in enumerate(zip(rows, self._dropout, strict=True)):
            # As many draws as it has rows, whatever the others have.
            drawn = torch.empty(depth, len(mine), width).bernoulli_(1 - p, generator=generator)
            keep[:, i, : len(mine)] = drawn / (1 - p)
        return list(keep)

    def _gather(self, rows: Sequence[Ints]) -> tuple[Tensor, Tensor]:
        """What heads are given ``[head, longest, f]`` of these rows of each, and weights ``[head, longest]``: 0 where
        padded."""
        longest = max(len(mine) for mine in rows)
        x, weight = torch.zeros(len(rows), longest, self._shape.inputs), torch.zeros(len(rows), longest)
        for i, mine in enumerate(rows):
            weight[i, : len(mine)] = 1.0
            x[i, : len(mine)] = self._concatenated(i, mine) if self._ready is None else self._ready[i][mine]
        return x, weight

    def _concatenated(self, head: int, rows: Ints | slice) -> Tensor:
        inputs = {name: torch.from_numpy(np.array(values[rows])) for name, values in self.jobs[head].inputs.items()}
        return self._heads[head].concatenate(inputs)

    def _logits(self, x: Tensor, keep: list[Tensor] | None) -> Tensor:
        def one(parameters: dict[str, Tensor], x: Tensor, kept: list[Tensor] | None) -> Tensor:
            logits: Tensor = functional_call(self._classify, parameters, (x, kept))
            return logits

        stacked: Tensor = vmap(one, in_dims=(0, 0, None if keep is None else 0))(self.parameters, x, keep)
        return stacked

    @torch.no_grad()
    def probability(self, rows: Sequence[Ints]) -> list[Floats]:
        """For each head the probabilities ``[row, class]`` of rows of its own."""
        longest, width = max(len(mine) for mine in rows), self._shape.inputs
        piece = max(1, _MOST_VALUES // (len(rows) * width))
        parts: list[list[Floats]] = [[np.zeros((0, self.classes), dtype=np.float32)] for _ in rows]
        with one_thread():
            for start in range(0, longest, piece):
                pieces = [mine[start : start + piece] for mine in rows]
                x, _ = self._gather(pieces)
                found = self._logits(x, None).softmax(-1)
                # A head that has diverged knows nothing.
                known = found.nan_to_num(1.0 / self.classes).numpy()
                for i, mine in enumerate(pieces):
                    parts[i].append(known[i, : len(mine)])
        return [np.concatenate(mine) for mine in parts]


def _seed(*purpose: str) -> int:
    return number_of(*purpose) >> 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and sums must not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
