"""Trials of a sweep and the configurations drawn beforehand."""

from __future__ import annotations

import sys

import pytest

from physio_dist.config import TuneConfig
from physio_dist.errors import UserError
from physio_dist.evaluation.search_space import STARTUP, need_optuna, plan


def options(trials: int, search: str = "optuna") -> TuneConfig:
    tune_config = TuneConfig()
    tune_config.tune.trials, tune_config.tune.search = trials, search
    return tune_config


def test_plan_shares_drawn_configs_and_leaves_others_to_each_fold() -> None:
    trials = plan(options(STARTUP + 2), ["0", "1", "2"])
    drawn, proposed = trials[: 4 * STARTUP], trials[4 * STARTUP :]
    assert not any(trial.fold for trial in drawn) and all(trial.config for trial in drawn)
    assert len(proposed) == 2 * 4 * 3 and not any(trial.config for trial in proposed)
    assert proposed[0].name == "fused-010-0" and proposed[-1].name == "untrained-011-2"
    assert len({trial.name for trial in trials}) == len(trials)
    assert plan(options(3), ["0", "1"]) == plan(options(3, "latin_hypercube"), ["0"])
    assert len(plan(options(STARTUP + 2, "latin_hypercube"), ["0", "1"])) == 4 * (STARTUP + 2)


def test_need_optuna_raises_user_error_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    need_optuna(options(1))
    monkeypatch.setitem(sys.modules, "optuna", None)
    need_optuna(options(1, "latin_hypercube"))
    with pytest.raises(UserError, match=r"tune\.search=optuna needs .* pip install 'physio-dist\[optuna\]'"):
        need_optuna(options(1))
