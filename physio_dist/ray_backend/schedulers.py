"""Early stopping as a Ray Tune scheduler that decides for each fold separately."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from physio_dist.evaluation.trials import TrialRecord

# Share of a trial's epochs before the first decision; the next comes after three times as many. The best third of the
# trials that have got that far continue.
_GRACE = 1 / 8
_REDUCTION = 3


class FoldwiseASHA(FIFOScheduler):  # type: ignore[misc]
    """Asynchronous successive halving (arXiv 1810.05934) for each fold separately.

    The test subjects of one fold are validation subjects of the others. A decision by ``val_auc``, the mean over folds,
    would let them choose which configurations survive, and so take part in the selection of the model they are tested
    with. Trials therefore report one metric per fold, ``fold_<name>``, and each (row, fold) has an
    ``AsyncHyperBandScheduler`` of its own for its metric. A fold that is stopped leaves the trial at that epoch
    (:attr:`last`); the trial stops when all of its folds have left.

    Args:
        max_epochs: epochs of a trial.
        past: trials that ended in earlier attempts, replayed in this order.

    Attributes:
        last: trial -> fold -> last epoch that counts in the selection for that fold.
    """

    # A trial that should have stopped would go on until its results are sent.
    _supports_buffered_results = False

    def __init__(self, max_epochs: int, past: Iterable[TrialRecord]) -> None:
        super().__init__()
        self._max_epochs = max_epochs
        self._schedulers: dict[tuple[str, str], AsyncHyperBandScheduler] = {}
        self._added: set[tuple[str, str]] = set()
        self._seen: dict[str, int] = {}
        self.last: dict[str, dict[str, int]] = {}
        for record in past:
            config = {"trial": record.trial, "row": record.row}
            for result in record.history:
                self.on_trial_result(None, SimpleNamespace(trial_id=record.trial, config=config), result)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Pass the result to the schedulers of the folds that are still in the trial."""
        name, row = trial.config["trial"], trial.config["row"]
        epoch = result.get("epoch", 0)
        # Tune repeats the last result when a trial ends by itself.
        if epoch <= self._seen.get(name, 0):
            return str(TrialScheduler.CONTINUE)
        self._seen[name] = epoch
        if epoch >= self._max_epochs:
            return str(TrialScheduler.STOP)
        metrics = [metric for metric in result if metric.startswith("fold_")]
        stopped = self.last.setdefault(name, {})
        for metric in metrics:
            fold = metric.removeprefix("fold_")
            if fold in stopped or result[metric] is None or math.isnan(result[metric]):
                continue
            scheduler = self._scheduler(row, metric)
            if (name, metric) not in self._added:
                self._added.add((name, metric))
                scheduler.on_trial_add(tune_controller, trial)
            if scheduler.on_trial_result(tune_controller, trial, result) == TrialScheduler.STOP:
                stopped[fold] = epoch
                scheduler.on_trial_remove(tune_controller, trial)
        return str(TrialScheduler.STOP if len(stopped) == len(metrics) else TrialScheduler.CONTINUE)

    def _scheduler(self, row: str, metric: str) -> AsyncHyperBandScheduler:
        if (row, metric) not in self._schedulers:
            self._schedulers[row, metric] = AsyncHyperBandScheduler(
                time_attr="epoch", metric=metric, mode="max", max_t=self._max_epochs,
                grace_period=max(1, int(self._max_epochs * _GRACE)), reduction_factor=_REDUCTION,
            )  # fmt: skip
        return self._schedulers[row, metric]

    def debug_string(self) -> str:
        """Return the scheduler's name for Tune's own output."""
        return "ASHA for each row and fold"
