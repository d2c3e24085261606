"""Driver of pretraining on a Ray cluster: ``python -m physio_dist.launch --config FILE [key=value ...]``.

The ranks are the workers of a Ray Train run (``train_worker.py``), which Ray restarts after a loss. Through the
coordinator the driver passes on what Ray does not: requests to stop or save, to ranks whose training function runs in a
thread that no signal reaches, and the exit status of the ranks.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
import ray.train
import ray.train.torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from physio_dist.config import PretrainConfig
from physio_dist.config.loader import Parser, load_command_line
from physio_dist.config.options import map_urls
from physio_dist.errors import EXIT_STOPPED, DataError, PhysioError, Stopped, UserError
from physio_dist.ray_backend import cluster
from physio_dist.ray_backend.callbacks import FailureCallback, SaveBeforeResize, last_line
from physio_dist.ray_backend.coordinator import CoordinatorActor, RunState
from physio_dist.ray_backend.metrics_export import MetricsExporter, run_metrics
from physio_dist.ray_backend.preflight import PreflightTorchConfig
from physio_dist.ray_backend.train_worker import RESUME_HINT, train_one_rank
from physio_dist.runs import job_paths
from physio_dist.runtime import exit_status

# Limit for a step, its checkpoint and the end of the ranks after a request to stop; a rank has a limit of 60 s.
_STOP_S = 90.0
# A lost node may come back or be replaced within this time, even without an autoscaler.
_REPLACE_S = 60.0
_REPORT_S = 10.0
# Between two looks for draining nodes, and between two checkpoints while there are some.
_DRAINING_S = 3.0
_SAVE_EVERY_S = 10.0
# The coordinator of a driver that has just ended is removed within this time.
_COORDINATOR_S = 10.0


def main(arguments: list[str] | None = None) -> None:
    """Read the options, place the ranks and follow them until they end.

    Raises:
        PhysioError: the run is not done, with the exit status.
    """
    parser = Parser(PretrainConfig, prog="python -m physio_dist.launch", description="Pretrain on a Ray cluster.")
    options = load_command_line(parser, PretrainConfig, arguments)
    options = map_urls(options, job_paths.resolve_durable)
    workers = options.cluster.workers
    if workers.min > options.train.global_batch:
        raise UserError(f"{workers.min} ranks cannot share train.global_batch={options.train.global_batch}")
    exit_status.interrupt_on_sigterm()
    cluster.connect(_say)
    try:
        TrainDriver(options, workers.min, min(workers.max, options.train.global_batch)).run()
    finally:
        ray.shutdown()
    _say("done")


class TrainDriver:
    """Driver of one run on a connected cluster.

    Args:
        options: of the run, with absolute URLs.
        min_ranks, max_ranks: limits of the number of ranks.
    """

    def __init__(self, options: PretrainConfig, min_ranks: int, max_ranks: int) -> None:
        self.options, self.min_ranks, self.max_ranks = options, min_ranks, max_ranks
        gpu = options.cluster.gpu
        self.gpus = 1.0 if gpu or (gpu is None and cluster.free_slots(0.0, 1.0) > 0) else 0.0
        self.cpus = options.cluster.cpus_per_worker
        self.url = f"{options.run.dir.rstrip('/')}/{options.run.name}"
        self._exporter = MetricsExporter(self.url)
        self._signal: str | None = None
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Place the ranks and follow them until they end.

        Raises:
            PhysioError: the run is not done, with the exit status.
        """
        self._coordinator = self._start_coordinator()
        cluster.require_resources(
            self.cpus,
            self.gpus,
            self.min_ranks,
            self.options.cluster.placement_timeout_s,
            _say,
            "cluster.placement_timeout_s",
        )
        ranks = f"{self.min_ranks}" if self.min_ranks == self.max_ranks else f"{self.min_ranks} to {self.max_ranks}"
        each = f"{self.cpus:g} CPU(s)" + (f" and {self.gpus:g} GPU" if self.gpus else "")
        _say(f"run {self.url}: {ranks} rank(s) of {each}, up to {self.options.cluster.max_failures} restart(s)")
        # The ranks' output would go through Ray Train's logger, which is silenced there.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
        # After a loss Ray's first attempt may still include the lost node, and by default waits a minute for it.
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
        # Ray Train needs a folder, which stays empty: checkpoints are in the run's own.
        storage = tempfile.mkdtemp(prefix="physio-dist-")
        try:
            thread = threading.Thread(target=self._fit, args=(self._trainer(storage),), daemon=True)
            with self._signals():
                thread.start()
                last = self._follow(thread)
        except ray.exceptions.RayError as error:
            raise PhysioError(f"lost the cluster ({last_line(error)}); {RESUME_HINT}") from error
        finally:
            shutil.rmtree(storage, ignore_errors=True)
        self._conclude(last)

    def _start_coordinator(self) -> Any:
        """Start the run's coordinator, of which a cluster has one; the lease keeps out drivers on other clusters.

        Raises:
            UserError: another driver on this cluster has one.
        """
        this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        coordinator = ray.remote(CoordinatorActor).options(
            name=self.url, namespace="physio-dist", num_cpus=0, scheduling_strategy=this_node
        )
        started = time.monotonic()
        while True:
            try:
                return coordinator.remote()
            except ValueError:
                if time.monotonic() - started > _COORDINATOR_S:
                    raise UserError(
                        f"the run at {self.url} is live: another job on this cluster is at it; stop that one (`ray job "
                        "list` and the dashboard show it) or choose another run.name"
                    ) from None
                time.sleep(0.5)

    def _trainer(self, storage: str) -> Any:
        resources = {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})
        # A worker without a GPU of its own would see all GPUs of its node.
        env = {} if self.gpus else {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        return ray.train.torch.TorchTrainer(
            train_one_rank,
            train_loop_config={"options": self.options, "coordinator": self._coordinator},
            torch_config=PreflightTorchConfig(coordinator=self._coordinator, gpu=self.gpus > 0),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self.min_ranks if self.min_ranks == self.max_ranks else (self.min_ranks, self.max_ranks),
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
                callbacks=[FailureCallback(self._coordinator), SaveBeforeResize(self._coordinator)],
                worker_runtime_env=env,
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
        """Request a stop on SIGINT and SIGTERM; a second signal ends the driver at once."""

        def on_signal(number: int, _: FrameType | None) -> None:
            if self._signal is not None:
                raise PhysioError("ended before the ranks had stopped; the newest checkpoint counts")
            self._signal = signal.Signals(number).name

        handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _follow(self, thread: threading.Thread) -> RunState:
        """Report on the run until it ends, and return its last state."""
        self._reported_losses = self._reported_notes = 0
        self._working = self._waiting_reported = time.monotonic()
        self._draining, self._draining_checked, self._saved = cluster.draining_nodes(), 0.0, 0.0
        requested: float | None = None
        while True:
            thread.join(0.3)
            state: RunState = ray.get(self._coordinator.read.remote())
            self._exporter.set(run_metrics(state, self.options.train, time.time()))
            if not thread.is_alive() or state.immediate:
                return state
            if self._signal is not None and requested is None:
                requested = time.monotonic()
                ray.get(self._coordinator.request_stop.remote(self._signal))
                _say(f"{self._signal}: the ranks finish their step, save it and stop; a second one ends them at once")
            if requested is not None and time.monotonic() - requested > _STOP_S:
                raise PhysioError(f"the ranks did not stop within {_STOP_S:g} s; the newest checkpoint counts")
            self._report_messages(state)
            self._save_for_draining_nodes(state)
            self._report_waiting(state)

    def _report_messages(self, state: RunState) -> None:
        """Print the losses and notes that are new."""
        for count, loss in list(enumerate(state.losses, 1))[self._reported_losses :]:
            again = count <= self.options.cluster.max_failures
            _say(f"lost a worker ({loss})" + ("; Ray starts the ranks again" if again else ""))
        for note in state.notes[self._reported_notes :]:
            _say(note)
        self._reported_losses, self._reported_notes = len(state.losses), len(state.notes)

    def _save_for_draining_nodes(self, state: RunState) -> None:
        """Request a checkpoint when a node is announced to go, and now and then until it has gone."""
        now = time.monotonic()
        if now - self._draining_checked <= _DRAINING_S:
            return
        self._draining_checked, draining = now, cluster.draining_nodes()
        new, self._draining = draining - self._draining, draining
        if new:
            _say(f"announced to go: {', '.join(sorted(new))}; the ranks save now and then until then")
        if state.ranks and draining and (new or now - self._saved > _SAVE_EVERY_S):
            self._saved = now
            self._coordinator.request_checkpoint.remote()

    def _report_waiting(self, state: RunState) -> None:
        """Report every few seconds for how long no rank has been at work.

        Raises:
            Stopped: a stop was requested meanwhile.
            UserError: the cluster is too small, and has been for too long.
        """
        now = time.monotonic()
        if state.ranks:
            self._working = self._waiting_reported = now
        if now - self._waiting_reported <= _REPORT_S:
            return
        self._waiting_reported, seconds = now, now - self._working
        if self._signal is not None:
            raise Stopped(f"stopped while no rank was at work; {RESUME_HINT}")
        unresponsive = cluster.unresponsive_nodes()
        shortage = cluster.describe_shortage(self.cpus, self.gpus, self.min_ranks, unresponsive)
        if cluster.free_slots(self.cpus, self.gpus) >= self.min_ranks:
            # It takes longer if others use a node, mostly, or if one is gone.
            reason = f": {shortage}" if unresponsive or seconds > _REPLACE_S else ""
            _say(f"Ray is starting the workers, {seconds:.0f} s so far{reason}")
        elif seconds > max(_REPLACE_S, self.options.cluster.placement_timeout_s):
            raise UserError(f"{shortage}. Waited {seconds:.0f} s in vain; {RESUME_HINT}")
        else:
            _say(f"no room for the ranks, {seconds:.0f} s so far: {shortage}")

    def _conclude(self, state: RunState) -> None:
        """Raise the error that the run ended with, if any."""
        if state.end is not None:
            status, message = state.end
            error_type = {2: UserError, 3: DataError, EXIT_STOPPED: Stopped}.get(status, PhysioError)
            raise error_type(message)
        if self._failure is not None and "No module named 'physio_dist" in str(self._failure):
            raise UserError(
                "a node of the cluster has no physio_dist: `ray job submit --working-dir . -- python -m "
                "physio_dist.launch ...` from a checkout brings it along, or install it on every node"
            )
        if self._failure is not None:
            reason = state.losses[-1] if state.losses else last_line(self._failure)
            restarts = max(len(state.losses) - 1, 0)
            raise PhysioError(
                f"given up after {restarts} restart(s) ({reason}); the lines of the workers above say more. "
                f"Then {RESUME_HINT}"
            ) from self._failure


def _say(text: str) -> None:
    print(f"physio-dist: {text}", flush=True)
