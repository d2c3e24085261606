"""The interface between training and the library that shares the work among ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

Tensors = dict[str, torch.Tensor]


class Backend(Protocol):
    """A model with its optimizer on one rank.

    After the last `backward` of a step, `gradient_norm` shares the gradients; then exactly one of `step` and `skip`
    follows. Methods marked as collectives are called by every rank in the same order.

    Attributes:
        scale: factor of the loss in `backward`, undone in the gradients (fp16).
    """

    scale: float

    @property
    def device(self) -> torch.device:
        """Device of the model."""

    def __call__(self, *inputs: Any) -> torch.Tensor:
        """Forward pass."""

    def train(self, mode: bool) -> None:
        """Set training or evaluation mode."""

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""

    def prepare(self, inputs: tuple[Any, ...]) -> None:
        """Run one whole step at learning rate 0, then make an optimizer state of zeros (a collective)."""

    def backward(self, loss: torch.Tensor, last: bool, micro_steps: int) -> None:
        """Backward pass of one of ``micro_steps`` micro batches; no weight moves (a collective if ``last``)."""

    def gradient_norm(self) -> torch.Tensor:
        """Norm of the common gradient before clipping, NaN if it is not finite (a collective)."""

    def step(self, norm: float) -> None:
        """Clip the gradient, whose norm is given, and move the weights (a collective)."""

    def skip(self) -> None:
        """Drop the gradient (a collective)."""

    def own_norms(self) -> AbstractContextManager[list[torch.Tensor]]:
        """Collect the norms of this rank's own gradients during backward passes, before they are shared."""

    def weights(self, keep: bool = True) -> Tensors:
        """Whole fp32 weights on the CPU, by plain names; empty without ``keep`` (a collective)."""

    def optimizer_state(self, keep: bool = True) -> Tensors:
        """Whole optimizer state on the CPU (a collective)."""

    def ema_weights(self, keep: bool = True) -> Tensors:
        """Moving average of the weights on the CPU (a collective)."""

    def load_optimizer_state(self, state: Tensors) -> None:
        """Restore what `optimizer_state` returned, at any world size."""

    def load_ema(self, average: Tensors) -> None:
        """Restore what `ema_weights` returned, at any world size."""
