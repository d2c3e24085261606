"""Many fusion heads of one shape trained at once: the folds and inner splits of a configuration.

A head is far too small to keep a core busy, so all of them are one batched model: their parameters are stacked, and
each still has its own rows, standardisation, batches and random draws, and does not depend on the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from physio_dist.models.fusion.head import Head
from physio_dist.models.fusion.heads import HEADS
from physio_dist.models.fusion.reduction import Reduction
from physio_dist.runtime.arrays import BoolArray, Float32Array, Int64Array
from physio_dist.runtime.seeding import permutation, rng, torch_generator
from physio_dist.stats.scores import fit_temperature

# The steps of an epoch follow from the size of the whole table: equal for all heads, so that one optimizer serves them,
# and bounded, so that a trial on a large set ends.
_ROWS_PER_STEP = 128
_MAX_STEPS = 64
# Values of a stack of inputs, at most: 128 MB.
_MAX_VALUES = 1 << 25
# Up to this many values inputs are standardised once rather than in every step: 128 MB.
_MAX_REDUCED_VALUES = 1 << 25


@dataclass(frozen=True)
class Job:
    """One head to train.

    Attributes:
        inputs: for each modality float32 ``[n, f]``, or ``[n, token, f]``, all rows of the table.
        reductions: for each modality, computed from its features in ``rows``.
        label: int64 ``[n]``; only those of ``rows``, and of the rows it is calibrated on, are read.
        rows: int64, rows of the table to train on.
        purpose: seed of its random draws: the run's seed and what separates this head from others.
        available: for a modality bool ``[n, token]`` or ``[n, 1]``; a modality that is not a key is never missing.
    """

    inputs: Mapping[str, Float32Array]
    reductions: Mapping[str, Reduction]
    label: Int64Array
    rows: Int64Array
    purpose: str
    available: Mapping[str, BoolArray] = field(default_factory=dict)


class _Trainable(nn.Module):
    """A head's trainable parameters without its statistics."""

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
        config: ``components depth width dropout label_smoothing lr weight_decay``, and optionally ``head`` (concat),
            ``modality_dropout`` (0) and ``class_weight`` (none).
    """

    def __init__(self, jobs: Sequence[Job], classes: int, config: Mapping[str, Any]) -> None:
        self.jobs = list(jobs)
        self.config = dict(config)
        self.epochs = 0
        self.classes = classes
        rows = len(jobs[0].label)
        self.steps = min(max(1, -(-rows // _ROWS_PER_STEP)), _MAX_STEPS)
        self._reduced_inputs: tuple[Tensor, Tensor] | None = None
        with one_thread():
            self._heads = [self._new(job) for job in self.jobs]
            self._shape = self._empty().to("meta")
            self._trainable = _Trainable(self._shape)
            stacked, _ = stack_module_state([_Trainable(head) for head in self._heads])  # type: ignore[arg-type]
            self.parameters = stacked
            if rows * len(self.jobs) * self._shape.inputs <= _MAX_REDUCED_VALUES:
                self._reduced_inputs = self._reduced([slice(None)] * len(self.jobs), rows + 1)
        self.temperature = torch.ones(len(self.jobs))
        self._weight = torch.stack([self._weights(job) for job in self.jobs])
        self._dropout = [rng(job.purpose, "dropout") for job in self.jobs]
        self._modality_draws = [torch_generator(job.purpose, "modality") for job in self.jobs]
        # No weight decay for biases and norms.
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
        """Class weights ``[class]``; balanced: every class weighs the same in the rows to train on."""
        if self.config.get("class_weight", "none") == "none":
            return torch.ones(self.classes)
        count = np.bincount(job.label[job.rows], minlength=self.classes)
        return torch.from_numpy(len(job.rows) / (self.classes * np.maximum(count, 1))).float()

    def head(self, number: int) -> Head:
        """Copy one head in evaluation mode; its state and ``about()`` are enough to rebuild it."""
        head = self._empty()
        state = {name.removeprefix("head."): values[number].detach() for name, values in self.parameters.items()}
        fixed = {**dict(self._heads[number].named_buffers()), "temperature": self.temperature[number]}
        head.load_state_dict({**state, **fixed})
        return head.eval()

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

    def _step(self, rows: Sequence[Int64Array]) -> None:
        x, mask = self._gather(rows)
        padded, present = _pad([job.label[batch] for job, batch in zip(self.jobs, rows, strict=True)], 0)
        label = torch.from_numpy(padded)
        weight = self._weight.gather(1, label) * torch.from_numpy(present)
        if self.config.get("modality_dropout", 0.0) and len(self._shape.features) > 1:
            mask = self._drop_modalities(rows, mask)
            x = self._shape.hide(x, mask)
        logits, informed = self._forward(x, self._keep(rows, x.shape[1]), mask, True)
        loss = F.cross_entropy(
            logits.flatten(0, 2), label.repeat_interleave(logits.shape[2], 1).flatten(), reduction="none",
            label_smoothing=self.config["label_smoothing"],
        ).view(logits.shape[:3])  # fmt: skip
        # A window without any available token contributes no loss.
        share = weight.unsqueeze(-1) * informed
        # The losses of different heads, and of the branches of a late head, share no parameters: the gradient of the
        # sum is each one's own.
        total = (loss * share / share.sum(1, keepdim=True).clamp_min(1e-6)).sum()
        self._optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _drop_modalities(self, rows: Sequence[Int64Array], mask: Tensor) -> Tensor:
        """Modality dropout: keep a single modality of a window with the configured probability."""
        shape, owner = self._shape, []
        for number, many in enumerate(shape.tokens.values()):
            owner += [number] * many
        hidden = torch.zeros_like(mask)
        for i, (batch, generator) in enumerate(zip(rows, self._modality_draws, strict=True)):
            drawn = torch.rand(len(batch), 2, generator=generator)
            available = shape.present(mask[i, : len(batch)])
            # The n-th of the available ones.
            keep = (drawn[:, 1] * available.sum(1)).long().clamp_max(available.sum(1) - 1)
            dropped = available & (available.cumsum(1) - 1 != keep[:, None])
            dropped &= (drawn[:, 0] < self.config["modality_dropout"])[:, None]
            hidden[i, : len(batch)] = dropped[:, owner]
        return mask & ~hidden

    def _keep(self, rows: Sequence[Int64Array], longest: int) -> list[Tensor] | None:
        p, depth, width = self.config["dropout"], self._shape.layers, self.config["width"]
        if p == 0 or depth == 0:
            return None
        # Sixteen bits a draw, because drawing takes as long as anything else here. The number of draws depends on the
        # head's own rows only.
        keep = np.zeros((len(rows), longest, depth, width), dtype=np.float32)
        for i, (batch, generator) in enumerate(zip(rows, self._dropout, strict=True)):
            drawn = generator.integers(1 << 16, size=(len(batch), depth, width), dtype=np.uint16)
            np.multiply(drawn >= round(p * (1 << 16)), np.float32(1 / (1 - p)), out=keep[i, : len(batch)])
        return list(torch.from_numpy(keep).movedim(2, 0))

    def _gather(self, rows: Sequence[Int64Array]) -> tuple[Tensor, Tensor]:
        """Inputs ``[head, longest, f]`` of some rows of each head, and their availability ``[head, longest, token]``,
        False where padded."""
        if self._reduced_inputs is None:
            return self._reduced(rows, max(len(batch) for batch in rows))
        # After the last row of each head is a row of zeros.
        end = len(self.jobs[0].label)
        number = _pad(rows, end)[0] + (end + 1) * np.arange(len(rows))[:, None]
        at = torch.from_numpy(number).flatten()
        x, mask = (values.flatten(0, 1).index_select(0, at).view(*number.shape, -1) for values in self._reduced_inputs)
        return x, mask

    def _reduced(self, rows: Sequence[Int64Array | slice], longest: int) -> tuple[Tensor, Tensor]:
        x = torch.zeros(len(rows), longest, self._shape.inputs)
        mask = torch.zeros(len(rows), longest, sum(self._shape.tokens.values()), dtype=torch.bool)
        for i, batch in enumerate(rows):
            values, available = self._concatenated(i, batch)
            x[i, : len(values)], mask[i, : len(available)] = values, available
        return x, mask

    def _concatenated(self, head: int, rows: Int64Array | slice) -> tuple[Tensor, Tensor]:
        job = self.jobs[head]
        inputs = {name: torch.from_numpy(np.array(values[rows])) for name, values in job.inputs.items()}
        available = {name: torch.from_numpy(np.array(mask[rows])) for name, mask in job.available.items()}
        mask = self._shape.token_mask(available, len(next(iter(inputs.values()))))
        return self._heads[head].concatenate(inputs, mask), mask

    def _forward(self, x: Tensor, keep: list[Tensor] | None, mask: Tensor, training: bool) -> Any:
        def forward(parameters: dict[str, Tensor], x: Tensor, keep: list[Tensor] | None, mask: Tensor) -> Any:
            return functional_call(self._trainable, parameters, (x, keep, mask, training), tie_weights=False)

        return vmap(forward, in_dims=(0, 0, None if keep is None else 0, 0))(self.parameters, x, keep, mask)

    @torch.no_grad()
    def logits(self, rows: Sequence[Int64Array], only: str | None = None) -> list[Float32Array]:
        """Logits ``[row, class]`` of each head, before its temperature.

        Args:
            rows: for each head.
            only: the only modality to use; None: all that are available.
        """
        longest, width = max(len(batch) for batch in rows), self._shape.inputs
        piece = max(1, _MAX_VALUES // (len(rows) * width))
        parts: list[list[Float32Array]] = [[np.zeros((0, self.classes), dtype=np.float32)] for _ in rows]
        used = torch.tensor([name == only for name, many in self._shape.tokens.items() for _ in range(many)])
        with one_thread():
            for start in range(0, longest, piece):
                pieces = [batch[start : start + piece] for batch in rows]
                x, mask = self._gather(pieces)
                if only is not None:
                    mask = mask & used
                    x = self._shape.hide(x, mask)
                logits = self._forward(x, None, mask, False).numpy()
                for i, batch in enumerate(pieces):
                    parts[i].append(logits[i, : len(batch)])
        return [np.concatenate(part) for part in parts]

    def probability(
        self, rows: Sequence[Int64Array], only: str | None = None, calibrated: bool = True
    ) -> list[Float32Array]:
        """Probabilities ``[row, class]`` of each head; see :meth:`logits`. ``calibrated=False``: at temperature 1."""
        probability = []
        for logits, temperature in zip(self.logits(rows, only), self.temperature, strict=True):
            scaled = torch.from_numpy(logits) / (temperature if calibrated else 1.0)
            # A head that has diverged predicts all classes alike.
            probability.append(scaled.softmax(-1).nan_to_num(1.0 / self.classes).numpy())
        return probability

    def calibrate(self, rows: Sequence[Int64Array]) -> None:
        """Fit the temperature of each head (Guo et al., ICML 2017) on rows that it was not trained on."""
        for i, (job, held_out, logits) in enumerate(zip(self.jobs, rows, self.logits(rows), strict=True)):
            self.temperature[i] = fit_temperature(job.label[held_out], logits)


def _pad(numbers: Sequence[Int64Array], padding: int) -> tuple[Int64Array, BoolArray]:
    """Numbers of each head padded to ``[head, longest]``, and a mask that is False at padding."""
    lengths = np.array([len(part) for part in numbers])
    mask = np.arange(lengths.max()) < lengths[:, None]
    padded = np.full(mask.shape, padding, dtype=np.int64)
    padded[mask] = np.concatenate(numbers)
    return padded, mask


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: small matrices gain nothing from more, and sums must not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
