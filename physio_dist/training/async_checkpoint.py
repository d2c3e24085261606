"""Checkpoints written in the background.

The training loop waits only for a copy in memory. A thread of each rank then uploads what the run's files have grown
by, on the first rank the checkpoint's own files too; once all ranks have uploaded, the first rank commits. The ranks
learn of each other's progress from the all-reduce at the end of each step: the threads take part in no collective.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from physio_dist.training.collectives import barrier

# Seconds that an upload may go on after training has ended by an error.
_ABANDON_S = 10.0


class Snapshot(Protocol):
    """A copy of everything that a checkpoint holds."""

    def upload(self) -> None:
        """Store all of it but the manifest; run by a thread of each rank."""

    def commit(self) -> None:
        """Write the manifest; run by a thread of the first rank, after all ranks have uploaded."""

    def on_commit(self) -> None:
        """Called on every rank, by the loop, once the checkpoint is committed."""


class _Phase(Enum):
    IDLE = 0
    UPLOADING = 1
    COMMITTING = 2


class _Work(threading.Thread):
    """A thread whose error is raised in the thread that asks for its state."""

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
        """True if it has finished; raises the error that ended it."""
        if self.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True

    def wait(self) -> None:
        self.join()
        self.done()


class AsyncCheckpointer:
    """Saves checkpoints in the background, at most one at a time.

    Args:
        first: whether this is the first rank.
        snapshot: copies what the checkpoint of a step holds (a collective).

    Attributes:
        blocked_s: seconds that the loop has waited, since it was last set to 0.
    """

    def __init__(self, first: bool, snapshot: Callable[[int], Snapshot]) -> None:
        self._first, self._take_snapshot = first, snapshot
        self._phase = _Phase.IDLE
        self._snapshot: Snapshot | None = None
        self._work: _Work | None = None
        self.blocked_s = 0.0

    def save(self, step: int) -> None:
        """Start the checkpoint of a step, after waiting for the one in flight (a collective)."""
        began = time.perf_counter()
        self._finish()
        self._snapshot = self._take_snapshot(step)
        self._phase, self._work = _Phase.UPLOADING, _Work(self._snapshot.upload)
        self.blocked_s += time.perf_counter() - began

    def local_status(self) -> tuple[bool, bool]:
        """Progress of the checkpoint in flight on this rank: uploaded, committed.

        Raises:
            StorageError, UserError: the thread's error, such as a full disk or a lost lease.
        """
        done = self._work is not None and self._work.done()
        return done and self._phase is _Phase.UPLOADING, done and self._phase is _Phase.COMMITTING

    def update(self, all_uploaded: bool, committed: bool) -> None:
        """Enter the next phase if all ranks are ready for it; called with the same arguments on every rank."""
        if all_uploaded:
            self._commit()
        if committed:
            self._end()

    def finish(self) -> None:
        """Wait for the checkpoint in flight (a collective)."""
        began = time.perf_counter()
        self._finish()
        self.blocked_s += time.perf_counter() - began

    def abandon(self) -> None:
        """Give the thread a few seconds to finish; called when training ends by an error."""
        if self._work is not None:
            self._work.join(_ABANDON_S)

    def _finish(self) -> None:
        if self._phase is _Phase.IDLE:
            return
        if self._phase is _Phase.UPLOADING:
            assert self._work is not None
            self._work.wait()
            barrier()
            self._commit()
        if self._work is not None:
            self._work.wait()
        # A rank that ended now would have its launcher end the one that is writing.
        barrier()
        self._end()

    def _commit(self) -> None:
        assert self._snapshot is not None
        self._phase, self._work = _Phase.COMMITTING, _Work(self._snapshot.commit) if self._first else None

    def _end(self) -> None:
        snapshot = self._snapshot
        assert snapshot is not None
        self._phase, self._snapshot, self._work = _Phase.IDLE, None, None
        snapshot.on_commit()
