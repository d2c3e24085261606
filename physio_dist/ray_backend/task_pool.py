"""A conversion's processes on a Ray cluster: the pool that ``shards/`` is handed where the option ``ray`` is given."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from physio_dist import __version__, storage
from physio_dist.data.convert.process_pool import ONE_THREAD
from physio_dist.errors import PhysioError, UserError
from physio_dist.ray_backend import cluster
from physio_dist.runtime import exit_status

# Losses of its worker or node that a task bears; a record that makes the system kill whoever reads it ends there.
_TRIES = 5
# Tasks given to Ray beyond those that have room, so that no node waits for the driver, and autoscalers see demand.
_LEAST = 16
_LOOK_S = 5.0
_TELL_S = 60.0

R = TypeVar("R")


class RayTaskPool:
    """Processes of the cluster that is connected to, one CPU each.

    Args:
        workers: tasks at the same time; 0 for as many as there is room for.
    """

    is_remote = True

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._limit, self._looked = 0, -_LOOK_S

    def imap_unordered(
        self, work: Callable[..., R], tasks: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, R]]:  # fmt: skip
        """As :class:`~physio_dist.data.convert.process_pool.Pool` has it; Ray retries what a lost worker had."""
        waiting, running = iter(enumerate(tasks)), dict[Any, int]()
        task_of = ray.remote(num_cpus=1, max_retries=_TRIES, runtime_env={"env_vars": ONE_THREAD})(_do)
        # The dashboard shows it.
        task_of = task_of.options(name=work.__name__)
        heard = time.monotonic()
        while True:
            for number, task in islice(waiting, max(0, self._most() - len(running))):
                running[task_of.remote(work, __version__, storage.reachable_hosts, task)] = number
            if not running:
                return
            done, _ = ray.wait(list(running), timeout=1.0)
            if done:
                heard = time.monotonic()
            elif time.monotonic() - heard > _TELL_S:
                heard = time.monotonic()
                what = cluster.describe_shortage(1, 0, len(running), cluster.unresponsive_nodes())
                say(f"nothing has come back for {_TELL_S:g} s: {what}")
            for reference in done:
                yield running.pop(reference), _result(reference)

    def _most(self) -> int:
        if not self._workers and time.monotonic() - self._looked >= _LOOK_S:
            self._looked = time.monotonic()
            self._limit = max(_LEAST, 2 * int(ray.cluster_resources().get("CPU", 0)))
        return self._workers or self._limit


@contextlib.contextmanager
def on_cluster(address: str, workers: int, wait_s: float) -> Iterator[RayTaskPool]:
    """The processes of a Ray cluster; where the block ends badly they are ended, for all they do is resumable.

    Args:
        address: HOST:PORT, or ``auto`` for what ``RAY_ADDRESS`` names or else runs on this machine.
        workers: tasks at the same time; 0 for as many as there is room for.
        wait_s: seconds to wait for nodes that an autoscaler may bring.

    Raises:
        UserError: there is no cluster, it refuses this client, or it has no CPU.
    """
    option = "RAY_ADDRESS"
    if address != "auto" or not os.environ.get(option):
        os.environ[option], option = address, "ray"
    try:
        cluster.connect(say, hear_workers=False, option=option)
        exit_status.interrupt_on_sigterm()
        cluster.require_resources(1.0, 0.0, 1, wait_s, say, "wait_s")
        yield RayTaskPool(workers)
    finally:
        # This ends the tasks too. To cancel them makes Ray 2.60 abort where one of them has just come to its end.
        with _mute():
            ray.shutdown()


@contextlib.contextmanager
def _mute() -> Iterator[None]:
    """Nothing reaches stderr meanwhile: below Python, Ray complains there that it cannot start ended tasks again."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def say(text: str) -> None:
    """Tell the person, beside what the command prints."""
    print(f"physio-dist: {text}", file=sys.stderr, flush=True)


def _do(work: Callable[..., R], version: str, contacted: set[str], task: tuple[Any, ...]) -> R:
    """One task, in a process of a node."""
    storage.reachable_hosts.update(contacted)
    try:
        if version != __version__:
            raise UserError(f"physio-dist is {__version__} there and {version} where the command was started")
        return work(*task)
    except PhysioError as error:
        error.args = (f"{error} (on node {socket.gethostname()})",)
        raise


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, PhysioError):
            raise error.cause from None
        if "No module named 'physio_dist" in str(error):
            raise UserError(
                "a node of the cluster has no physio_dist: install it on every node, or bring it along with `ray job "
                "submit --working-dir . -- python -m physio_dist.cli shard ... ray=auto` from a checkout"
            ) from None
        raise error.cause from error
    except RayError as error:
        why = " ".join(str(error).split())[:300]
        raise UserError(
            f"processes of the conversion were killed again and again ({why}); run the same command again to go on, "
            "with workers=N to have fewer at the same time"
        ) from None
