"""Early stopping for each fold separately."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler

from physio_dist.evaluation.trials import TrialRecord
from physio_dist.ray_backend.schedulers import FoldwiseASHA

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE
# One look, after the third epoch of 24; a second after the ninth.
EPOCHS = 24


class Trial:
    def __init__(self, name: str, row: str = "fused") -> None:
        self.trial_id, self.config = f"id-{name}", {"trial": name, "row": row}


def result(epoch: int, **folds: float) -> dict[str, Any]:
    return {"epoch": epoch, "val_auc": 0.5, **{f"fold_{name}": auc for name, auc in folds.items()}}


def run_epochs(asha: FoldwiseASHA, name: str, row: str = "fused", until: int = EPOCHS, **folds: float) -> int:
    """Run a trial whose AUCs do not change; the epoch after which it is stopped, or its last one."""
    trial = Trial(name, row)
    for epoch in range(1, until + 1):
        if asha.on_trial_result(None, trial, result(epoch, **folds)) == STOP:
            return epoch
    return until


def test_asha_stops_one_fold_and_continues_the_other() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    assert run_epochs(asha, "first", a=0.7, b=0.7) == EPOCHS
    # Behind in fold a alone: out of it at the first look, and in fold b to the end.
    assert run_epochs(asha, "second", a=0.6, b=0.8) == EPOCHS
    assert asha.last == {"first": {}, "second": {"a": 3}}
    # Behind in both.
    assert run_epochs(asha, "third", a=0.1, b=0.1) == 3
    assert asha.last["third"] == {"a": 3, "b": 3}


def test_asha_ignores_later_results_of_a_stopped_fold() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    run_epochs(asha, "first", a=0.7, b=0.7)
    second = Trial("second")
    for epoch in (1, 2, 3):
        assert asha.on_trial_result(None, second, result(epoch, a=0.6, b=0.8)) == CONTINUE
    for epoch in range(4, EPOCHS):
        assert asha.on_trial_result(None, second, result(epoch, a=0.99, b=0.8)) == CONTINUE
    assert asha.last["second"] == {"a": 3}
    # The 0.99 does not count.
    run_epochs(asha, "third", a=0.71, b=0.81)
    assert asha.last["third"] == {}


def test_asha_stops_trial_but_no_fold_after_last_epoch() -> None:
    asha = FoldwiseASHA(4, [])
    assert run_epochs(asha, "only", until=9, a=0.5) == 4
    assert asha.last == {"only": {}}


def test_asha_compares_trials_of_the_same_row_only() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    run_epochs(asha, "fused-0", "fused", a=0.9)
    assert run_epochs(asha, "ecg-0", "ecg", a=0.5) == EPOCHS
    assert run_epochs(asha, "ecg-1", "ecg", a=0.4) == 3


@pytest.mark.parametrize("seed", range(5))
def test_asha_decisions_of_a_fold_do_not_depend_on_other_folds(seed: int) -> None:
    """Whatever the validation people of fold b look like, the same configurations survive in fold a."""
    draw = np.random.default_rng(seed)
    a = draw.uniform(0.4, 0.9, (12, EPOCHS))
    survivors = []
    for _ in range(2):
        asha, b = FoldwiseASHA(EPOCHS, []), draw.uniform(0.4, 0.9, (12, EPOCHS))
        for number in range(12):
            trial = Trial(str(number))
            for epoch in range(1, EPOCHS + 1):
                now = result(epoch, a=a[number, epoch - 1], b=b[number, epoch - 1])
                if asha.on_trial_result(None, trial, now) == STOP:
                    break
        survivors.append({name: out.get("a") for name, out in asha.last.items()})
    assert survivors[0] == survivors[1]
    assert {3, None} <= set(survivors[0].values())


def test_asha_skips_undefined_auc() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    run_epochs(asha, "first", a=0.7, b=0.7)
    assert run_epochs(asha, "second", a=math.nan, b=0.1) == EPOCHS
    assert asha.last["second"] == {"b": 3}
    assert run_epochs(asha, "third", a=0.6, b=0.1) == 3
    # Decided as soon as the AUC is defined.
    fourth = Trial("fourth")
    for epoch in (1, 2, 3):
        assert asha.on_trial_result(None, fourth, result(epoch, a=math.nan, b=0.9)) == CONTINUE
    asha.on_trial_result(None, fourth, result(4, a=0.1, b=0.9))
    assert asha.last["fourth"] == {"a": 4}


def test_asha_ignores_repeated_epochs_of_restarted_trial() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    run_epochs(asha, "first", a=0.7)
    run_epochs(asha, "second", until=4, a=0.8)
    assert run_epochs(asha, "second", a=0.8) == EPOCHS
    assert asha.last["second"] == {}
    # Tune repeats the last result when a trial ends by itself.
    assert asha.on_trial_result(None, Trial("second"), result(EPOCHS, a=0.8)) == CONTINUE


def test_asha_ignores_results_without_epoch() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    assert asha.on_trial_result(None, Trial("first"), {"done": True}) == CONTINUE
    assert asha.last == {}


def test_asha_compares_with_trials_of_earlier_attempts() -> None:
    histories = {"first": {"a": 0.7, "b": 0.7}, "second": {"a": 0.6, "b": 0.8}}
    uninterrupted, past = FoldwiseASHA(EPOCHS, []), []
    for name, folds in histories.items():
        run_epochs(uninterrupted, name, **folds)
        history = [result(epoch, **folds) for epoch in range(1, EPOCHS + 1)]
        past.append(TrialRecord(name, "fused", {}, history))
    again = FoldwiseASHA(EPOCHS, past)
    assert again.last == uninterrupted.last
    assert run_epochs(uninterrupted, "third", a=0.65, b=0.75) == run_epochs(again, "third", a=0.65, b=0.75) == 3
