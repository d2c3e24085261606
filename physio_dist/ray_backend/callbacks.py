"""What the controller of a Ray Train run calls: before it ends ranks, and after some were lost."""

from __future__ import annotations

from typing import Any

import ray
import ray.train
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from physio_dist.ray_backend.coordinator import RunState


class FailureCallback(ray.train.UserCallback):  # type: ignore[misc]
    """What the controller of the Ray Train run passes on to the coordinator."""

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        told = [f"rank {rank}: {last_line(error)}" for rank, error in sorted(worker_exceptions.items())]
        # Waited for: the resizer, which comes next, must not take the lost ranks for some that can save.
        ray.get(self._coordinator.tell_loss.remote("; ".join(told)))


class SaveBeforeResize(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Has the ranks save before Ray ends them to start more or fewer, so that no step is repeated.

    Ray takes such a callback beside the documented ones, and calls it in the controller of the run.
    """

    def __init__(self, coordinator: Any) -> None:
        self._coordinator = coordinator

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        now: RunState = ray.get(self._coordinator.read.remote())
        if now.ranks:
            saved = ray.get(self._coordinator.request_checkpoint.remote())
            ray.get(self._coordinator.tell_resize.remote(resize_decision.num_workers, saved))

    def before_worker_group_shutdown(self, worker_group: Any) -> None:
        ray.get(self._coordinator.tell_ended.remote())


def last_line(error: BaseException) -> str:
    """What an error of Ray's says, in short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Ray adds a page of guesses after the first sentence.
    return (lines or [type(error).__name__])[-1].partition(". ")[0][:300]
