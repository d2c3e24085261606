"""Early stopping that no test person takes part in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from physio_dist.downstream.trials import TrialRecord

# The first look at a trial comes after this part of its epochs, the next after three times as many. A trial goes on
# that is among the best third of those that have come so far.
_FIRST_LOOK = 1 / 8
_REDUCTION = 3


class FoldwiseAsha(FIFOScheduler):  # type: ignore[misc]
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


class _Past:
    """As much of a trial as schedulers ask for."""

    def __init__(self, name: str, config: dict[str, Any]) -> None:
        self.trial_id, self.config = name, config


def line_of(result: dict[str, Any]) -> dict[str, Any]:
    """What the study yielded, out of a result that Ray may have flattened."""
    if "line" in result:
        return dict(result["line"])
    return {name.removeprefix("line/"): value for name, value in result.items() if name.startswith("line/")}
