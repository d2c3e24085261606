"""Early stopping and search that no test person takes part in."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from physio_dist.config import TuneConfig
from physio_dist.evaluation.search_space import Trial, suggest
from physio_dist.evaluation.trial_log import TrialLog
from physio_dist.evaluation.trials import TrialRecord, eligible_epochs

# The first look at a trial comes after this part of its epochs, the next after three times as many. A trial goes on
# that is among the best third of those that have come so far.
_FIRST_LOOK = 1 / 8
_REDUCTION = 3


class FoldwiseASHA(FIFOScheduler):  # type: ignore[misc]
    """Asynchronous successive halving (arXiv 1810.05934), decided for each fold apart.

    The test people of one fold are validation people of the others. A decision by the mean over folds would let them
    choose which configurations survive, and so take part in the selection of the model they are tested with. Here each
    (row, fold) has a scheduler of its own, which sees that fold's validation people alone. A fold that its scheduler
    stops is out of the trial from that epoch on (:attr:`last`); the trial goes on until all of its folds are.

    Args:
        max_epochs: of a trial.
        past: trials of earlier attempts, taken for ones that have run here.

    Attributes:
        last: trial -> fold -> last epoch that counts in the selection for that fold.
    """

    def __init__(self, max_epochs: int, past: Iterable[TrialRecord]) -> None:
        super().__init__()
        self._max_epochs = max_epochs
        self._of: dict[tuple[str, str], AsyncHyperBandScheduler] = {}
        self._known: set[tuple[str, str]] = set()
        self._seen: dict[str, int] = {}
        self.last: dict[str, dict[str, int]] = {}
        for record in past:
            trial = _Past(record.trial, {"trial": {"name": record.trial, "row": record.row}})
            for line in record.history:
                self.on_trial_result(None, trial, {"line": line})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Ask the scheduler of every fold that is still in."""
        line = line_of(result)
        name, row = trial.config["trial"]["name"], trial.config["trial"]["row"]
        # A trial that ends of itself has its last result told twice.
        if not line or line["epoch"] <= self._seen.get(name, 0):
            return str(TrialScheduler.CONTINUE)
        self._seen[name] = line["epoch"]
        if line["epoch"] >= self._max_epochs:
            return str(TrialScheduler.STOP)
        folds = [tag for tag in line if tag.startswith("fold_")]
        out = self.last.setdefault(name, {})
        for tag in folds:
            fold = tag.removeprefix("fold_")
            if fold in out or line[tag] is None or line[tag] != line[tag]:
                continue
            asha = self._scheduler(row, tag)
            if (name, tag) not in self._known:
                self._known.add((name, tag))
                asha.on_trial_add(tune_controller, trial)
            if asha.on_trial_result(tune_controller, trial, line) == TrialScheduler.STOP:
                out[fold] = line["epoch"]
                asha.on_trial_remove(tune_controller, trial)
        return str(TrialScheduler.STOP if len(out) == len(folds) else TrialScheduler.CONTINUE)

    def _scheduler(self, row: str, tag: str) -> AsyncHyperBandScheduler:
        if (row, tag) not in self._of:
            self._of[row, tag] = AsyncHyperBandScheduler(
                time_attr="epoch", metric=tag, mode="max", max_t=self._max_epochs,
                grace_period=max(1, int(self._max_epochs * _FIRST_LOOK)), reduction_factor=_REDUCTION,
            )  # fmt: skip
        return self._of[row, tag]

    def debug_string(self) -> str:
        """What Ray may print."""
        return "ASHA for each row and fold"


class FoldwiseOptuna(Searcher):  # type: ignore[misc]
    """Trials in the order of the plan, their configurations proposed by Optuna for each fold apart.

    As with early stopping, a search by the mean over folds would be guided by people whom some fold tests. So each
    (row, fold) has a search of its own, which sees that fold's validation AUC alone: of the drawn trials, which all
    folds share, and of its own. Its trials run one after the other; then what is proposed does not depend on which
    trials happen to be faster. The ledger is all that it remembers.

    Args:
        options: of the sweep.
        ledger: with the trials that are left, and what has ended.
    """

    def __init__(self, options: TuneConfig, ledger: TrialLog) -> None:
        super().__init__()
        self._options, self._ledger, self._lost = options, ledger, False
        self._drawn = deque(trial for trial in ledger.left if not trial.fold)
        self._left: dict[tuple[str, str], deque[Trial]] = defaultdict(deque)
        for trial in ledger.left:
            if trial.fold:
                self._left[trial.row, trial.fold].append(trial)
        # What each search waits for.
        self._needed = {
            (row, fold): [trial.name for trial in ledger.trials if trial.row == row and not trial.fold]
            for row, fold in self._left
        }

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial; None while all that is left waits for trials that run."""
        if self._lost:
            return str(Searcher.FINISHED)
        if self._drawn:
            return {"trial": asdict(self._drawn.popleft())}
        for search, left in self._left.items():
            if left and all(name in self._ledger.ended for name in self._needed[search]):
                trial = left.popleft()
                config = suggest(self._options.search, f"{self._options.run.seed}/{trial.name}", self._past(trial))
                self._ledger.propose(trial.name, config)
                self._needed[search] = [trial.name]
                return {"trial": asdict(replace(trial, config=config))}
        return None if any(self._left.values()) else str(Searcher.FINISHED)

    def _past(self, trial: Trial) -> list[tuple[dict[str, Any], float]]:
        """What the trials of the same search before this one were, and the best AUC of each."""
        trials = self._ledger.trials
        earlier = [
            self._ledger.ended[one.name]
            for one in trials[: trials.index(trial)] if one.row == trial.row and one.fold in ("", trial.fold)
        ]  # fmt: skip
        found = [(record.config, [area for _, area in eligible_epochs(record, trial.fold)]) for record in earlier]
        return [(config, max(areas)) for config, areas in found if areas]

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """The ledger knows what has ended; after a trial that Ray gave up, the others wait for the next round."""
        self._lost |= error

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing of it is kept."""

    def __getstate__(self) -> dict[str, Any]:
        # Tune pickles what it is given, for a way of going on that is not ours; open files stay out of it.
        return {}


class _Past:
    """As much of a trial as schedulers ask for."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.trial_id, self.config = name, config


def line_of(result: dict[str, Any]) -> dict[str, Any]:
    """What the study yielded, out of a result that Ray may have flattened."""
    if "line" in result:
        return dict(result["line"])
    return {name.removeprefix("line/"): value for name, value in result.items() if name.startswith("line/")}
