"""The processes of a conversion."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, Protocol, TypeVar

from physio_dist import storage
from physio_dist.errors import UserError
from physio_dist.runtime import processes

# Sums over several threads depend on their number, and the cores are taken by the processes.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_HELD = (signal.SIGINT, signal.SIGTERM)

R = TypeVar("R")


class TaskPool(Protocol):
    """Processes that run the tasks of a conversion, each possibly more than once."""

    @property
    def is_remote(self) -> bool:
        """True if some of them are on other machines, which see only shared file systems."""

    def imap_unordered(
        self, work: Callable[..., R], tasks: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, R]]:  # fmt: skip
        """(number of the task, result) in the order in which they are done.

        Raises:
            UserError: more processes were lost than the pool replaces.
        """


class LocalTaskPool:
    """Processes of this machine.

    What tasks give back has to be short (4 kB): where a process is killed while it sends more, the receiver waits for
    the rest of it for ever.
    """

    is_remote = False

    def __init__(self, processes: ProcessPoolExecutor) -> None:
        self._processes = processes

    def imap_unordered(
        self, work: Callable[..., R], tasks: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, R]]:  # fmt: skip
        """As :class:`TaskPool` has it; no loss is borne."""
        try:
            with _undisturbed():
                futures = {self._processes.submit(work, *task): number for number, task in enumerate(tasks)}
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise UserError(
                "a conversion process was killed (out of memory, or by hand); run the same command again to go on, "
                "with workers=N to use less memory"
            ) from None


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[LocalTaskPool]:
    """Processes that end with this one; where the block ends badly they are killed, for all they do is resumable.

    Args:
        workers: how many; 0 takes every core.
    """
    before = set(multiprocessing.active_children())
    inherited = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(ONE_THREAD)
    # Spawned, not forked: the S3 client does not survive a fork.
    pool = ProcessPoolExecutor(
        workers or processes.cores(),
        multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(storage.reachable_hosts,),
    )
    try:
        yield LocalTaskPool(pool)
    except BaseException:
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
        raise
    finally:
        for name, value in inherited.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        pool.shutdown(cancel_futures=True)


def run_on_shared_files(shared: dict[str, str], work: Callable[..., R], *task: Any) -> R:
    """Run a task if this process shares the file systems of the process that submitted it.

    Args:
        shared: paths that have to exist, each with the error's text if it does not.
        work, task: function and arguments.

    Raises:
        UserError: a path does not exist.
    """
    for path, meaning in shared.items():
        if not os.path.lexists(path):
            raise UserError(f"{meaning}: {path} is not there")
    return work(*task)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait until the processes are started.

    A process is started when a task is submitted. It inherits the mask, so that no signal reaches it before it is
    ready. Here the mask is not enough: a signal that another thread takes is handled in this one all the same, and
    would leave a process with half of its start-up data.
    """
    resource_tracker.ensure_running()
    came: list[int] = []
    here = threading.current_thread() is threading.main_thread()

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, note) for number in _HELD} if here else {}
    held = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        for number, handler in before.items():
            signal.signal(number, handler)
        for first in came[:1]:
            signal.raise_signal(first)


def _start(contacted: set[str]) -> None:
    # An endpoint that has answered the parent is out for a while if it does not answer here.
    storage.reachable_hosts.update(contacted)
    # Ctrl-C and a job's end reach the whole process group; the parent alone decides what they mean.
    for signum in _HELD:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    parent = multiprocessing.parent_process()
    processes.die_with_parent(parent=parent.pid if parent else None)
