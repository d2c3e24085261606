"""Hang detection: a thread that prints all stacks when a rank stays too long in one phase of a step."""

from __future__ import annotations

import faulthandler
import socket
import sys
import threading
import time
from types import TracebackType

DATA = "its data"
PASS = "its forward and backward passes, in which it waits for other ranks too"
AGREE = "the other ranks, to agree on the step"
MOVE = "the optimizer"
VALIDATE = "validation"
SAVE = "a checkpoint"


class Watchdog:
    """Watches a rank from ``with`` to its end; it ends nothing by itself.

    Args:
        rank: of this process.
        hang_timeout_s: seconds without progress after which all threads' stacks go to stderr, and again after as long.
    """

    def __init__(self, rank: int, hang_timeout_s: float) -> None:
        self._rank, self._hang_timeout_s = rank, hang_timeout_s
        self._at = 0, "training to begin", time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, what: str) -> None:
        """This rank now turns to something else."""
        self._at = step, what, time.monotonic()

    def __enter__(self) -> Watchdog:
        self._at = *self._at[:2], time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        printed = 0.0
        while not self._ended.wait(min(self._hang_timeout_s / 4, 5.0)):
            step, what, since = self._at
            now = time.monotonic()
            if now - max(since, printed) > self._hang_timeout_s:
                printed = now
                print(
                    f"physio-dist: stalled: rank {self._rank} on {socket.gethostname()} has been in step {step} for "
                    f"{now - since:.0f} s without progress, waiting for {what}; its threads:",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
                faulthandler.dump_traceback(sys.stderr, all_threads=True)
