"""Many fusion heads of one shape trained at once: the folds and inner splits of a configuration.

A head is far too small to keep a core busy, so all of them are one batched model: their parameters are stacked, and
each still has its own rows, standardisation, batches and random draws. What becomes of one does not depend on the
others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from physio_dist.models.fusion.head import Head
from physio_dist.models.fusion.heads import HEADS
from physio_dist.models.fusion.reduction import Reduction
from physio_dist.runtime.seeding import permutation, rng, torch_generator
from physio_dist.stats.scores import temperature_of

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

# Steps of an epoch, from the size of the whole table: equal for all heads, so that one optimizer serves them, and
# bounded, so that a trial on a large set does not take for ever.
_ROWS_A_STEP = 128
_MOST_STEPS = 64
# Values of a stack of inputs, at most: 128 MB.
_MOST_VALUES = 1 << 25
# Up to this many values inputs are standardised once rather than in every step: 128 MB.
_MOST_READY = 1 << 25


@dataclass(frozen=True)
class Job:
    """One head to train.

    Attributes:
        inputs: for each modality float32 ``[n, f]``, or ``[n, token, f]``, all rows of the table.
        reductions: for each modality, what ``rows`` say of its features.
        label: int64 ``[n]``; only those of ``rows`` are read, and of people it is calibrated on.
        rows: int64, rows of the table to train on.
        purpose: whatever tells its random draws from those of other heads, the run's seed among it.
        there: of a modality bool ``[n, token]`` or ``[n, 1]``: what is not missing; all of one that is not named.
    """

    inputs: Mapping[str, Floats]
    reductions: Mapping[str, Reduction]
    label: Ints
    rows: Ints
    purpose: str
    there: Mapping[str, npt.NDArray[np.bool_]] = field(default_factory=dict)


class _Trained(nn.Module):
    """A head without its statistics, which are no part of what is trained."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor, keep: Sequence[Tensor] | None, mask: Tensor, training: bool) -> Any:
        return self.head.branch_logits(x, keep, mask) if training else self.head.classify(x, keep, mask)


class Heads:
    """Heads of one configuration, one for each job.

    Args:
        jobs: their inputs have the same modalities and sizes.
        classes: number of classes.
        config: ``components depth width dropout label_smoothing lr weight_decay``; and where they are not the default
            ``head`` (concat), ``modality_dropout`` (0) and ``class_weight`` (none).
    """

    def __init__(self, jobs: Sequence[Job], classes: int, config: Mapping[str, Any]) -> None:
        self.jobs = list(jobs)
        self.config = dict(config)
        self.epochs = 0
        self.classes = classes
        rows = len(jobs[0].label)
        self.steps = min(max(1, -(-rows // _ROWS_A_STEP)), _MOST_STEPS)
        self._ready: tuple[Tensor, Tensor] | None = None
        with one_thread():
            self._heads = [self._new(job) for job in self.jobs]
            self._shape = self._empty().to("meta")
            self._trained = _Trained(self._shape)
            stacked, _ = stack_module_state([_Trained(head) for head in self._heads])  # type: ignore[arg-type]
            self.parameters = stacked
            if rows * len(self.jobs) * self._shape.inputs <= _MOST_READY:
                self._ready = self._reduced([slice(None)] * len(self.jobs), rows + 1)
        self.temperature = torch.ones(len(self.jobs))
        self._weight = torch.stack([self._weights(job) for job in self.jobs])
        self._dropout = [rng(job.purpose, "dropout") for job in self.jobs]
        self._withheld = [torch_generator(job.purpose, "modality") for job in self.jobs]
        # Neither biases nor norms are pulled to zero.
        weights = [p for name, p in self.parameters.items() if p.ndim == 3]
        others = [p for name, p in self.parameters.items() if p.ndim < 3]
        groups = [{"params": weights, "weight_decay": config["weight_decay"]}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=config["lr"], fused=True)

    def _new(self, job: Job) -> Head:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(torch_generator(job.purpose, "weights").get_state())
            head = self._empty()
        head.reduce_by(job.reductions)
        return head

    def _empty(self) -> Head:
        config, inputs = self.config, self.jobs[0].inputs
        # Dropout is drawn here, for each head from its own generator.
        return HEADS[config.get("head", "concat")](
            {name: values.shape[-1] for name, values in inputs.items()}, self.classes, config["depth"],
            config["width"], 0.0, config["components"],
            {name: values.shape[1] for name, values in inputs.items() if values.ndim == 3},
        )  # fmt: skip

    def _weights(self, job: Job) -> Tensor:
        """Of a window of each class; balanced: every class weighs the same in the rows to train on."""
        if self.config.get("class_weight", "none") == "none":
            return torch.ones(self.classes)
        count = np.bincount(job.label[job.rows], minlength=self.classes)
        return torch.from_numpy(len(job.rows) / (self.classes * np.maximum(count, 1))).float()

    def head(self, number: int) -> Head:
        """A copy of one head as it is now, in evaluation mode: its state is all that has to be kept of it, and
        ``about()`` what it takes to build it again."""
        found = self._empty()
        state = {name.removeprefix("head."): values[number].detach() for name, values in self.parameters.items()}
        fixed = {**dict(self._heads[number].named_buffers()), "temperature": self.temperature[number]}
        found.load_state_dict({**state, **fixed})
        return found.eval()

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
        x, mask = self._gather(rows)
        known, seen = _side_by_side([job.label[mine] for job, mine in zip(self.jobs, rows, strict=True)], 0)
        label = torch.from_numpy(known)
        weight = self._weight.gather(1, label) * torch.from_numpy(seen)
        if self.config.get("modality_dropout", 0.0) and len(self._shape.features) > 1:
            mask = self._withhold(rows, mask)
            x = self._shape.hide(x, mask)
        logits, there = self._of(x, self._keep(rows, x.shape[1]), mask, True)
        branch_logits = logits.shape[2]
        loss = F.cross_entropy(
            logits.flatten(0, 2), label.repeat_interleave(branch_logits, 1).flatten(), reduction="none",
            label_smoothing=self.config["label_smoothing"],
        ).view(logits.shape[:3])  # fmt: skip
        # Nothing is learnt from a window of which nothing is seen.
        share = weight.unsqueeze(-1) * there
        # The heads' losses share no parameter: the gradient of the sum is each one's own. Nor do
        # the branch_logits of a late head.
        total = (loss * share / share.sum(1, keepdim=True).clamp_min(1e-6)).sum()
        self._optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _withhold(self, rows: Sequence[Ints], mask: Tensor) -> Tensor:
        """``mask`` with, at the probability asked for, one modality alone of a window that has several."""
        shape, owner = self._shape, []
        for number, many in enumerate(shape.tokens.values()):
            owner += [number] * many
        hidden = torch.zeros_like(mask)
        for i, (mine, generator) in enumerate(zip(rows, self._withheld, strict=True)):
            drawn = torch.rand(len(mine), 2, generator=generator)
            there = shape.present(mask[i, : len(mine)])
            # The n-th of those that are there.
            kept = (drawn[:, 1] * there.sum(1)).long().clamp_max(there.sum(1) - 1)
            others = there & (there.cumsum(1) - 1 != kept[:, None])
            others &= (drawn[:, 0] < self.config["modality_dropout"])[:, None]
            hidden[i, : len(mine)] = others[:, owner]
        return mask & ~hidden

    def _keep(self, rows: Sequence[Ints], longest: int) -> list[Tensor] | None:
        p, depth, width = self.config["dropout"], self._shape.layers, self.config["width"]
        if p == 0 or depth == 0:
            return None
        # Sixteen bits a draw, for drawing takes as long as anything else here. A head has as many as it has rows,
        # whatever the others have.
        keep = np.zeros((len(rows), longest, depth, width), dtype=np.float32)
        for i, (mine, generator) in enumerate(zip(rows, self._dropout, strict=True)):
            drawn = generator.integers(1 << 16, size=(len(mine), depth, width), dtype=np.uint16)
            np.multiply(drawn >= round(p * (1 << 16)), np.float32(1 / (1 - p)), out=keep[i, : len(mine)])
        return list(torch.from_numpy(keep).movedim(2, 0))

    def _gather(self, rows: Sequence[Ints]) -> tuple[Tensor, Tensor]:
        """What heads are given ``[head, longest, f]`` of these rows of each, and what of it is there ``[head, longest,
        token]``: nothing where padded."""
        if self._ready is None:
            return self._reduced(rows, max(len(mine) for mine in rows))
        # Behind the last row of each head are zeros.
        end = len(self.jobs[0].label)
        number = _side_by_side(rows, end)[0] + (end + 1) * np.arange(len(rows))[:, None]
        at = torch.from_numpy(number).flatten()
        x, mask = (values.flatten(0, 1).index_select(0, at).view(*number.shape, -1) for values in self._ready)
        return x, mask

    def _reduced(self, rows: Sequence[Ints | slice], longest: int) -> tuple[Tensor, Tensor]:
        x = torch.zeros(len(rows), longest, self._shape.inputs)
        mask = torch.zeros(len(rows), longest, sum(self._shape.tokens.values()), dtype=torch.bool)
        for i, mine in enumerate(rows):
            found, there = self._concatenated(i, mine)
            x[i, : len(found)], mask[i, : len(there)] = found, there
        return x, mask

    def _concatenated(self, head: int, rows: Ints | slice) -> tuple[Tensor, Tensor]:
        job = self.jobs[head]
        inputs = {name: torch.from_numpy(np.array(values[rows])) for name, values in job.inputs.items()}
        there = {name: torch.from_numpy(np.array(values[rows])) for name, values in job.there.items()}
        mask = self._shape.token_mask(there, len(next(iter(inputs.values()))))
        return self._heads[head].concatenate(inputs, mask), mask

    def _of(self, x: Tensor, keep: list[Tensor] | None, mask: Tensor, training: bool) -> Any:
        def one(parameters: dict[str, Tensor], x: Tensor, kept: list[Tensor] | None, mask: Tensor) -> Any:
            return functional_call(self._trained, parameters, (x, kept, mask, training), tie_weights=False)

        return vmap(one, in_dims=(0, 0, None if keep is None else 0, 0))(self.parameters, x, keep, mask)

    @torch.no_grad()
    def logits(self, rows: Sequence[Ints], only: str | None = None) -> list[Floats]:
        """For each head the logits ``[row, class]`` of rows of its own, before its temperature.

        Args:
            rows: of each head.
            only: the one modality that is shown; None: whatever is there.
        """
        longest, width = max(len(mine) for mine in rows), self._shape.inputs
        piece = max(1, _MOST_VALUES // (len(rows) * width))
        parts: list[list[Floats]] = [[np.zeros((0, self.classes), dtype=np.float32)] for _ in rows]
        shown = torch.tensor([name == only for name, many in self._shape.tokens.items() for _ in range(many)])
        with one_thread():
            for start in range(0, longest, piece):
                pieces = [mine[start : start + piece] for mine in rows]
                x, mask = self._gather(pieces)
                if only is not None:
                    mask = mask & shown
                    x = self._shape.hide(x, mask)
                found = self._of(x, None, mask, False).numpy()
                for i, mine in enumerate(pieces):
                    parts[i].append(found[i, : len(mine)])
        return [np.concatenate(mine) for mine in parts]

    def probability(self, rows: Sequence[Ints], only: str | None = None) -> list[Floats]:
        """The same as probabilities."""
        found = []
        for logits, temperature in zip(self.logits(rows, only), self.temperature, strict=True):
            shares = (torch.from_numpy(logits) / temperature).softmax(-1)
            # A head that has diverged knows nothing.
            found.append(shares.nan_to_num(1.0 / self.classes).numpy())
        return found

    def calibrate(self, rows: Sequence[Ints]) -> None:
        """Fit the temperature of each head (Guo et al. 2017) on rows that it was not trained on."""
        for i, (job, mine, logits) in enumerate(zip(self.jobs, rows, self.logits(rows), strict=True)):
            self.temperature[i] = temperature_of(job.label[mine], logits)


def _side_by_side(numbers: Sequence[Ints], padding: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Numbers of each head ``[head, longest]``, and which of them are no padding."""
    many = np.array([len(mine) for mine in numbers])
    seen = np.arange(many.max()) < many[:, None]
    found = np.full(seen.shape, padding, dtype=np.int64)
    found[seen] = np.concatenate(numbers)
    return found, seen


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and sums must not depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
