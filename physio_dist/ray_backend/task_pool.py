"""Process pool of a conversion on a Ray cluster, for the option ``ray``."""

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

# Restarts of a task whose worker or node was lost; a record that makes the system kill its reader fails after them.
_TRIES = 5
# Tasks submitted beyond the CPUs, so that no node waits for the driver and autoscalers see demand.
_MIN_SUBMITTED = 16
_RESOURCES_S = 5.0
_REPORT_S = 60.0

R = TypeVar("R")


class RayTaskPool:
    """Processes of the cluster that is connected to, one CPU each.

    Args:
        workers: tasks at the same time; 0 for as many as the cluster has CPUs.
    """

    is_remote = True

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._limit, self._updated = 0, -_RESOURCES_S

    def imap_unordered(
        self, work: Callable[..., R], tasks: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[int, R]]:  # fmt: skip
        """See :class:`~physio_dist.data.convert.process_pool.Pool`; Ray retries the tasks of a lost worker."""
        waiting, running = iter(enumerate(tasks)), dict[Any, int]()
        remote_task = ray.remote(num_cpus=1, max_retries=_TRIES, runtime_env={"env_vars": ONE_THREAD})(_run_task)
        # The name that the dashboard shows.
        remote_task = remote_task.options(name=work.__name__)
        last_result = time.monotonic()
        while True:
            for number, task in islice(waiting, max(0, self._max_submitted() - len(running))):
                running[remote_task.remote(work, __version__, storage.reachable_hosts, task)] = number
            if not running:
                return
            done, _ = ray.wait(list(running), timeout=1.0)
            if done:
                last_result = time.monotonic()
            elif time.monotonic() - last_result > _REPORT_S:
                last_result = time.monotonic()
                shortage = cluster.describe_shortage(1, 0, len(running), cluster.unresponsive_nodes())
                say(f"nothing has come back for {_REPORT_S:g} s: {shortage}")
            for reference in done:
                yield running.pop(reference), _result(reference)

    def _max_submitted(self) -> int:
        if not self._workers and time.monotonic() - self._updated >= _RESOURCES_S:
            self._updated = time.monotonic()
            self._limit = max(_MIN_SUBMITTED, 2 * int(ray.cluster_resources().get("CPU", 0)))
        return self._workers or self._limit


@contextlib.contextmanager
def on_cluster(address: str, workers: int, wait_s: float) -> Iterator[RayTaskPool]:
    """Connect to a Ray cluster for a conversion; its tasks end with the block, as all of them can be resumed.

    Args:
        address: HOST:PORT, or ``auto`` for the cluster of ``RAY_ADDRESS`` or else on this machine.
        workers: tasks at the same time; 0 for as many as the cluster has CPUs.
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
        # Ends the tasks too. Cancelling them makes Ray 2.60 abort if one of them has just ended.
        with _hide_stderr():
            ray.shutdown()


@contextlib.contextmanager
def _hide_stderr() -> Iterator[None]:
    """Discard stderr, where Ray's C++ code complains that it cannot restart ended tasks."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def say(text: str) -> None:
    """Print a message to stderr, beside the output of the command."""
    print(f"physio-dist: {text}", file=sys.stderr, flush=True)


def _run_task(work: Callable[..., R], version: str, hosts: set[str], task: tuple[Any, ...]) -> R:
    """Run one task in a worker process."""
    storage.reachable_hosts.update(hosts)
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
