"""Preemption: signals, or the loss of the launcher, end a rank after its step."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType

from physio_dist.errors import EXIT_FAULT, EXIT_STOPPED
from physio_dist.runtime import processes

# A peer that is gone, or storage that hangs, must not keep a rank alive after its launcher.
_GRACE_S = 60.0
# Enough for the main thread to handle a signal, if it runs.
_HANDLER_WAIT_S = 1.0


class PreemptionHandler:
    """Set by SIGTERM, SIGINT or the loss of the launcher; the training loop looks at it once a step.

    SIGUSR1 asks for a checkpoint only.

    Before training begins there is nothing to save, and the same events end the process at once.

    Attributes:
        reason: why the rank is asked to stop, or None.
        save: whether a checkpoint is asked for though training goes on; the loop resets it.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.save = False
        self.training = False
        # Re-entrant, because a second signal may come while the first one's handler holds it.
        self._lock = threading.RLock()

    def set(self, reason: str) -> None:
        """Ask for a stop; the first reason stands."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
        processes.hard_exit_after(_GRACE_S, EXIT_FAULT, f"asked to stop ({reason}) but could not")

    def wait(self, seconds: float) -> bool:
        """Wait a while for a request to stop; whether there is one."""
        end = time.monotonic() + seconds
        while self.reason is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.reason is not None

    def install(self) -> None:
        """Catch the signals of this process (main thread only), and watch the launchers above it."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_checkpoint_request)
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch_wakeup_fd, args=(reader,), name="signals", daemon=True).start()
        if "RANK" in os.environ:
            processes.die_with_parent(signal.SIGTERM)
        processes.watch_launchers(self._on_loss)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.training:
            self.set(signal.Signals(number).name)
            return
        # SIGTERM at this stage comes from a launcher whose other rank has just said what is wrong.
        if number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
            print("physio-dist: stopped before training began; the same command starts it", flush=True)
        raise SystemExit(EXIT_STOPPED)

    def _on_checkpoint_request(self, *_: object) -> None:
        self.save = True

    def _watch_wakeup_fd(self, reader: int) -> None:
        """End a process whose main thread cannot, because it waits for its peers within the communication library."""
        while number := os.read(reader, 1):
            if number[0] in (signal.SIGTERM, signal.SIGINT) and not self.training:
                time.sleep(_HANDLER_WAIT_S)
                os._exit(EXIT_STOPPED)

    def _on_loss(self) -> None:
        if not self.training:
            os._exit(EXIT_STOPPED)
        self.set("its launcher is gone")
