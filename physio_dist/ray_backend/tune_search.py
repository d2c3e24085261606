"""Search space of a sweep in Ray Tune's terms, and the searcher that goes through it."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray import tune
from ray.tune.search import Searcher
from ray.tune.search.sample import Domain

from physio_dist.config import SearchOptions, TuneConfig
from physio_dist.evaluation.search_space import LOG_RANGES, STARTUP, Trial, round_within, searched_names
from physio_dist.evaluation.trial_log import TrialLog
from physio_dist.evaluation.trials import eligible_epochs
from physio_dist.runtime.seeding import seed_of

MAX_RETRIES = 3
"""Further attempts at a trial whose worker was lost."""


def param_space(search: SearchOptions) -> dict[str, Domain]:
    """Return the hyperparameters of a head as Tune samples them."""
    return {
        name: tune.loguniform(*getattr(search, name)) if name in LOG_RANGES else tune.choice(getattr(search, name))
        for name in searched_names(search)
    }


def suggest(space: Mapping[str, Domain], purpose: str, past: Sequence[tuple[dict[str, Any], float]]) -> dict[str, Any]:
    """Return the next configuration by Optuna's tree-structured Parzen estimator.

    A pure function of its arguments, so that a sweep that was interrupted continues as if it had not been.

    Args:
        space: hyperparameters, see :func:`param_space`.
        purpose: seed of the random draws: the run's seed and the trial's name.
        past: earlier configurations and their metric, which is maximized.
    """
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = OptunaSearch.convert_search_space(dict(space))
    sampler = optuna.samplers.TPESampler(seed=seed_of("optuna", purpose) % 2**32, n_startup_trials=STARTUP)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.add_trials(
        [
            optuna.trial.create_trial(
                params={name: config[name] for name in space}, distributions=distributions, value=value
            )
            for config, value in past
        ]
    )
    params = study.ask(distributions).params
    return {
        name: round_within(params[name], domain.lower, domain.upper) if name in LOG_RANGES else params[name]
        for name, domain in space.items()
    }


class FoldwiseSearcher(Searcher):  # type: ignore[misc]
    """Suggests the trials of a sweep that have not ended: those drawn beforehand, then Optuna's.

    Latin hypercube draws are stratified, which Tune's random search is not, so they are drawn beforehand and suggested
    in the order of the plan (a ``points_to_evaluate`` that Tune's own searchers would need once per row).

    Optuna's search, like early stopping (:class:`~physio_dist.ray_backend.schedulers.FoldwiseASHA`), must not be guided
    by ``val_auc``, a mean over folds that includes the test subjects of each. So each (row, fold) has a search of its
    own, which sees that fold's validation AUC alone: of the drawn trials, which all folds share, and of its own. The
    trials of a search run one after the other; what is suggested then does not depend on which trials are faster.

    A trial that Tune gives up because its worker was lost is suggested again, at most ``MAX_RETRIES`` times. The
    searcher keeps no state but the trial log's.

    Args:
        options: of the sweep.
        log: trials that are planned and that have ended.
    """

    def __init__(self, options: TuneConfig, log: TrialLog) -> None:
        super().__init__()
        self._seed, self._log, self._space = options.run.seed, log, param_space(options.search)
        self._ready = deque(trial for trial in log.pending if not trial.fold)
        self._queues: dict[tuple[str, str], deque[Trial]] = defaultdict(deque)
        for trial in log.pending:
            if trial.fold:
                self._queues[trial.row, trial.fold].append(trial)
        # Trials that must have ended before the next one of a search is suggested.
        self._required = {
            (row, fold): [trial.name for trial in log.trials if trial.row == row and not trial.fold]
            for row, fold in self._queues
        }
        self._running: dict[str, Trial] = {}
        self._lost: Counter[str] = Counter()

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        """Take the space from Tune; the metric is decided per fold."""
        self._metric, self._mode = metric, mode
        self._space = {name: domain for name, domain in config.items() if isinstance(domain, Domain)}
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """Return the next trial's configuration, or None while all that are left wait for running ones."""
        trial = self._next()
        if trial is None:
            return None if self._running or any(self._queues.values()) else str(Searcher.FINISHED)
        self._running[trial_id] = trial
        return {"trial": trial.name, "row": trial.row, "fold": trial.fold, **trial.config}

    def _next(self) -> Trial | None:
        if self._ready:
            return self._ready.popleft()
        for search, queue in self._queues.items():
            if queue and all(name in self._log.ended for name in self._required[search]):
                trial = queue.popleft()
                config = suggest(self._space, f"{self._seed}/{trial.name}", self._past(trial))
                self._log.propose(trial.name, config)
                self._required[search] = [trial.name]
                return replace(trial, config=config)
        return None

    def _past(self, trial: Trial) -> list[tuple[dict[str, Any], float]]:
        """Configurations of the search before this trial, and the best validation AUC of each."""
        trials = self._log.trials
        earlier = [
            self._log.ended[other.name]
            for other in trials[: trials.index(trial)] if other.row == trial.row and other.fold in ("", trial.fold)
        ]  # fmt: skip
        areas = [(record.config, [area for _, area in eligible_epochs(record, trial.fold)]) for record in earlier]
        return [(config, max(values)) for config, values in areas if values]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Queue a trial again if Tune gave it up."""
        trial = self._running.pop(trial_id, None)
        if trial is not None and error and self._log.failure is None and self._lost[trial.name] < MAX_RETRIES:
            self._lost[trial.name] += 1
            self._ready.append(trial)

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Save nothing: the trial log has it all."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles the searcher for Tuner.restore, which is not used; the log has open files.
        return {}
