"""Early stopping and proposals, decided for each fold apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from physio_dist.config import TuneConfig
from physio_dist.evaluation.search_space import STARTUP, plan
from physio_dist.evaluation.trial_log import TrialLog
from physio_dist.evaluation.trials import TrialRecord
from physio_dist.ray_backend.schedulers import FoldwiseASHA, FoldwiseOptuna
from physio_dist.runs.run_dir import RunDir

STOP, CONTINUE = TrialScheduler.STOP, TrialScheduler.CONTINUE
# One look, after the third epoch of 24; a second after the ninth.
EPOCHS = 24


class Trial:
    def __init__(self, name: str, row: str = "fused") -> None:
        self.trial_id, self.config = f"id-{name}", {"trial": {"name": name, "row": row}}


def line(epoch: int, **folds: float) -> dict[str, Any]:
    return {"line": {"epoch": epoch, "val_auc": 0.5, **{f"fold_{name}": auc for name, auc in folds.items()}}}


def run_epochs(asha: FoldwiseASHA, name: str, row: str = "fused", upto: int = EPOCHS, **folds: float) -> int:
    """Run a trial whose AUCs do not change; the epoch after which it is stopped, or has been told all."""
    trial = Trial(name, row)
    for epoch in range(1, upto + 1):
        if asha.on_trial_result(None, trial, line(epoch, **folds)) == STOP:
            return epoch
    return upto


def test_one_fold_stops_and_the_other_goes_on() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    assert run_epochs(asha, "first", a=0.7, b=0.7) == EPOCHS
    # Behind in fold a alone: out of it at the first look, and in fold b to the end.
    assert run_epochs(asha, "second", a=0.6, b=0.8) == EPOCHS
    assert asha.last == {"first": {}, "second": {"a": 3}}
    # Behind in both.
    assert run_epochs(asha, "third", a=0.1, b=0.1) == 3
    assert asha.last["third"] == {"a": 3, "b": 3}


def test_a_fold_that_is_out_is_not_asked_again() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    run_epochs(asha, "first", a=0.7, b=0.7)
    second = Trial("second")
    for epoch in (1, 2, 3):
        assert asha.on_trial_result(None, second, line(epoch, a=0.6, b=0.8)) == CONTINUE
    for epoch in range(4, EPOCHS):
        assert asha.on_trial_result(None, second, line(epoch, a=0.99, b=0.8)) == CONTINUE
    assert asha.last["second"] == {"a": 3}
    # The 0.99 has raised nobody's bar.
    run_epochs(asha, "third", a=0.71, b=0.81)
    assert asha.last["third"] == {}


def test_the_last_epoch_ends_a_trial_and_stops_no_fold() -> None:
    asha = FoldwiseASHA(4, [])
    assert run_epochs(asha, "only", upto=9, a=0.5) == 4
    assert asha.last == {"only": {}}


def test_rows_do_not_compete() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    run_epochs(asha, "fused-0", "fused", a=0.9)
    assert run_epochs(asha, "ecg-0", "ecg", a=0.5) == EPOCHS
    assert run_epochs(asha, "ecg-1", "ecg", a=0.4) == 3


@pytest.mark.parametrize("seed", range(5))
def test_no_fold_has_a_say_in_another(seed: int) -> None:
    """Whatever the validation people of fold b look like, the same configurations survive in fold a."""
    draw = np.random.default_rng(seed)
    a = draw.uniform(0.4, 0.9, (12, EPOCHS))
    survivors = []
    for _ in range(2):
        asha, b = FoldwiseASHA(EPOCHS, []), draw.uniform(0.4, 0.9, (12, EPOCHS))
        for number in range(12):
            trial = Trial(str(number))
            for epoch in range(1, EPOCHS + 1):
                now = line(epoch, a=a[number, epoch - 1], b=b[number, epoch - 1])
                if asha.on_trial_result(None, trial, now) == STOP:
                    break
        survivors.append({name: out.get("a") for name, out in asha.last.items()})
    assert survivors[0] == survivors[1]
    assert {3, None} <= set(survivors[0].values())


@pytest.fixture()
def book(tmp_path: Path) -> Callable[[str], TrialLog]:
    """Ledgers of sweeps of one row's worth of trials that Optuna searches."""

    def make(name: str) -> TrialLog:
        run = RunDir(str(tmp_path / name), 0)
        run.begin(1)
        return TrialLog(run, plan(optuna(), ["a", "b"]), EPOCHS, lambda _: None)

    return make


def optuna() -> TuneConfig:
    given = TuneConfig()
    given.tune.trials, given.tune.search = STARTUP + 3, "optuna"
    return given


def ends(ledger: TrialLog, given: Any, **folds: float) -> None:
    """A trial that was suggested ends with these AUCs."""
    name, fold = given["trial"]["name"], given["trial"]["fold"]
    ledger.start(name)
    ledger.epoch(name, line(1, **{n: auc for n, auc in folds.items() if fold in ("", n)})["line"])
    ledger.end(name, {})


def searched(ledger: TrialLog, a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """What a search proposes whose n-th trial of a row finds these AUCs; name -> configuration."""
    search, found = FoldwiseOptuna(optuna(), ledger), {name: one.config for name, one in ledger.ended.items()}
    while isinstance(given := search.suggest("id"), dict):
        number = int(given["trial"]["name"].split("-")[1])
        ends(ledger, given, a=a[number], b=b[number])
        found[given["trial"]["name"]] = given["trial"]["config"]
    assert given == Searcher.FINISHED and len(found) == len(ledger.trials)
    ledger.close()
    return found


def test_no_fold_has_a_say_in_what_is_proposed_for_another(book: Callable[[str], TrialLog]) -> None:
    draw = np.random.default_rng(0)
    a, b, other = draw.uniform(0.4, 0.9, (3, STARTUP + 3)).tolist()
    first, second = searched(book("first"), a, b), searched(book("second"), a, other)
    apart = {name for name in first if first[name] != second[name]}
    assert apart and all(name.endswith("-b") for name in apart)


def test_a_search_waits_for_what_it_rests_on_and_goes_on_from_the_ledger(book: Callable[[str], TrialLog]) -> None:
    draw = np.random.default_rng(0)
    a, b = draw.uniform(0.4, 0.9, (2, STARTUP + 3)).tolist()
    whole = searched(book("whole"), a, b)
    ledger = book("cut")
    search = FoldwiseOptuna(optuna(), ledger)
    given = [search.suggest("id") for _ in range(4 * STARTUP)]
    assert search.suggest("id") is None, "all that is left waits"
    for one in given:
        assert isinstance(one, dict)
        number = int(one["trial"]["name"].split("-")[1])
        ends(ledger, one, a=a[number], b=b[number])
    # One at a time for each row and fold; two of them end before the driver is lost.
    given = [search.suggest("id") for _ in range(8)]
    assert search.suggest("id") is None
    for one in (given[5], given[2]):
        assert isinstance(one, dict)
        ends(ledger, one, a=a[STARTUP], b=b[STARTUP])
    ledger.close()
    again = book("cut")
    assert len(again.left) == len(again.trials) - 4 * STARTUP - 2
    assert searched(again, a, b) == whole


def test_an_undefined_auc_stops_nothing_and_says_nothing() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    run_epochs(asha, "first", a=0.7, b=0.7)
    assert run_epochs(asha, "second", a=math.nan, b=0.1) == EPOCHS
    assert asha.last["second"] == {"b": 3}
    assert run_epochs(asha, "third", a=0.6, b=0.1) == 3
    # It is asked as soon as there is something to ask about.
    fourth = Trial("fourth")
    for epoch in (1, 2, 3):
        assert asha.on_trial_result(None, fourth, line(epoch, a=math.nan, b=0.9)) == CONTINUE
    asha.on_trial_result(None, fourth, line(4, a=0.1, b=0.9))
    assert asha.last["fourth"] == {"a": 4}


def test_a_trial_that_starts_again_is_not_judged_twice() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    run_epochs(asha, "first", a=0.7)
    run_epochs(asha, "second", upto=4, a=0.8)
    assert run_epochs(asha, "second", a=0.8) == EPOCHS
    assert asha.last["second"] == {}
    # What Ray tells twice at a trial's own end.
    assert asha.on_trial_result(None, Trial("second"), line(EPOCHS, a=0.8)) == CONTINUE


def test_what_ray_flattens_is_understood() -> None:
    asha = FoldwiseASHA(EPOCHS, [])
    run_epochs(asha, "first", a=0.7)
    trial = Trial("second")
    for epoch in (1, 2, 3):
        flat = {"line/epoch": epoch, "line/val_auc": 0.5, "line/fold_a": 0.1, "done": False}
        last = asha.on_trial_result(None, trial, flat)
    assert last == STOP
    assert asha.on_trial_result(None, trial, {"done": True}) == CONTINUE


def test_trials_of_an_earlier_attempt_are_competitors() -> None:
    histories = {"first": {"a": 0.7, "b": 0.7}, "second": {"a": 0.6, "b": 0.8}}
    whole, past = FoldwiseASHA(EPOCHS, []), []
    for name, folds in histories.items():
        run_epochs(whole, name, **folds)
        lines = [line(epoch, **folds)["line"] for epoch in range(1, EPOCHS + 1)]
        past.append(TrialRecord(name, "fused", {}, lines))
    again = FoldwiseASHA(EPOCHS, past)
    assert again.last == whole.last
    assert run_epochs(whole, "third", a=0.65, b=0.75) == run_epochs(again, "third", a=0.65, b=0.75) == 3
