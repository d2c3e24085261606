"""Callbacks in the controller of a Ray Train run.

:class:`FailureCallback` uses Ray's public interface. :class:`SaveBeforeResize` cannot: ``ray.train.UserCallback`` has
``after_report`` and ``after_exception`` only, and nothing public is called before Ray ends healthy workers to start
more or fewer of them. ``ControllerCallback`` and ``WorkerGroupCallback`` are Ray's developer interface
(``@DeveloperAPI``), as is passing them in ``RunConfig.callbacks``, but Ray does not export them, hence the import from
``_internal``. Without these hooks an elastic resize would repeat the steps since the newest checkpoint.
"""

from __future__ import annotations

from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from physio_dist.ray_backend.coordinator import RunState


class FailureCallback(ray.train.UserCallback):  # type: ignore[misc]
    """Reports lost workers to the coordinator."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Record the loss."""
        messages = [f"rank {rank}: {last_line(error)}" for rank, error in sorted(worker_exceptions.items())]
        # Waits for the answer: SaveBeforeResize, which comes next, must not wait for lost ranks to save.
        ray.get(self._coordinator.record_loss.remote("; ".join(messages)))


class SaveBeforeResize(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Lets the ranks save before Ray ends them to start more or fewer, so that no step is repeated."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Request a checkpoint and wait for it."""
        state: RunState = ray.get(self._coordinator.read.remote())
        if state.ranks:
            saved = ray.get(self._coordinator.request_checkpoint.remote())
            ray.get(self._coordinator.record_resize.remote(resize_decision.num_workers, saved))

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        """Record that no rank is at work."""
        ray.get(self._coordinator.record_shutdown.remote())


def last_line(error: BaseException) -> str:
    """Shorten the message of one of Ray's errors."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray adds a page of possible causes after the first sentence.
    return (lines or [type(error).__name__])[-1].partition(". ")[0][:300]
