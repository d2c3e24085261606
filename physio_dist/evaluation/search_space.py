"""Which configurations of a head are tried: drawn beforehand, or proposed by Optuna from what was found so far."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from physio_dist.config import SearchOptions, TuneConfig
from physio_dist.data.loading.order import permutation, seed_of
from physio_dist.errors import UserError
from physio_dist.evaluation.trials import SEARCHED

STARTUP = 10
"""Configurations that are drawn before Optuna proposes any: as many as its sampler asks for."""

_FIRST = ("pooling", "components", "depth", "width", "dropout", "label_smoothing", "lr", "weight_decay")
# Choices that came later: where there is none a configuration is what it was without them, and so are its trials.
_LATER = ("head", "modality_dropout", "class_weight")
_RANGES = ("lr", "weight_decay")


@dataclass(frozen=True)
class Trial:
    """One configuration for one kind of input.

    Attributes:
        name: of the trial.
        row: one of ``SEARCHED``.
        config: empty until it is proposed.
        fold: name of the one fold that it is for; empty: all.
    """

    name: str
    row: str
    config: dict[str, Any]
    fold: str = ""


def plan(options: TuneConfig, folds: Sequence[str]) -> list[Trial]:
    """All trials: the same configurations, under the same numbers, for each row that is searched for.

    What Optuna proposes comes after those, for each row and fold on its own.
    """
    drawn = sample_configs(options)
    trials = [Trial(f"{row}-{number:03d}", row, config) for number, config in enumerate(drawn) for row in SEARCHED]
    for number in range(len(drawn), options.tune.trials):
        trials += [Trial(f"{row}-{number:03d}-{fold}", row, {}, fold) for row in SEARCHED for fold in folds]
    return trials


def sample_configs(options: TuneConfig) -> list[dict[str, Any]]:
    """``tune.trials`` configurations drawn from ``search`` by ``run.seed``; with ``tune.search=optuna`` the first
    ``STARTUP`` at most.

    A Latin hypercube (McKay, Beckman, Conover 1979): each option's values are visited equally often, as far as they go.

    Returns:
        Objects with ``pooling components depth width dropout label_smoothing lr weight_decay``, and those of ``head
        modality_dropout class_weight`` for which another value than the default could be chosen.
    """
    n, search, seed = options.tune.trials, options.search, options.run.seed
    if options.tune.search == "optuna":
        n = min(n, STARTUP)
    found: list[dict[str, Any]] = [{} for _ in range(n)]
    for name in _names(search):
        choices, stratum = getattr(search, name), permutation(n, "search", seed, name)
        for i in range(n):
            u = (int(stratum[i]) + seed_of("search", seed, name, i) / 2**64) / n
            if name in _RANGES:
                low, high = choices
                found[i][name] = _rounded(low * (high / low) ** u, low, high)
            else:
                found[i][name] = choices[min(int(u * len(choices)), len(choices) - 1)]
    return found


def suggest(search: SearchOptions, purpose: str, past: Sequence[tuple[dict[str, Any], float]]) -> dict[str, Any]:
    """The next configuration, by Optuna's tree-structured Parzen estimator.

    A function of its arguments and nothing else, so that a sweep that was interrupted goes on as if it had not been.

    Args:
        search: what there is to choose from.
        purpose: what the random draws depend on, the run's seed and the number of the trial among it.
        past: configurations that were tried, and what is to be made large.

    Returns:
        As one of :func:`candidates`.
    """
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space: dict[str, BaseDistribution] = {}
    for name in _names(search):
        given = getattr(search, name)
        space[name] = FloatDistribution(*given, log=True) if name in _RANGES else CategoricalDistribution(given)
    sampler = optuna.samplers.TPESampler(seed=seed_of("optuna", purpose) % 2**32, n_startup_trials=STARTUP)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    tried = [
        optuna.trial.create_trial(params={name: config[name] for name in space}, distributions=space, value=value)
        for config, value in past
    ]
    study.add_trials(tried)
    found = study.ask(space).params
    return {name: _rounded(found[name], *getattr(search, name)) if name in _RANGES else found[name] for name in space}


def need_optuna(options: TuneConfig) -> None:
    """Refuse a search by a package that is not there.

    Raises:
        UserError: Optuna is asked for and not installed.
    """
    if options.tune.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UserError("tune.search=optuna needs the package optuna: pip install 'physio-dist[optuna]'")


def _names(search: SearchOptions) -> list[str]:
    return [*_FIRST, *(name for name in _LATER if getattr(search, name) != getattr(SearchOptions(), name))]


def _rounded(value: float, low: float, high: float) -> float:
    return min(max(float(f"{value:.4g}"), low), high)
