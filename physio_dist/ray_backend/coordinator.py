"""What the driver of a run and its ranks tell each other.

A module of its own, because the process that keeps the coordinator should not have to import what trains.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

# For a checkpoint that is asked for: a step, and sending it.
_SAVE_S = 60.0


@dataclass
class RunState:
    """What the driver and the ranks tell each other.

    Attributes:
        stop: why the ranks are to stop, if they are.
        end: status and message of the rank that ended first, if one had something to tell.
        at_once: whether this ends the run for all ranks, who may be waiting for the one that ended.
        ranks: that are at work now.
        losses: what was lost so far, an entry a broken group of workers.
        line: the newest figures that the first rank told, by the names of ``metrics.jsonl``.
        stepped: when it told them last, in seconds since 1970; at first when the coordinator was put up.
        commits: when the coordinator was put up, and when the newest two checkpoints of these ranks were committed.
        notes: for a person, beside the losses.
        nonfinite: whether a loss or gradient that was no finite number has ended the run.
    """

    stop: str | None = None
    end: tuple[int, str] | None = None
    at_once: bool = False
    ranks: set[int] = field(default_factory=set)
    losses: list[str] = field(default_factory=list)
    line: dict[str, Any] = field(default_factory=dict)
    stepped: float = field(default_factory=time.time)
    commits: list[float] = field(default_factory=lambda: [time.time()])
    nonfinite: bool = False
    notes: list[str] = field(default_factory=list)


class CoordinatorActor:
    """Keeps the run's state, as a Ray actor whose methods are coroutines: one may wait while others are served."""

    def __init__(self) -> None:
        self._state = RunState()
        self._asked = asyncio.Event()
        self._checkpoint_requested, self._committed = asyncio.Event(), asyncio.Event()

    async def read(self) -> RunState:
        return self._state

    async def ask_to_stop(self, reason: str) -> None:
        self._state.stop = self._state.stop or reason
        self._asked.set()

    async def wait_for_stop(self) -> str:
        """Answers when the ranks are to stop, with the reason."""
        await self._asked.wait()
        return self._state.stop or ""

    async def request_checkpoint(self, seconds: float = _SAVE_S) -> bool:
        """Have the ranks save the step they are in; whether that was done within this time."""
        self._committed.clear()
        self._checkpoint_requested.set()
        # Those who wait now have heard it. Ranks that begin later begin with a checkpoint.
        self._checkpoint_requested = asyncio.Event()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._committed.wait(), seconds)
        return self._committed.is_set()

    async def wait_for_checkpoint_request(self) -> None:
        """Answers when the ranks are to save."""
        await self._checkpoint_requested.wait()

    async def join(self, rank: int) -> RunState:
        self._state.ranks.add(rank)
        return self._state

    async def tell(self, line: dict[str, Any]) -> None:
        """Of the first rank, after a step."""
        self._state.line.update(line)
        self._state.stepped = time.time()

    async def tell_commit(self) -> None:
        self._committed.set()
        self._state.commits = [self._state.commits[0], *self._state.commits[1:][-1:], time.time()]

    async def tell_nonfinite(self) -> None:
        self._state.nonfinite = True

    async def tell_end(self, status: int, message: str, at_once: bool) -> None:
        if self._state.end is None:
            self._state.end, self._state.at_once = (status, message), at_once

    async def tell_resize(self, ranks: int, saved: bool) -> None:
        rest = "after saving" if saved else "from the newest checkpoint, for they did not save in time"
        self._state.notes.append(f"room for {ranks} rank(s): they start again {rest}")

    async def tell_ended(self) -> None:
        """No rank is at work any more, lost or not."""
        self._state.ranks.clear()

    async def tell_loss(self, what: str) -> None:
        self._state.ranks.clear()
        # What passed until the next checkpoint would be no interval; the age of the newest is.
        self._state.commits = [self._state.commits[-1]]
        self._state.losses.append(what)
