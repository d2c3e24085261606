"""Ray Tune's part of a fusion sweep: the trainable, the callback that keeps the trial log, and the Tuner.

The search space and the searcher are in ``tune_search.py``, early stopping in ``schedulers.py``, the computation of a
trial in ``evaluation/study.py``, and its record in ``evaluation/trial_log.py``.
"""

from __future__ import annotations

import math
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import tune
from ray.tune.result import RESULT_DUPLICATE
from ray.tune.schedulers import FIFOScheduler

from physio_dist import __version__, storage
from physio_dist.config import TuneConfig
from physio_dist.errors import PhysioError, UserError
from physio_dist.evaluation import trial_log, trials
from physio_dist.evaluation.trials import Study
from physio_dist.ray_backend.metrics_export import MetricsExporter
from physio_dist.ray_backend.schedulers import FoldwiseASHA
from physio_dist.ray_backend.tune_search import MAX_RETRIES, FoldwiseSearcher, param_space

METRIC = "val_auc"
_NOT_INSTALLED = (
    "a node of the cluster has no physio_dist: install it on every node, or bring it along with `ray job submit "
    "--working-dir . -- python -m physio_dist.tune ...` from a checkout"
)


class TrialError(PhysioError):
    """A trial failed; the results of the others are kept."""


class FusionTrial(tune.Trainable):  # type: ignore[misc]
    """One configuration for one row of the result table; a step is an epoch on all folds.

    A class rather than a function, so that the dashboard lists its actors under this name. An actor runs one trial
    after the other (``reuse_actors``), and its log names them.
    """

    def setup(self, config: dict[str, Any], prepared: Study, version: str, threads: int) -> None:
        """Prepare a new actor for its first trial."""
        self._mismatch = ""
        if version != __version__:
            node = socket.gethostname()
            self._mismatch = f"physio-dist is {__version__} on node {node} and {version} where the sweep was started"
        torch.set_num_threads(threads)
        self._prepared = prepared
        self._start(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Start the next trial in the same actor."""
        self._start(new_config)
        return True

    def _start(self, config: dict[str, Any]) -> None:
        params = {name: value for name, value in config.items() if name not in ("trial", "row", "fold")}
        print(f"trial {config['trial']}: {params}", flush=True)
        self._epochs: Iterator[dict[str, float]] = trials.train(self._prepared, config["row"], params, config["fold"])

    def step(self) -> dict[str, Any]:
        """Train for one epoch.

        Returns:
            ``epoch``, ``val_auc`` and ``fold_<name>``. An error is reported as ``failure``: if it were raised, Tune
            would retry the trial as if its worker had been lost, and it would be raised again.
        """
        if self._mismatch:
            return {METRIC: math.nan, "failure": self._mismatch, "unusable_node": True, "done": True}
        try:
            result = next(self._epochs, None)
        except Exception as error:
            message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            return {METRIC: math.nan, "failure": message, "traceback": traceback.format_exc(), "done": True}
        return {RESULT_DUPLICATE: True, "done": True} if result is None else dict(result)


class _DriverOnly:
    """Mixin without state to pickle: Tune pickles its arguments for ``Tuner.restore``, which is not used."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _LogCallback(_DriverOnly, tune.Callback):  # type: ignore[misc]
    """Writes the trials' progress to the trial log and to the metrics endpoint."""

    def __init__(self, log: trial_log.TrialLog, last: dict[str, dict[str, int]], say: Callable[[str], None]) -> None:
        self._log, self._last, self._say = log, last, say
        # Whether a node lacks the right physio-dist, which is a wrong configuration rather than a fault.
        self.unusable_node = False
        self._exporter = MetricsExporter(log.run.url)
        self._exporter.set(log.counts())

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._log.start(_name(trial))
        self._exporter.set(self._log.counts())

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "failure" in result:
            self.unusable_node |= result.get("unusable_node", False)
            if self._log.failure is None and "traceback" in result:
                print(result["traceback"], file=sys.stderr, flush=True)
            self._log.fail(_name(trial), result["failure"])
        elif "epoch" in result:
            metrics = {name: value for name, value in result.items() if name.startswith("fold_")}
            self._log.epoch(_name(trial), {"epoch": result["epoch"], METRIC: result[METRIC], **metrics})

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._log.end(_name(trial), self._last.get(_name(trial), {}))
        self._exporter.set(self._log.counts())

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self._not_installed(trial):
            self._say(f"the worker of trial {_name(trial)} is lost; the trial starts again ({_reason(trial)})")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self._not_installed(trial) and trial.run_metadata.num_failures > MAX_RETRIES:
            self._log.fail(_name(trial), f"its worker was lost again and again ({_reason(trial)})")
        # Otherwise the worker was lost while it took the trial over from another one: Ray 2.60 then calls
        # on_trial_recover and gives the trial up nevertheless. The searcher suggests it again.

    def _not_installed(self, trial: Any) -> bool:
        if "No module named 'physio_dist" not in _error_text(trial):
            return False
        self.unusable_node = True
        self._log.fail(_name(trial), _NOT_INSTALLED)
        return True


class _StopOnFailure(_DriverOnly, tune.Stopper):  # type: ignore[misc]
    """Ends the sweep when a trial has failed."""

    def __init__(self, log: trial_log.TrialLog) -> None:
        self._log = log

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._log.failure is not None


def _arrow_filesystem(url: str) -> tuple[Any, str]:
    """Return a URL as Ray takes it: a file system of Arrow's (None for the local one) and a path.

    Arrow's own S3 client writes objects for folders, which servers that keep real folders refuse.
    """
    if storage.is_local(url):
        return None, url
    shared, path = storage.resolve(url)
    # Retries are left to the client itself here, as our storage layer is not involved. The arguments it was created
    # with hold no credentials: a process that unpickles it finds them where S3 clients look for them.
    return PyFileSystem(FSSpecHandler(type(shared)(skip_instance_cache=True))), path


def _reason(trial: Any) -> str:
    """Shorten Ray's message about a lost worker."""
    text = _error_text(trial)
    # Before it stands a traceback of Ray's own code, or ids.
    start = max(text.rfind("\nray.exceptions."), text.find("The actor is dead"), 0)
    return " ".join(text[start:].split())[:300] or "Ray noted no reason"


def _error_text(trial: Any) -> str:
    try:
        return Path(trial.error_file).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return ""


def _name(trial: Any) -> str:
    return str(trial.config["trial"])


def run_trials(
    options: TuneConfig, log: trial_log.TrialLog, prepared: Study, attempt: int, say: Callable[[str], None]
) -> None:
    """Run the trials that have not ended; the log holds their results.

    Raises:
        TrialError: a trial failed.
        UserError: a node has no physio-dist, or another version.
    """
    if not log.pending:
        return
    asha = FoldwiseASHA(options.tune.max_epochs, log.records()) if options.tune.scheduler == "asha" else None
    callback = _LogCallback(log, asha.last if asha else {}, say)
    filesystem, path = _arrow_filesystem(options.tune.ray_storage)
    results = tune.Tuner(
        _trainable(options, prepared),
        param_space=param_space(options.search),
        tune_config=tune.TuneConfig(
            metric=METRIC, mode="max", scheduler=asha or FIFOScheduler(), search_alg=FoldwiseSearcher(options, log),
            # As many as the searcher suggests.
            num_samples=-1, reuse_actors=True, trial_name_creator=_name, trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=f"{options.run.name}-{attempt}", storage_path=path, storage_filesystem=filesystem, verbose=0,
            callbacks=[callback], stop=_StopOnFailure(log),
            failure_config=tune.FailureConfig(max_failures=MAX_RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()  # fmt: skip
    outcome = "the trials that are done are kept, and the same command goes on with the others"
    if log.failure is not None:
        raise (UserError if callback.unusable_node else TrialError)(f"{log.failure}; {outcome}")
    if log.pending:
        reason = f": {' '.join(str(results.errors[0]).split())[:300]}" if results.errors else ""
        raise TrialError(f"{len(log.pending)} trial(s) did not end{reason}; {outcome}")


def _trainable(options: TuneConfig, prepared: Study) -> Any:
    """Return :class:`FusionTrial` with its resources, and the study in the object store once."""
    cpus = options.tune.cpus
    trainable = tune.with_resources(
        tune.with_parameters(FusionTrial, prepared=prepared, version=__version__, threads=max(1, int(cpus))),
        tune.PlacementGroupFactory([{"CPU": cpus}]),
    )
    # The dashboard would show the name of Ray's wrapper.
    trainable.__qualname__ = FusionTrial.__qualname__
    return trainable
