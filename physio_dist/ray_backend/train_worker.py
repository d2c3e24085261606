"""Training function of a Ray Train worker: one rank of a pretraining run."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch.distributed as dist

from physio_dist.config import PretrainConfig
from physio_dist.errors import EXIT_FAULT, EXIT_STOPPED, PhysioError, Stopped
from physio_dist.ray_backend.coordinator import RunState
from physio_dist.ray_backend.metrics_export import STEP_METRICS

if TYPE_CHECKING:
    from physio_dist.runtime.preemption import PreemptionHandler

# Least time between two reports of rank 0 that hold no metrics beside the step.
_REPORT_S = 1.0
RESUME_HINT = "the same command goes on from the newest checkpoint"
_NOT_BEGUN = "stopped before training began; the same command starts it"


def train_one_rank(settings: dict[str, Any]) -> None:
    """Run one rank in a thread of a Ray Train worker.

    An error with a documented exit status ends the whole run and is reported to the driver. Any other is raised, so
    that Ray restarts the ranks.

    Args:
        settings: ``options`` of the run and the ``coordinator``.
    """
    # Ray Train logs every report.
    logging.getLogger().setLevel(logging.WARNING)
    options: PretrainConfig = settings["options"]
    coordinator = settings["coordinator"]
    rank = ray.train.get_context().get_world_rank()
    state: RunState = ray.get(coordinator.join.remote(rank))
    if state.stop is not None:
        lost = f"a worker was lost while the ranks were stopping; {RESUME_HINT}"
        end = (EXIT_FAULT, lost) if state.losses else (EXIT_STOPPED, _NOT_BEGUN)
        ray.get(coordinator.report_end.remote(*end, True))
        return
    _set_local_world_size()
    # Imported here, after the accelerator's environment is set.
    from physio_dist.runtime.distributed import choose_accelerator
    from physio_dist.runtime.preemption import PreemptionHandler

    choose_accelerator()
    from physio_dist.training import pretrain

    stop = PreemptionHandler()
    _start_listeners(coordinator, stop, rank)

    def on_commit(step: int, metrics: dict[str, Any]) -> None:
        if rank == 0:
            coordinator.record_commit.remote()
        # A collective of the ranks.
        ray.train.report({**_select(metrics), "step": step})

    try:
        pretrain.pretrain(options, stop, on_commit, _metrics_reporter(coordinator))
    except pretrain.PeerLostError as error:
        print(f"physio-dist: {error}", flush=True)
        raise
    except PhysioError as error:
        _report_error(coordinator, error, rank)
    except Exception:
        traceback.print_exc()
        raise


def _set_local_world_size() -> None:
    """Count the ranks on this machine, which share its cores; several of Ray's nodes may be on one machine."""
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(socket.gethostname()))


def _start_listeners(coordinator: Any, stop: PreemptionHandler, rank: int) -> None:
    """Wait in threads for requests to stop and, on rank 0, to save; ranks agree on both in their next step."""

    def wait_for_stop() -> None:
        reason = ray.get(coordinator.wait_for_stop.remote())
        if stop.training:
            stop.set(reason)
        else:
            ray.get(coordinator.report_end.remote(EXIT_STOPPED, _NOT_BEGUN, True))

    def wait_for_checkpoint_requests() -> None:
        while True:
            ray.get(coordinator.wait_for_checkpoint_request.remote())
            stop.save = True

    threading.Thread(target=wait_for_stop, name="stop-listener", daemon=True).start()
    if rank == 0:
        threading.Thread(target=wait_for_checkpoint_requests, name="save-listener", daemon=True).start()


def _report_error(coordinator: Any, error: PhysioError, rank: int) -> None:
    """Report an error with an exit status to the driver."""
    from physio_dist.training.nonfinite import NonFiniteError

    if isinstance(error, NonFiniteError):
        ray.get(coordinator.record_nonfinite.remote())
    # All ranks stop together. Other errors are one rank's own, and the others wait for it in a collective.
    stopped = isinstance(error, Stopped)
    # The cause may be on this node alone.
    location = "" if stopped else f" (rank {rank} on node {ray.util.get_node_ip_address()})"
    ray.get(coordinator.report_end.remote(error.exit_status, f"{error}{location}", not stopped))


def _metrics_reporter(coordinator: Any) -> Callable[[dict[str, Any]], None]:
    """Return the function by which rank 0 reports to the driver: all metrics, and the bare step once a second."""
    reported = 0.0

    def report(metrics: dict[str, Any]) -> None:
        nonlocal reported
        if len(metrics) > 1 or time.monotonic() - reported > _REPORT_S:
            reported = time.monotonic()
            coordinator.report_metrics.remote(_select(metrics))

    return report


def _select(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: metrics[name] for name in STEP_METRICS if metrics.get(name) is not None}
