"""Search space, Optuna's suggestions and the searcher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.search import Searcher
from ray.tune.search.sample import Categorical, Float

from physio_dist.config import SearchOptions, TuneConfig
from physio_dist.evaluation.search_space import STARTUP, plan, sample_configs
from physio_dist.evaluation.trial_log import TrialLog
from physio_dist.ray_backend.tune_search import MAX_RETRIES, FoldwiseSearcher, param_space, suggest
from physio_dist.runs.run_dir import RunDir

SEARCH = SearchOptions()
SPACE = param_space(SEARCH)
EPOCHS = 24


def options(trials: int = STARTUP + 3, search: str = "optuna") -> TuneConfig:
    tune_config = TuneConfig()
    tune_config.tune.trials, tune_config.tune.search = trials, search
    return tune_config


def past(search: SearchOptions = SEARCH, trials: int = 40) -> list[tuple[dict[str, Any], float]]:
    """Configurations with a metric that prefers wide heads."""
    tune_config = options(trials, "latin_hypercube")
    tune_config.search = search
    return [(config, 0.5 + config["width"] / 400 - config["depth"] / 50) for config in sample_configs(tune_config)]


def test_param_space_has_a_domain_for_each_hyperparameter() -> None:
    assert list(SPACE) == list(sample_configs(options(1))[0])
    for name, domain in SPACE.items():
        values = getattr(SEARCH, name)
        if name in ("lr", "weight_decay"):
            assert isinstance(domain, Float) and [domain.lower, domain.upper] == values
        else:
            assert isinstance(domain, Categorical) and list(domain.categories) == values


def test_suggest_returns_values_of_the_space_and_depends_on_past_and_purpose_alone() -> None:
    first = suggest(SPACE, "0/a", past())
    assert first == suggest(SPACE, "0/a", past())
    assert first != suggest(SPACE, "0/b", past())
    assert first != suggest(SPACE, "0/a", [(config, 1 - value) for config, value in past()])
    assert list(first) == list(SPACE)
    for name, value in first.items():
        values = getattr(SEARCH, name)
        assert values[0] <= value <= values[1] if name in ("lr", "weight_decay") else value in values
    assert float(f"{first['lr']:.4g}") == first["lr"]


def test_suggest_includes_optional_hyperparameters_where_they_are_given() -> None:
    search = SearchOptions(head=["concat", "late"], class_weight=["balanced"], lr=[0.01, 0.01])
    config = suggest(param_space(search), "0/a", past(search))
    assert config["class_weight"] == "balanced" and config["head"] in ("concat", "late") and config["lr"] == 0.01
    assert "modality_dropout" not in config


def test_suggest_prefers_values_with_a_better_metric() -> None:
    configs = [suggest(SPACE, f"0/{number}", past()) for number in range(20)]
    assert sum(config["width"] == 128 for config in configs) >= 12


@pytest.fixture()
def new_log(tmp_path: Path) -> Callable[..., TrialLog]:
    def make(name: str, tune_config: TuneConfig | None = None) -> TrialLog:
        run = RunDir(str(tmp_path / name), 0)
        run.begin(1)
        return TrialLog(run, plan(tune_config or options(), ["a", "b"]), EPOCHS, lambda _: None)

    return make


def end_trial(log: TrialLog, config: dict[str, Any], **folds: float) -> None:
    """End a trial that was suggested with these AUCs."""
    name, fold = config["trial"], config["fold"]
    metrics = {f"fold_{each}": auc for each, auc in folds.items() if fold in ("", each)}
    log.start(name)
    log.epoch(name, {"epoch": 1, "val_auc": 0.5, **metrics})
    log.end(name, {})


def run_search(log: TrialLog, a: Sequence[float], b: Sequence[float]) -> dict[str, Any]:
    """Run a search in which the n-th trial of a row has these AUCs; trial -> what was suggested for it."""
    searcher, configs = FoldwiseSearcher(options(), log), {name: record.config for name, record in log.ended.items()}
    for number in range(len(log.pending) + 1):
        config = searcher.suggest(str(number))
        if not isinstance(config, dict):
            break
        index = int(config["trial"].split("-")[1])
        end_trial(log, config, a=a[index], b=b[index])
        searcher.on_trial_complete(str(number))
        configs[config["trial"]] = {name: config[name] for name in SPACE}
    assert config == Searcher.FINISHED and len(configs) == len(log.trials)
    log.close()
    return configs


def test_searcher_suggestions_for_a_fold_do_not_depend_on_other_folds(new_log: Callable[..., TrialLog]) -> None:
    draw = np.random.default_rng(0)
    a, b, other = draw.uniform(0.4, 0.9, (3, STARTUP + 3)).tolist()
    first, second = run_search(new_log("first"), a, b), run_search(new_log("second"), a, other)
    different = {name for name in first if first[name] != second[name]}
    assert different and all(name.endswith("-b") for name in different)


def test_searcher_waits_for_required_trials_and_continues_from_the_log(new_log: Callable[..., TrialLog]) -> None:
    draw = np.random.default_rng(0)
    a, b = draw.uniform(0.4, 0.9, (2, STARTUP + 3)).tolist()
    uninterrupted = run_search(new_log("uninterrupted"), a, b)
    log = new_log("interrupted")
    searcher = FoldwiseSearcher(options(), log)
    configs = [searcher.suggest(f"drawn-{number}") for number in range(4 * STARTUP)]
    assert searcher.suggest("too-early") is None
    for number, config in enumerate(configs):
        assert isinstance(config, dict)
        index = int(config["trial"].split("-")[1])
        end_trial(log, config, a=a[index], b=b[index])
        searcher.on_trial_complete(f"drawn-{number}")
    # One at a time for each row and fold; two of them end before the driver is lost.
    configs = [searcher.suggest(f"proposed-{number}") for number in range(8)]
    assert searcher.suggest("too-early") is None
    for config in (configs[5], configs[2]):
        assert isinstance(config, dict)
        end_trial(log, config, a=a[STARTUP], b=b[STARTUP])
    log.close()
    resumed = new_log("interrupted")
    assert len(resumed.pending) == len(resumed.trials) - 4 * STARTUP - 2
    assert run_search(resumed, a, b) == uninterrupted


def test_searcher_suggests_lost_trial_again_and_gives_up_in_the_end(new_log: Callable[..., TrialLog]) -> None:
    tune_config = options(1, "latin_hypercube")
    log = new_log("lost", tune_config)
    searcher = FoldwiseSearcher(tune_config, log)
    first, *others = [searcher.suggest(str(number)) for number in range(4)]
    for number, config in enumerate(others, 1):
        assert isinstance(config, dict)
        end_trial(log, config, a=0.5, b=0.5)
        searcher.on_trial_complete(str(number))
    for _ in range(MAX_RETRIES):
        assert searcher.suggest("none") is None
        searcher.on_trial_complete("0", error=True)
        assert searcher.suggest("0") == first
    searcher.on_trial_complete("0", error=True)
    assert searcher.suggest("none") == Searcher.FINISHED
    log.close()
