"""The processes of a conversion."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, TypeVar

from physio_dist import lifeline, storage

_HELD = (signal.SIGINT, signal.SIGTERM)
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

R = TypeVar("R")


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one; where the block ends badly they are killed, for all they do is resumable.

    Args:
        workers: how many; 0 takes every core.
    """
    before = set(multiprocessing.active_children())
    inherited = {name: os.environ.get(name) for name in _THREADS}
    # Sums over several threads depend on their number, and the cores are taken by the processes.
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    # Spawned, not forked: the S3 client does not survive a fork.
    pool = ProcessPoolExecutor(
        workers or lifeline.cores(),
        multiprocessing.get_context("spawn"),
        initializer=_start,
        initargs=(storage.contacted,),
    )
    try:
        yield pool
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


def as_they_come(
    pool: ProcessPoolExecutor, work: Callable[..., R], tasks: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[int, R]]:
    """(number of the task, result) in the order in which they are done."""
    with _undisturbed():
        futures = {pool.submit(work, *task): number for number, task in enumerate(tasks)}
    for future in as_completed(futures):
        yield futures[future], future.result()


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Signals wait until the processes are started.

    A process is started when a task is submitted. It inherits the mask, so that no signal reaches it before it is
    ready. Here the mask is not enough: a signal that another thread takes is handled in this one all the same, and
    would leave a process with half of what it is to be told.
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
        for one in came[:1]:
            signal.raise_signal(one)


def _start(contacted: set[str]) -> None:
    # An endpoint that has answered the parent is out for a while if it does not answer here.
    storage.contacted.update(contacted)
    # Ctrl-C and a job's end reach the whole process group; the parent alone decides what they mean.
    for signum in _HELD:
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)
    parent = multiprocessing.parent_process()
    lifeline.die_with_parent(parent=parent.pid if parent else None)
