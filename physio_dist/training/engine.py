"""Options -> DeepSpeed configuration -> engine, and whole tensors out of and into it.

Weights are held in fp32 at every precision; bf16 and fp16 are autocast within the model. So every ZeRO stage and
precision has the same state, and a checkpoint of one goes into another. (DeepSpeed's own `torch_autocast` is not used,
because with fp16 under ZeRO it clips gradients before it unscales them.)
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)

from physio_dist.config import PretrainConfig

Tensors = dict[str, torch.Tensor]

MOMENTS = ("exp_avg", "exp_avg_sq")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Small gradients of activations would vanish in fp16. Gradients of weights are fp32 and are scaled back one by one.
_FP16_SCALE = 2.0**10


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: matrices and kernels decay, biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Engine:
    """A DeepSpeed engine for a model whose optimizer state exists from the start.

    Args:
        model: fp32 module, with the weights to start from.
        options: of the run.
        micro_batch: samples in each forward pass of a rank.
        micro_steps: forward passes a step.
    """

    def __init__(self, model: torch.nn.Module, options: PretrainConfig, micro_batch: int, micro_steps: int) -> None:
        train = options.train
        optimizer = torch.optim.AdamW(
            decay_groups(model, train.weight_decay), lr=train.lr, betas=(train.beta1, train.beta2), fused=True
        )
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": micro_steps,
            "gradient_clipping": train.clip,
            "zero_optimization": {"stage": options.zero.stage},
            "steps_per_print": 10**12,
        }
        if train.precision in _AUTOCAST:
            # Inside the module, because DeepSpeed turns off an autocast that surrounds it.
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model.forward = torch.autocast(device, _AUTOCAST[train.precision])(model.forward)
        self._scale = _FP16_SCALE if train.precision == "fp16" else 1.0
        if self._scale != 1.0:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda grad: grad / _FP16_SCALE)  # type: ignore[no-untyped-call]
        self.deepspeed = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.stage = options.zero.stage
        self.clip = train.clip
        self._base: torch.optim.Optimizer = optimizer
        self._norm = 0.0

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return torch.device(self.deepspeed.device)

    def __call__(self, *inputs: Any) -> torch.Tensor:
        """Forward pass."""
        out: torch.Tensor = self.deepspeed(*inputs)
        return out

    def train(self, mode: bool) -> None:
        """Training or evaluation mode."""
        self.deepspeed.train(mode)

    def backward(self, loss: torch.Tensor, last: bool, micro_steps: int) -> None:
        """Backward pass; with ``last`` the optimizer moves.

        Args:
            loss: scaled so that the sum over micro steps, averaged over ranks, is the loss of the global batch.
            last: whether this is the step's last micro step.
            micro_steps: of the step, to undo DeepSpeed's own division by it.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * (micro_steps * self._scale))
        if last and self.stage == 0:
            # DeepSpeed keeps no norm without ZeRO; the gradients are averaged by now.
            grads = [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]
            self._norm = float(torch.nn.utils.get_total_norm(grads))
        self.deepspeed.step()
        if last and self.stage > 0:
            self._norm = float(self.deepspeed.get_global_grad_norm())

    @property
    def grad_norm(self) -> float:
        """Norm of the last step's gradient before clipping."""
        return self._norm

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        for group in self._base.param_groups:
            group["lr"] = lr

    def prepare(self, inputs: tuple[Any, ...]) -> None:
        """One whole step at learning rate 0 on a batch of the run's shape, then an optimizer state of zeros.

        It shows errors of shape and memory in seconds, and it makes the state exist: DeepSpeed's setters need one,
        and it has none before its first step.
        """
        self.train(True)
        self.set_lr(0.0)
        # Times zero, so that no gradient, however large, can overflow or move anything.
        self.backward((self(*inputs).float() * 0.0).sum(), last=True, micro_steps=1)
        for state in self._base.state.values():
            for value in state.values():
                value.zero_()
        if self.stage in (1, 2):
            # DeepSpeed links parameters to their state after the first group's first step, when the other groups
            # have none yet, and never again.
            zero = self.deepspeed.optimizer
            groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
            for params, flat in groups:
                lazy_init_hp_params_optimizer_state(params, flat, self._base.state)

    def _names(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.deepspeed.module.named_parameters() if p.requires_grad]

    def weights(self) -> Tensors:
        """Whole fp32 parameters and buffers under plain names, on the CPU (a collective: every rank calls it)."""
        whole = {
            name: (p.data if self.stage == 0 else safe_get_full_fp32_param(p)).detach().float().cpu().clone()
            for name, p in self._names()
        }
        named = dict(self._names())
        rest = {k: v for k, v in self.deepspeed.module.state_dict().items() if k not in named}
        return whole | {name: value.detach().cpu().clone() for name, value in rest.items()}

    def optimizer_state(self) -> Tensors:
        """Whole moments as ``exp_avg/NAME`` and ``exp_avg_sq/NAME``, and ``step`` (a collective)."""
        state: Tensors = {}
        for name, p in self._names():
            for moment in MOMENTS:
                value = self._base.state[p][moment] if self.stage == 0 else safe_get_full_optimizer_state(p, moment)
                state[f"{moment}/{name}"] = value.detach().float().cpu().clone().reshape(self._shape(p))
        state["step"] = torch.tensor(float(next(iter(self._base.state.values()))["step"]))
        return state

    @staticmethod
    def _shape(p: torch.nn.Parameter) -> torch.Size:
        return torch.Size(getattr(p, "ds_shape", p.shape))

    def load_optimizer_state(self, state: Tensors) -> None:
        """Put whole moments back, whatever the stage and world size they came from."""
        for name, p in self._names():
            for moment in MOMENTS:
                self._set(p, moment, state[f"{moment}/{name}"])
        for entry in self._base.state.values():
            entry["step"].fill_(float(state["step"]))

    def _set(self, p: torch.nn.Parameter, moment: str, value: torch.Tensor) -> None:
        value = value.to(self.device)
        if self.stage == 0:
            self._base.state[p][moment].copy_(value)
        elif self.stage < 3:
            safe_set_full_optimizer_state(p, value, moment)
        else:
            # DeepSpeed's whole-tensor setter does not know the padding of the last partition.
            size = int(p.ds_tensor.numel())  # type: ignore[attr-defined]
            flat = torch.nn.functional.pad(value.flatten(), (0, size * dist.get_world_size() - value.numel()))
            rank = dist.get_rank()
            safe_set_local_optimizer_state(p, flat[rank * size : (rank + 1) * size], moment)


def quiet() -> None:
    """Keep DeepSpeed's and torch's remarks about themselves off the screen; errors stay."""
    for name in ("DeepSpeed", "deepspeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    # On CPUs DeepSpeed would compile, at the first start, an operation that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
