"""State shared by the driver of a pretraining run and its ranks.

A module of its own, so that the actor's process does not import the training code.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

# Limit for a requested checkpoint: one step and its upload.
_SAVE_S = 60.0


@dataclass
class RunState:
    """State of a run, kept by :class:`CoordinatorActor`.

    Attributes:
        stop: reason for which the ranks are asked to stop, if they are.
        end: exit status and message of the rank that ended first, if it had one.
        immediate: whether that end ends the run for all ranks, which may be waiting for that rank in a collective.
        ranks: ranks at work.
        losses: an entry for each group of workers that was lost.
        metrics: newest metrics of rank 0, by the names of ``metrics.jsonl``.
        step_time: when rank 0 last reported, in seconds since 1970; at first the actor's start.
        commit_times: start of the actor, and the newest two checkpoints of the present group of workers.
        notes: messages for the user, beside the losses.
        nonfinite: whether a non-finite loss or gradient has ended the run.
    """

    stop: str | None = None
    end: tuple[int, str] | None = None
    immediate: bool = False
    ranks: set[int] = field(default_factory=set)
    losses: list[str] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    step_time: float = field(default_factory=time.time)
    commit_times: list[float] = field(default_factory=lambda: [time.time()])
    nonfinite: bool = False
    notes: list[str] = field(default_factory=list)


class CoordinatorActor:
    """Async Ray actor that keeps the run's state; a caller may wait in one method while others are served."""

    def __init__(self) -> None:
        self._state = RunState()
        self._stop_requested = asyncio.Event()
        self._checkpoint_requested, self._committed = asyncio.Event(), asyncio.Event()

    async def read(self) -> RunState:
        """Return the state."""
        return self._state

    async def request_stop(self, reason: str) -> None:
        """Ask the ranks to stop; the first reason stands."""
        self._state.stop = self._state.stop or reason
        self._stop_requested.set()

    async def wait_for_stop(self) -> str:
        """Wait until the ranks are asked to stop, and return the reason."""
        await self._stop_requested.wait()
        return self._state.stop or ""

    async def request_checkpoint(self, seconds: float = _SAVE_S) -> bool:
        """Ask the ranks to save their current step; return whether they have within this time."""
        self._committed.clear()
        self._checkpoint_requested.set()
        # All waiting ranks are notified. Ranks that start later start from a checkpoint.
        self._checkpoint_requested = asyncio.Event()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._committed.wait(), seconds)
        return self._committed.is_set()

    async def wait_for_checkpoint_request(self) -> None:
        """Wait until the ranks are asked to save."""
        await self._checkpoint_requested.wait()

    async def join(self, rank: int) -> RunState:
        """Add a rank that starts, and return the state."""
        self._state.ranks.add(rank)
        return self._state

    async def report_metrics(self, metrics: dict[str, Any]) -> None:
        """Update the metrics; called by rank 0 after a step."""
        self._state.metrics.update(metrics)
        self._state.step_time = time.time()

    async def record_commit(self) -> None:
        """Record that a checkpoint was committed."""
        self._committed.set()
        first, *others = self._state.commit_times
        self._state.commit_times = [first, *others[-1:], time.time()]

    async def record_nonfinite(self) -> None:
        """Record that a non-finite loss or gradient has ended the run."""
        self._state.nonfinite = True

    async def report_end(self, status: int, message: str, immediate: bool) -> None:
        """Record the end of a rank; the first one stands."""
        if self._state.end is None:
            self._state.end, self._state.immediate = (status, message), immediate

    async def record_resize(self, ranks: int, saved: bool) -> None:
        """Record that Ray restarts the workers as ``ranks`` ranks."""
        source = "after saving" if saved else "from the newest checkpoint, for they did not save in time"
        self._state.notes.append(f"room for {ranks} rank(s): they start again {source}")

    async def record_shutdown(self) -> None:
        """Record that no rank is at work any more, lost or not."""
        self._state.ranks.clear()

    async def record_loss(self, message: str) -> None:
        """Record that workers were lost."""
        self._state.ranks.clear()
        # The time until the next checkpoint would be no interval between two; the age of the newest one stays valid.
        self._state.commit_times = [self._state.commit_times[-1]]
        self._state.losses.append(message)
