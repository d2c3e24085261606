"""Checkpoints that are written behind the training loop's back.

The loop waits for a copy in memory. A thread of each rank then sends what the run's files have grown by, on the first
rank the checkpoint's own files too; once every rank is through, the first rank commits. How far the others are is told
at the end of each step, in the all-reduce that there is anyway: the threads take part in no collective.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Protocol

import torch.distributed as dist

_PARTING_S = 10.0


class CheckpointFiles(Protocol):
    """What a checkpoint is made of, and how it gets where it belongs."""

    def send(self) -> None:
        """Everything but the commit; run by a thread of each rank."""

    def commit(self) -> None:
        """Make it count; run by a thread of the first rank, when all ranks have sent theirs."""

    def committed(self) -> None:
        """Called on every rank, by the loop, when it counts."""


class _Phase(Enum):
    NONE = 0
    SENDING = 1
    COMMITTING = 2


class _Work(threading.Thread):
    """A piece of work whose error waits for whoever asks."""

    def __init__(self, action: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._action = action
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._action()
        except BaseException as error:
            self._error = error

    def done(self) -> bool:
        """Whether it has ended well; raises what it has ended with otherwise."""
        if self.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def wait(self) -> None:
        self.join()
        self.done()


class AsyncCheckpointer:
    """One checkpoint in flight, at most.

    Args:
        first: whether this is the first rank.
        take: copies what the checkpoint of a step holds (a collective).

    Attributes:
        blocked_s: for how long the loop has waited for it, since it was last set to 0.
    """

    def __init__(self, first: bool, take: Callable[[int], CheckpointFiles]) -> None:
        self._first, self._take = first, take
        self._phase = _Phase.NONE
        self._files: CheckpointFiles | None = None
        self._work: _Work | None = None
        self.blocked_s = 0.0

    def save(self, step: int) -> None:
        """Begin with the checkpoint of a step; one that is still in flight is waited for (a collective)."""
        began = time.perf_counter()
        self._finish()
        self._files = self._take(step)
        self._phase, self._work = _Phase.SENDING, _Work(self._files.send)
        self.blocked_s += time.perf_counter() - began

    def local_status(self) -> tuple[float, float]:
        """Whether this rank has sent, and whether it has committed; to be summed over the ranks.

        Raises:
            StorageError, UserError: what the thread has met, as at a full disk or a lost lease.
        """
        done = self._work is not None and self._work.done()
        return float(done and self._phase is _Phase.SENDING), float(done and self._phase is _Phase.COMMITTING)

    def update(self, all_sent: bool, committed: bool) -> None:
        """Go on with what all ranks now know; the same on every rank."""
        if all_sent:
            self._commit()
        if committed:
            self._end()

    def finish(self) -> None:
        """Wait until nothing is in flight (a collective)."""
        began = time.perf_counter()
        self._finish()
        self.blocked_s += time.perf_counter() - began

    def abandon(self) -> None:
        """Training ends by an error: let the thread end what it is at, if that takes little time."""
        if self._work is not None:
            self._work.join(_PARTING_S)

    def _finish(self) -> None:
        if self._phase is _Phase.NONE:
            return
        if self._phase is _Phase.SENDING:
            assert self._work is not None
            self._work.wait()
            dist.barrier()
            self._commit()
        if self._work is not None:
            self._work.wait()
        # A rank that ended now would have its launcher end the one that is writing.
        dist.barrier()
        self._end()

    def _commit(self) -> None:
        assert self._files is not None
        self._phase, self._work = _Phase.COMMITTING, _Work(self._files.commit) if self._first else None

    def _end(self) -> None:
        files = self._files
        assert files is not None
        self._phase, self._files, self._work = _Phase.NONE, None, None
        files.committed()
