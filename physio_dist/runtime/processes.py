"""Process lifetime: ending with the parent or launcher, and the cores available."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil

_PR_SET_PDEATHSIG = 1


def die_with_parent(signum: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send ``signum`` to this process when its parent ends, however it ends (Linux only).

    Args:
        signum: the signal.
        parent: process id of the parent, where it is known: if that one has ended already, so does this process.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(signum), 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signum)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launcher_chain() -> list[int]:
    """Process ids of the launchers above this process, nearest first.

    The DeepSpeed launcher is two processes deep (`deepspeed` starts `deepspeed.launcher.launch`, which starts the
    ranks), and the outer one may be killed alone.
    """
    chain = []
    for ancestor in psutil.Process().parents():
        try:
            words = " ".join(ancestor.cmdline()[:6])
        except psutil.Error:
            break
        if not any(name in words for name in ("deepspeed", "torchrun", "torch.distributed.run")):
            break
        chain.append(ancestor.pid)
    return chain


def watch_launchers(on_loss: Callable[[], None], every_s: float = 1.0) -> None:
    """Call ``on_loss`` once, from a daemon thread, when a launcher above this process is gone."""
    watched = []
    for pid in launcher_chain():
        try:
            watched.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            on_loss()
            return
    if not watched:
        return

    def alive(process: psutil.Process) -> bool:
        # A killed launcher stays a zombie until its own parent, a shell or a test, looks at it.
        try:
            return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
        except psutil.Error:
            return False

    def watch() -> None:
        while all(alive(process) for process in watched):
            time.sleep(every_s)
        on_loss()

    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()


def hard_exit_after(seconds: float, status: int, why: str) -> None:
    """End the process with ``status`` if it is still there after ``seconds``: a peer's death can block it for ever."""

    def wait() -> None:
        time.sleep(seconds)
        print(f"physio-dist: {why}; giving up after {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(status)

    threading.Thread(target=wait, name="hard-exit", daemon=True).start()
