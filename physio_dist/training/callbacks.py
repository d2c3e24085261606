"""Callbacks of the training loop: logging, watchdog, sample trace. The profiler is in `training.profiling`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from physio_dist.data.loading.dataset import ShardDataset
from physio_dist.runs.run_logger import RunLogger
from physio_dist.runtime.watchdog import Watchdog
from physio_dist.training.batch import MaskedBatch

OnMetrics = Callable[[dict[str, Any]], None]
"""Takes ``{"step": N}`` before step N + 1, and each line of metrics."""
OnCommit = Callable[[int, dict[str, Any]], None]
"""Takes the step of a committed checkpoint and the newest line of metrics, which only the first rank has."""


class Callback:
    """Base class: every method does nothing."""

    def on_step_begin(self, step: int) -> None:
        """Called before the batch of a step is taken."""

    def on_phase(self, step: int, phase: str) -> None:
        """Called when the loop turns to something that may take long: a constant of `runtime.watchdog`."""

    def on_batch(self, step: int, batch: MaskedBatch) -> None:
        """Called after this rank's passes over its batch."""

    def on_metrics(self, step: int, line: dict[str, Any]) -> None:
        """Called with a line of metrics."""

    def on_examples(self, data: bytes) -> None:
        """Called after a validation, on the first rank, with a safetensors file of held-out windows."""

    def on_warning(self, message: str) -> None:
        """Called with a sentence for the log."""


class Callbacks(Callback):
    """Calls several callbacks one after the other."""

    def __init__(self, callbacks: Sequence[Callback] = ()) -> None:
        self._callbacks = tuple(callbacks)

    def on_step_begin(self, step: int) -> None:
        for callback in self._callbacks:
            callback.on_step_begin(step)

    def on_phase(self, step: int, phase: str) -> None:
        for callback in self._callbacks:
            callback.on_phase(step, phase)

    def on_batch(self, step: int, batch: MaskedBatch) -> None:
        for callback in self._callbacks:
            callback.on_batch(step, batch)

    def on_metrics(self, step: int, line: dict[str, Any]) -> None:
        for callback in self._callbacks:
            callback.on_metrics(step, line)

    def on_examples(self, data: bytes) -> None:
        for callback in self._callbacks:
            callback.on_examples(data)

    def on_warning(self, message: str) -> None:
        for callback in self._callbacks:
            callback.on_warning(message)


class WatchdogCallback(Callback):
    """Tells the watchdog what this rank is doing."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def on_phase(self, step: int, phase: str) -> None:
        self._watchdog.at(step, phase)


class SampleTrace(Callback):
    """Writes the keys of the samples that this rank trains on (``train.log_sample_keys``)."""

    def __init__(self, logger: RunLogger, dataset: ShardDataset) -> None:
        self._logger, self._dataset = logger, dataset

    def on_batch(self, step: int, batch: MaskedBatch) -> None:
        self._logger.trace(step, self._dataset.keys(batch.batch.samples))


class MetricsCallback(Callback):
    """Writes metrics, held-out windows and warnings, and shows progress.

    Args:
        logger: of the run.
        on_metrics: of a launcher that follows the run; the first rank calls it.
    """

    def __init__(self, logger: RunLogger, on_metrics: OnMetrics | None) -> None:
        self._logger = logger
        self._report = on_metrics if logger.first else None

    def on_step_begin(self, step: int) -> None:
        if self._report is not None:
            self._report({"step": step - 1})

    def on_metrics(self, step: int, line: dict[str, Any]) -> None:
        if not self._logger.first:
            return
        self._logger.log(line)
        if self._report is not None:
            self._report(self._logger.newest)
        self._logger.log_progress(step, line["loss"], line["samples_per_s"], line["data_wait_frac"])

    def on_examples(self, data: bytes) -> None:
        self._logger.examples(data)

    def on_warning(self, message: str) -> None:
        self._logger.say(message)
