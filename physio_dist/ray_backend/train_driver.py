"""Pretraining on a Ray cluster: ``python -m physio_dist.launch --config FILE [key=value ...]``.

This is the driver. Ranks of pretraining become the workers of a Ray Train run, which starts them again after a loss.
Between them and a person the driver carries what Ray does not: a wish to stop to the ranks, whose function runs in a
thread that no signal reaches, and how they ended to the exit status.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch.distributed as dist
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from physio_dist import config
from physio_dist.config import PretrainConfig
from physio_dist.config.loader import Parser
from physio_dist.errors import EXIT_FAULT, EXIT_STOPPED, DataError, PhysioError, Stopped, UserError
from physio_dist.ray_backend import cluster
from physio_dist.ray_backend.callbacks import FailureCallback, SaveBeforeResize, last_line
from physio_dist.ray_backend.coordinator import CoordinatorActor, RunState
from physio_dist.ray_backend.metrics_export import LINE, MetricsExporter, run_metrics
from physio_dist.ray_backend.preflight import PreflightTorchConfig
from physio_dist.runs import job_paths
from physio_dist.runs.run_dir import map_urls
from physio_dist.runtime import exit_status

# What a step, its checkpoint and the end of the ranks may take once a stop was asked for; a rank gives itself 60 s.
_STOP_S = 90.0
# A lost node is worth waiting for a while, even where nobody announced an autoscaler.
_REPLACE_S = 60.0
_TELL_S = 10.0
# Between two looks for nodes that were announced to go, and between two checkpoints for their sake.
_LOOK_S = 3.0
_AGAIN_S = 10.0
# A driver that has just ended has its coordinator taken down within this time.
_BOARD_S = 10.0
# Between two words of the first rank to the driver about steps alone.
_TELL_STEP_S = 1.0
_GOES_ON = "the same command goes on from the newest checkpoint"
_NOT_BEGUN = "stopped before training began; the same command starts it"


def main(arguments: list[str] | None = None) -> None:
    """Read the options, place the ranks, follow them to their end.

    Raises:
        PhysioError: how the run ended, where it is not done.
    """
    parser = Parser(prog="python -m physio_dist.launch", description="Pretrain on a Ray cluster.")
    parser.add_argument("--config", required=True, help="YAML file; the ones that ship are in configs/pretrain/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that go over the file's")
    given = parser.parse_intermixed_args(arguments)
    options = config.load(PretrainConfig, given.config, given.overrides)
    options = map_urls(options, job_paths.resolve_durable)
    workers = options.cluster.workers
    if workers.min > options.train.global_batch:
        raise UserError(f"{workers.min} ranks cannot share train.global_batch={options.train.global_batch}")
    exit_status.interrupt_on_sigterm()
    cluster.connect(_say)
    try:
        Launch(options, workers.min, min(workers.max, options.train.global_batch)).run()
    finally:
        ray.shutdown()
    _say("done")


class Launch:
    """One run on a cluster that is connected to.

    Args:
        options: of the run, with absolute URLs.
        least, most: ranks.
    """

    def __init__(self, options: PretrainConfig, least: int, most: int) -> None:
        self.options, self.least, self.most = options, least, most
        gpu = options.cluster.gpu
        self.gpus = 1.0 if gpu or (gpu is None and cluster.free_slots(0.0, 1.0) > 0) else 0.0
        self.cpus = options.cluster.cpus_per_worker
        self.url = f"{options.run.dir.rstrip('/')}/{options.run.name}"
        self._gauges = MetricsExporter(self.url)
        self._asked: str | None = None
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Place the ranks and follow them.

        Raises:
            PhysioError: how the run ended, where it is not done.
        """
        coordinator = self._start_coordinator()
        cluster.require_resources(
            self.cpus,
            self.gpus,
            self.least,
            self.options.cluster.placement_timeout_s,
            _say,
            "cluster.placement_timeout_s",
        )
        many = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        each = f"{self.cpus:g} CPU(s)" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        _say(f"run {self.url}: {many} rank(s) of {each}, up to {self.options.cluster.max_failures} restart(s)")
        # Prints of the ranks would go through Ray Train's logger, whose remarks are silenced there.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
        # After a loss Ray's first try may still count on the lost node, for a minute unless it is told otherwise.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
        # Ray Train wants a folder. Nothing of value lies there: checkpoints are found in the run's own.
        storage = tempfile.mkdtemp(prefix="physio-dist-")
        try:
            thread = threading.Thread(target=self._fit, args=(self._trainer(coordinator, storage),), daemon=True)
            with self._signals():
                thread.start()
                last = self._follow(coordinator, thread)
        except ray.exceptions.RayError as error:
            raise PhysioError(f"lost the cluster ({last_line(error)}); {_GOES_ON}") from error
        finally:
            shutil.rmtree(storage, ignore_errors=True)
        self._conclude(last)

    def _start_coordinator(self) -> Any:
        """The run's coordinator, of which a cluster has one; the lease keeps out drivers that are elsewhere.

        Raises:
            UserError: another driver on this cluster is at the run.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        coordinator = ray.remote(CoordinatorActor).options(
            name=self.url, namespace="physio-dist", num_cpus=0, scheduling_strategy=here
        )
        began = time.monotonic()
        while True:
            try:
                return coordinator.remote()
            except ValueError:
                if time.monotonic() - began > _BOARD_S:
                    raise UserError(
                        f"the run at {self.url} is live: another job on this cluster is at it; stop that one (`ray job "
                        "list` and the dashboard show it) or choose another run.name"
                    ) from None
                time.sleep(0.5)

    def _trainer(self, coordinator: Any, storage: str) -> Any:
        resources = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        # A worker without a GPU of its own sees all of its node's, unless it is told otherwise.
        hidden = {} if self.gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        return ray.train.torch.TorchTrainer(
            train_one_rank,
            train_loop_config={"options": self.options, "coordinator": coordinator},
            torch_config=PreflightTorchConfig(coordinator=coordinator, gpu=self.gpus > 0),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.least if self.least == self.most else (self.least, self.most),
                use_gpu=self.gpus > 0,
                resources_per_worker=resources,
                elastic_resize_monitor_interval_s=self.options.cluster.resize_s,
            ),
            run_config=ray.train.RunConfig(
                name=self.options.run.name,
                storage_path=storage,
                failure_config=ray.train.FailureConfig(
                    max_failures=self.options.cluster.max_failures,
                    max_preemption_failures=self.options.cluster.max_preemptions,
                ),
                callbacks=[FailureCallback(coordinator), SaveBeforeResize(coordinator)],
                worker_runtime_env=hidden,
                logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
            ),
        )

    def _fit(self, trainer: Any) -> None:
        try:
            trainer.fit()
        except BaseException as error:
            self._failure = error

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask the ranks to stop; a second one ends at once."""

        def on_signal(number: int, _: FrameType | None) -> None:
            if self._asked is not None:
                raise PhysioError("ended before the ranks had stopped; the newest checkpoint counts")
            self._asked = signal.Signals(number).name

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _follow(self, coordinator: Any, thread: threading.Thread) -> RunState:
        """Wait for the end of the run; what the coordinator says then."""
        told_losses, told_notes, heard, told = 0, 0, time.monotonic(), time.monotonic()
        looked, saved, known = 0.0, 0.0, cluster.draining_nodes()
        asked_at: float | None = None
        while True:
            thread.join(0.3)
            now: RunState = ray.get(coordinator.read.remote())
            self._gauges.set(run_metrics(now, self.options.train, time.time()))
            if not thread.is_alive() or now.at_once:
                return now
            clock = time.monotonic()
            if self._asked is not None and asked_at is None:
                asked_at = clock
                ray.get(coordinator.ask_to_stop.remote(self._asked))
                _say(f"{self._asked}: the ranks finish their step, save it and stop; a second one ends them at once")
            if asked_at is not None and clock - asked_at > _STOP_S:
                raise PhysioError(f"the ranks did not stop within {_STOP_S:g} s; the newest checkpoint counts")
            for count, loss in list(enumerate(now.losses, 1))[told_losses:]:
                again = count <= self.options.cluster.max_failures
                _say(f"lost a worker ({loss})" + ("; Ray starts the ranks again" if again else ""))
            told_losses = len(now.losses)
            for line in now.notes[told_notes:]:
                _say(line)
            told_notes = len(now.notes)
            if clock - looked > _LOOK_S:
                looked, going = clock, cluster.draining_nodes()
                if going - known:
                    _say(f"announced to go: {', '.join(sorted(going - known))}; the ranks save now and then until then")
                if now.ranks and going and (going - known or clock - saved > _AGAIN_S):
                    saved = clock
                    coordinator.request_checkpoint.remote()
                known = going
            if now.ranks:
                heard = told = clock
            elif clock - told > _TELL_S:
                told = clock
                self._wait_for_room(clock - heard)

    def _wait_for_room(self, seconds: float) -> None:
        """No rank is at work: say so, and give up where there is no room for them."""
        if self._asked is not None:
            raise Stopped(f"stopped while no rank was at work; {_GOES_ON}")
        lost = cluster.unresponsive_nodes()
        what = cluster.describe_shortage(self.cpus, self.gpus, self.least, lost)
        if cluster.free_slots(self.cpus, self.gpus) >= self.least:
            # What takes longer is a node that others fill, most of the time, or one that is gone.
            why = f": {what}" if lost or seconds > _REPLACE_S else ""
            _say(f"Ray is starting the workers, {seconds:.0f} s so far{why}")
            return
        if seconds > max(_REPLACE_S, self.options.cluster.placement_timeout_s):
            raise UserError(f"{what}. Waited {seconds:.0f} s in vain; {_GOES_ON}")
        _say(f"no room for the ranks, {seconds:.0f} s so far: {what}")

    def _conclude(self, coordinator: RunState) -> None:
        if coordinator.end is not None:
            status, message = coordinator.end
            kind = {2: UserError, 3: DataError, EXIT_STOPPED: Stopped}.get(status, PhysioError)
            raise kind(message)
        if self._failure is not None and "No module named 'physio_dist" in str(self._failure):
            raise UserError(
                "a node of the cluster has no physio_dist: `ray job submit --working-dir . -- python -m "
                "physio_dist.launch ...` from a checkout brings it along, or install it on every node"
            )
        if self._failure is not None:
            why = coordinator.losses[-1] if coordinator.losses else last_line(self._failure)
            count = max(len(coordinator.losses) - 1, 0)
            raise PhysioError(
                f"given up after {count} restart(s) ({why}); the lines of the workers above say more. Then {_GOES_ON}"
            ) from self._failure


def train_one_rank(given: dict[str, Any]) -> None:
    """One rank, in a thread of a Ray Train worker.

    What the documentation gives a status ends the whole run and is told to the driver. Everything else is raised, for
    Ray to start the ranks again.
    """
    # Ray Train's remarks on each report.
    logging.getLogger().setLevel(logging.WARNING)
    options: PretrainConfig = given["options"]
    coordinator = given["coordinator"]
    me = ray.train.get_context().get_world_rank()
    there: RunState = ray.get(coordinator.join.remote(me))
    if there.stop is not None:
        if there.losses:
            end = EXIT_FAULT, f"a worker was lost while the ranks were stopping; {_GOES_ON}"
        else:
            end = EXIT_STOPPED, _NOT_BEGUN
        ray.get(coordinator.tell_end.remote(*end, True))
        return
    # Two of Ray's nodes may be on one machine, whose cores their ranks share.
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(socket.gethostname()))
    from physio_dist.runtime.distributed import choose_accelerator
    from physio_dist.runtime.preemption import PreemptionHandler

    choose_accelerator()
    from physio_dist.training import pretrain
    from physio_dist.training.nonfinite import NonFiniteError

    stop = PreemptionHandler()

    def listen() -> None:
        reason = ray.get(coordinator.wait_for_stop.remote())
        if stop.training:
            stop.set(reason)
        else:
            ray.get(coordinator.tell_end.remote(EXIT_STOPPED, _NOT_BEGUN, True))

    threading.Thread(target=listen, name="stop-listener", daemon=True).start()

    def listen_for_checkpoint_requests() -> None:
        while True:
            ray.get(coordinator.wait_for_checkpoint_request.remote())
            stop.save = True

    if me == 0:
        # All ranks save what one of them is asked for.
        threading.Thread(target=listen_for_checkpoint_requests, name="save-listener", daemon=True).start()

    def committed(step: int, line: dict[str, Any]) -> None:
        if me == 0:
            coordinator.tell_commit.remote()
        _report(step, line)

    try:
        pretrain.pretrain(options, stop, committed, _teller(coordinator))
    except pretrain.PeerLostError as error:
        _say(str(error))
        raise
    except PhysioError as error:
        if isinstance(error, NonFiniteError):
            ray.get(coordinator.tell_nonfinite.remote())
        # All ranks come to a stop together. From other errors the rest does not hear: it waits in a collective.
        stopped = isinstance(error, Stopped)
        # What one node lacks, another may have.
        where = "" if stopped else f" (rank {me} on node {ray.util.get_node_ip_address()})"
        ray.get(coordinator.tell_end.remote(error.exit_status, f"{error}{where}", not stopped))
    except Exception:
        traceback.print_exc()
        raise


def _report(step: int, line: dict[str, Any]) -> None:
    """Hand the newest metrics to Ray (a collective)."""
    ray.train.report({**_known(line), "step": step})


def _teller(coordinator: Any) -> Callable[[dict[str, Any]], None]:
    """What the first rank tells the driver with: every line of metrics, and steps now and then."""
    told = 0.0

    def tell(line: dict[str, Any]) -> None:
        nonlocal told
        if len(line) > 1 or time.monotonic() - told > _TELL_STEP_S:
            told = time.monotonic()
            coordinator.tell.remote(_known(line))

    return tell


def _known(line: dict[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in LINE if line.get(name) is not None}


def _say(text: str) -> None:
    print(f"physio-dist: {text}", flush=True)
