"""Decisions of the step guard from losses and norms."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from physio_dist.config import TrainOptions
from physio_dist.training.step_guard import FIRST_SCALE, WINDOW, StepAction, StepGuard

NAN = math.nan


def make_guard(state: dict[str, Any] | None = None, **options: Any) -> StepGuard:
    return StepGuard(TrainOptions(**{"precision": "fp32", **options}), state or {})


def calm(guard: StepGuard, steps: int = WINDOW, level: float = 1.0) -> list[StepAction]:
    return [guard(level + 0.01 * (i % 3), level + 0.02 * (i % 2)) for i in range(steps)]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_guard_returns_nonfinite_on_nan_and_infinity(precision: str) -> None:
    assert make_guard(precision=precision)(NAN, 1.0) is StepAction.NONFINITE
    assert make_guard(precision=precision)(math.inf, 1.0) is StepAction.NONFINITE
    assert make_guard(precision=precision)(1.0, NAN) is StepAction.NONFINITE
    assert make_guard(precision=precision).scale == 1.0


def test_guard_detects_spike_against_median() -> None:
    for loss, norm in ((50.0, 1.0), (1.0, 50.0)):
        warned, left_out = make_guard(spike_factor=10.0), make_guard(spike_factor=10.0, skip_spikes=True)
        assert set(calm(warned) + calm(left_out)) == {StepAction.APPLY}
        assert warned(loss, norm) is StepAction.SPIKE
        assert left_out(loss, norm) is StepAction.SKIP
        assert left_out(1.0, 1.0) is StepAction.APPLY
    off = make_guard(spike_factor=0.0)
    calm(off)
    assert off(1e9, 1e9) is StepAction.APPLY


def test_guard_ignores_norm_below_max_grad_norm() -> None:
    clipped, free = make_guard(spike_factor=10.0, max_grad_norm=1.0), make_guard(spike_factor=10.0, max_grad_norm=2.0)
    for guard in (clipped, free):
        for _ in range(WINDOW):
            guard(1.0, 0.01)
    assert clipped(1.0, 1.5) is StepAction.SPIKE
    assert free(1.0, 1.5) is StepAction.APPLY


def test_guard_ignores_first_steps_and_lasting_change() -> None:
    assert make_guard(spike_factor=2.0)(1e6, 1e6) is StepAction.APPLY
    risen = make_guard(spike_factor=2.0, skip_spikes=True)
    calm(risen)
    verdicts = calm(risen, level=10.0)
    assert verdicts[0] is StepAction.SKIP
    assert verdicts[-1] is StepAction.APPLY
    assert verdicts.count(StepAction.SKIP) <= WINDOW // 2 + 1


def test_guard_halves_fp16_scale_on_overflow_and_doubles_it_again() -> None:
    half = make_guard(precision="fp16")
    assert half.scale == FIRST_SCALE
    assert half(1.0, NAN) is StepAction.OVERFLOW
    assert half.scale == FIRST_SCALE / 2
    for _ in range(999):
        assert half(1.0, 1.0) is StepAction.APPLY
    assert half.scale == FIRST_SCALE / 2
    half(1.0, 1.0)
    assert half.scale == FIRST_SCALE
    assert half(NAN, NAN) is StepAction.NONFINITE
    verdicts = [half(1.0, NAN) for _ in range(11)]
    assert verdicts == [StepAction.OVERFLOW] * 10 + [StepAction.NONFINITE]
    assert half.scale == 1.0


@pytest.mark.parametrize("steps", [5, 30, 300])
def test_guard_resumed_from_state_decides_as_uninterrupted(steps: int) -> None:
    options: dict[str, Any] = {"precision": "fp16", "spike_factor": 1.5, "skip_spikes": True}

    def step(which: StepGuard, i: int) -> StepAction:
        return which(1.0 + (i * 7919 % 13) / 10, math.nan if i % 97 == 50 else 1.0 + (i * 104729 % 11) / 10)

    uninterrupted, first = make_guard(**options), make_guard(**options)
    for i in range(steps):
        step(uninterrupted, i)
        step(first, i)
    resumed = make_guard(json.loads(json.dumps(first.state())), **options)
    for i in range(steps, steps + 200):
        assert step(resumed, i) is step(uninterrupted, i)
        assert resumed.scale == uninterrupted.scale
    assert resumed.state() == uninterrupted.state()
