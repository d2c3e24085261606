"""DeepSpeed backend: an engine configured by the options, and whole tensors out of and into it.

Weights are held in fp32 at every precision; bf16 and fp16 are autocast within the model. So every ZeRO stage and
precision has the same state, and a checkpoint of one goes into another. (DeepSpeed's own `torch_autocast` is not used,
because with fp16 under ZeRO it clips gradients before it unscales them.)

After the last backward pass of a step :meth:`Engine.gradient_norm` returns the norm of the whole gradient; then the
training loop calls :meth:`Engine.step` or :meth:`Engine.skip`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)

from physio_dist.config import PretrainConfig
from physio_dist.errors import PhysioError, UserError
from physio_dist.training.backends.base import Tensors

# Library versions recorded in the run, beside its own and torch's.
VERSIONS = {"deepspeed": deepspeed.__version__}
MOMENTS = ("exp_avg", "exp_avg_sq")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _import_muon() -> None:
    """Import DeepSpeed's own optimizer, which it looks for when it starts, without torch's compiler.

    Its kernels are compiled as it is imported, which takes a second of every start to import the compiler.
    """
    compiler = torch.compile
    torch.compile = lambda *_, **__: lambda kernel: kernel  # type: ignore[assignment]
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        torch.compile = compiler


def decay_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of AdamW: matrices and kernels decay, biases and norms do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Engine:
    """DeepSpeed engine for a model whose optimizer state exists from the start; see `backends.base.Backend`.

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
            # Without ZeRO DeepSpeed would work out the norm a second time; step() clips there.
            "gradient_clipping": train.max_grad_norm if options.zero.stage else 0.0,
            "zero_optimization": {"stage": options.zero.stage},
            "steps_per_print": 10**12,
        }
        if train.precision in _AUTOCAST:
            # Inside the module, because DeepSpeed turns off an autocast that surrounds it.
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model.forward = torch.autocast(device, _AUTOCAST[train.precision])(model.forward)
        # Of the loss, because small gradients of activations would vanish in fp16. Gradients of weights are fp32 and
        # are scaled back one by one.
        self.scale = 1.0
        if train.precision == "fp16":
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_hook(lambda grad: grad / self.scale)  # type: ignore[no-untyped-call]
        _import_muon()
        self.deepspeed = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        self.stage = options.zero.stage
        self.max_grad_norm, self.ema = train.max_grad_norm, train.ema
        self._base: torch.optim.Optimizer = optimizer

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return torch.device(self.deepspeed.device)

    def __call__(self, *inputs: Any) -> torch.Tensor:
        """Forward pass."""
        out: torch.Tensor = self.deepspeed(*inputs)
        return out

    def train(self, mode: bool) -> None:
        """Training or evaluation mode."""
        self.deepspeed.train(mode)

    def backward(self, loss: torch.Tensor, last: bool, micro_steps: int) -> None:
        """Backward pass; no weight moves.

        Args:
            loss: scaled so that the sum over micro steps, averaged over ranks, is the loss of the global batch.
            last: whether this is the step's last micro step, after which the ranks share their gradients.
            micro_steps: of the step, to undo DeepSpeed's own division by it.
        """
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * (micro_steps * self.scale))
        if not last:
            self.deepspeed.step()

    def gradient_norm(self) -> torch.Tensor:
        """Norm of the ranks' common gradient before clipping: 0-d, on the device, NaN where a gradient is not finite.

        A collective, after the last backward pass of a step; every rank has the same norm.
        """
        zero = self.deepspeed.optimizer
        if self.stage == 0:
            norm = torch.nn.utils.get_total_norm(self._gradients())
        elif self.stage < 3:
            norm = type(zero).scaled_global_norm(zero)
        else:
            norm = combine_grad_norm_groups(type(zero)._get_norm_groups(zero))
        # DeepSpeed calls what is not finite -1.
        return torch.where((norm >= 0) & torch.isfinite(norm), norm, torch.nan)

    def step(self, norm: float) -> None:
        """Clip the gradient, whose norm is given, and move the weights."""
        if self.stage == 0:
            parameters = [p for p in self.deepspeed.module.parameters() if p.grad is not None]
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, torch.tensor(norm))
        else:
            self._set_norm(norm)
        self.deepspeed.step()
        if self.stage > 0 and self.deepspeed.optimizer.overflow:
            raise AssertionError(f"DeepSpeed left out a step whose gradient has the norm {norm}")
        if self.ema:
            self._average()

    def _average(self) -> None:
        """Move the average towards the weights; faster in the first steps."""
        state = self._base.state
        first = next(iter(state.values()))
        if "ema" not in first:
            # The step of the dry run.
            return
        taken = float(first["step"])
        share = 1 - min(self.ema, (1 + taken) / (10 + taken))
        with torch.no_grad():
            torch._foreach_lerp_([entry["ema"] for entry in state.values()], list(state), share)

    def skip(self) -> None:
        """Drop the gradient; weights and optimizer state stay as they are."""
        if self.stage == 0:
            self.deepspeed.zero_grad()
            return
        self._set_norm(-1.0)
        self.deepspeed.step()
        if not self.deepspeed.optimizer.overflow:
            raise AssertionError("DeepSpeed took a step that it was to leave out")

    def _set_norm(self, norm: float) -> None:
        """Set the norm that DeepSpeed would otherwise compute again; on the CPU, to avoid a device sync."""
        zero, fixed = self.deepspeed.optimizer, torch.tensor(norm)
        if self.stage < 3:
            zero.scaled_global_norm = lambda *_, **__: fixed
        else:
            zero._get_norm_groups = lambda: [fixed]

    def _gradients(self) -> list[torch.Tensor]:
        return [p.grad for p in self.deepspeed.module.parameters() if p.grad is not None]

    @contextlib.contextmanager
    def own_norms(self) -> Iterator[list[torch.Tensor]]:
        """Collect the norms of this rank's own gradients during backward passes, before they are shared."""
        norms: list[torch.Tensor] = []

        def record(grad: torch.Tensor) -> None:
            norms.append(torch.linalg.vector_norm(grad.detach().float()))

        hooks = [p.register_hook(record) for _, p in self._names()]  # type: ignore[no-untyped-call]
        yield norms
        for hook in hooks:
            hook.remove()

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of the next step."""
        for group in self._base.param_groups:
            group["lr"] = lr

    def prepare(self, inputs: tuple[Any, ...]) -> None:
        """Run one whole step at learning rate 0 on a batch of the run's shape, then zero the optimizer state.

        This reveals errors of shape and memory in seconds, and creates the optimizer state: DeepSpeed's setters need
        one, and it has none before its first step.
        """
        self.train(True)
        self.set_lr(0.0)
        # Times zero, so that no gradient, however large, can overflow or move anything.
        self.backward((self(*inputs).float() * 0.0).sum(), last=True, micro_steps=1)
        if not torch.isfinite(self.gradient_norm()):
            raise PhysioError("the dry run before the first step gives no finite gradient: the weights are damaged")
        self.step(0.0)
        for state in self._base.state.values():
            for value in state.values():
                value.zero_()
        if self.ema:
            # Beside the moments, so that each rank holds the same part of it as of them.
            for p, state in self._base.state.items():
                state["ema"] = p.detach().clone()
        if self.stage in (1, 2):
            # DeepSpeed links parameters to their state after the first group's first step, when the other groups
            # have none yet, and never again.
            zero = self.deepspeed.optimizer
            groups = zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True)
            for params, flat in groups:
                lazy_init_hp_params_optimizer_state(params, flat, self._base.state)

    def _names(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.deepspeed.module.named_parameters() if p.requires_grad]

    def weights(self, keep: bool = True) -> Tensors:
        """Whole fp32 parameters and buffers under plain names, on the CPU (a collective: every rank calls it).

        Args:
            keep: if False, this rank only takes part in the collective and gets nothing.
        """
        tensors: Tensors = {}
        for name, p in self._names():
            # Up to stage 2 every rank has whole fp32 parameters.
            value = p.data if self.stage < 3 else safe_get_full_fp32_param(p)
            if keep:
                tensors[name] = _to_cpu(value)
        if keep:
            named = dict(self._names())
            buffers = {k: v for k, v in self.deepspeed.module.state_dict().items() if k not in named}
            tensors |= {name: value.detach().to("cpu", copy=True) for name, value in buffers.items()}
        return tensors

    def optimizer_state(self, keep: bool = True) -> Tensors:
        """Whole moments as ``exp_avg/NAME`` and ``exp_avg_sq/NAME``, and ``step`` (a collective; see `weights`)."""
        state: Tensors = {}
        for moment in MOMENTS:
            state |= {f"{moment}/{name}": value for name, value in self._gathered(moment, keep).items()}
        state["step"] = torch.tensor(float(next(iter(self._base.state.values()))["step"]))
        return state

    def ema_weights(self, keep: bool = True) -> Tensors:
        """The moving average of the parameters under their plain names (a collective; see `weights`)."""
        return self._gathered("ema", keep) if self.ema else {}

    def load_ema(self, average: Tensors) -> None:
        """Load a whole moving average, saved at any stage and world size."""
        for name, p in self._names():
            self._set(p, "ema", average[name])

    def _gathered(self, key: str, keep: bool) -> Tensors:
        tensors: Tensors = {}
        for name, p in self._names():
            value = self._base.state[p][key] if self.stage == 0 else safe_get_full_optimizer_state(p, key)
            if keep:
                tensors[name] = _to_cpu(value).reshape(self._shape(p))
        return tensors

    @staticmethod
    def _shape(p: torch.nn.Parameter) -> torch.Size:
        return torch.Size(getattr(p, "ds_shape", p.shape))

    def load_optimizer_state(self, state: Tensors) -> None:
        """Load whole moments, saved at any stage and world size."""
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


def _to_cpu(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", torch.float32, copy=True)


def init_process_group() -> None:
    """Initialise the process group at the address that the launcher chose.

    Raises:
        UserError: another process listens there.
    """
    try:
        deepspeed.init_distributed(dist_backend=None if torch.cuda.is_available() else "gloo", verbose=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {os.environ['MASTER_PORT']} of this machine is taken, perhaps by another run: give the launcher "
            "another one (deepspeed --master_port N, torchrun --master-port N)"
        ) from None


def quiet() -> None:
    """Silence DeepSpeed's and torch's log messages below errors."""
    for name in ("DeepSpeed", "deepspeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    # On CPUs DeepSpeed would compile, at the first start, an operation that only its inference uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
