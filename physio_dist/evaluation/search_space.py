"""Trials of a sweep and the head configurations that are drawn before the first of them starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from physio_dist.config import SearchOptions, TuneConfig
from physio_dist.errors import UserError
from physio_dist.evaluation.trials import SEARCHED
from physio_dist.runtime.seeding import permutation, seed_of

STARTUP = 10
"""Configurations that are drawn before Optuna proposes any: the number its sampler asks for."""

LOG_RANGES = ("lr", "weight_decay")
"""Options whose value is a range ``[low, high]`` on a logarithmic axis; all others list their choices."""

_ALWAYS = ("pooling", "components", "depth", "width", "dropout", "label_smoothing", *LOG_RANGES)
# Part of a configuration only where they are not at their default, so that older trials stay valid.
_OPTIONAL = ("head", "modality_dropout", "class_weight")


@dataclass(frozen=True)
class Trial:
    """One configuration for one row of the result table.

    Attributes:
        name: name of the trial.
        row: one of ``SEARCHED``.
        config: the head's hyperparameters; empty until Optuna has proposed them.
        fold: name of the only fold to train; empty for all folds.
    """

    name: str
    row: str
    config: dict[str, Any]
    fold: str = ""


def plan(options: TuneConfig, folds: Sequence[str]) -> list[Trial]:
    """List all trials: the same drawn configurations for each row, then those that Optuna proposes per row and fold."""
    drawn = sample_configs(options)
    trials = [Trial(f"{row}-{number:03d}", row, config) for number, config in enumerate(drawn) for row in SEARCHED]
    for number in range(len(drawn), options.tune.trials):
        trials += [Trial(f"{row}-{number:03d}-{fold}", row, {}, fold) for row in SEARCHED for fold in folds]
    return trials


def sample_configs(options: TuneConfig) -> list[dict[str, Any]]:
    """Draw configurations by a Latin hypercube (McKay, Beckman, Conover 1979), seeded by ``run.seed``.

    Each option's values are visited equally often, as far as the number of configurations allows.

    Returns:
        ``tune.trials`` configurations; with ``tune.search=optuna`` at most ``STARTUP``. Their keys are those of
        :func:`searched_names`.
    """
    count, search, seed = options.tune.trials, options.search, options.run.seed
    if options.tune.search == "optuna":
        count = min(count, STARTUP)
    configs: list[dict[str, Any]] = [{} for _ in range(count)]
    for name in searched_names(search):
        values, stratum = getattr(search, name), permutation(count, "search", seed, name)
        for i, config in enumerate(configs):
            u = (int(stratum[i]) + seed_of("search", seed, name, i) / 2**64) / count
            if name in LOG_RANGES:
                low, high = values
                config[name] = round_within(low * (high / low) ** u, low, high)
            else:
                config[name] = values[min(int(u * len(values)), len(values) - 1)]
    return configs


def searched_names(search: SearchOptions) -> list[str]:
    """Return the options that a configuration consists of, in a fixed order."""
    defaults = SearchOptions()
    return [*_ALWAYS, *(name for name in _OPTIONAL if getattr(search, name) != getattr(defaults, name))]


def round_within(value: float, low: float, high: float) -> float:
    """Round to four significant digits without leaving ``[low, high]``."""
    return min(max(float(f"{value:.4g}"), low), high)


def need_optuna(options: TuneConfig) -> None:
    """Check that Optuna is installed if it is asked for.

    Raises:
        UserError: ``tune.search=optuna``, and Optuna is not installed.
    """
    if options.tune.search == "optuna" and importlib.util.find_spec("optuna") is None:
        raise UserError("tune.search=optuna needs the package optuna: pip install 'physio-dist[optuna]'")
