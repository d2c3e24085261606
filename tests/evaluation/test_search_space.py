"""Configurations that Optuna proposes."""

from __future__ import annotations

import sys

import pytest

from physio_dist.config import SearchOptions, TuneConfig
from physio_dist.errors import UserError
from physio_dist.evaluation.search_space import STARTUP, need_optuna, plan, sample_configs, suggest

SEARCH = SearchOptions()


def options(trials: int, search: str = "optuna") -> TuneConfig:
    given = TuneConfig()
    given.tune.trials, given.tune.search = trials, search
    return given


def past(search: SearchOptions = SEARCH, trials: int = 40) -> list[tuple[dict[str, object], float]]:
    """Wide heads are good."""
    given = options(trials, "latin_hypercube")
    given.search = search
    return [(config, 0.5 + config["width"] / 400 - config["depth"] / 50) for config in sample_configs(given)]


def test_a_proposal_is_one_of_what_there_is_to_choose_from_and_depends_on_the_past_alone() -> None:
    first = suggest(SEARCH, "0/a", past())
    assert first == suggest(SEARCH, "0/a", past())
    assert first != suggest(SEARCH, "0/b", past())
    assert first != suggest(SEARCH, "0/a", [(config, 1 - value) for config, value in past()])
    assert list(first) == list(sample_configs(options(1))[0])
    for name, value in first.items():
        given = getattr(SEARCH, name)
        assert given[0] <= value <= given[1] if name in ("lr", "weight_decay") else value in given
    assert float(f"{first['lr']:.4g}") == first["lr"]


def test_what_came_later_to_choose_from_is_proposed_where_it_is_given() -> None:
    search = SearchOptions(head=["concat", "late"], class_weight=["balanced"], lr=[0.01, 0.01])
    found = suggest(search, "0/a", past(search))
    assert found["class_weight"] == "balanced" and found["head"] in ("concat", "late") and found["lr"] == 0.01
    assert "modality_dropout" not in found


def test_proposals_go_where_it_was_good() -> None:
    found = [suggest(SEARCH, f"0/{number}", past()) for number in range(20)]
    assert sum(one["width"] == 128 for one in found) >= 12


def test_the_plan_shares_what_is_drawn_and_leaves_the_rest_to_each_fold() -> None:
    trials = plan(options(STARTUP + 2), ["0", "1", "2"])
    drawn, proposed = trials[: 4 * STARTUP], trials[4 * STARTUP :]
    assert not any(trial.fold for trial in drawn) and all(trial.config for trial in drawn)
    assert len(proposed) == 2 * 4 * 3 and not any(trial.config for trial in proposed)
    assert proposed[0].name == "fused-010-0" and proposed[-1].name == "untrained-011-2"
    assert len({trial.name for trial in trials}) == len(trials)
    assert plan(options(3), ["0", "1"]) == plan(options(3, "latin_hypercube"), ["0"])
    assert len(plan(options(STARTUP + 2, "latin_hypercube"), ["0", "1"])) == 4 * (STARTUP + 2)


def test_without_optuna_the_sweep_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    need_optuna(options(1))
    monkeypatch.setitem(sys.modules, "optuna", None)
    need_optuna(options(1, "latin_hypercube"))
    with pytest.raises(UserError, match=r"tune\.search=optuna needs .* pip install 'physio-dist\[optuna\]'"):
        need_optuna(options(1))
