"""The trials of a fusion sweep as Ray Tune runs them: actors, what the driver hears of them, rounds after losses.

Early stopping is in ``foldwise.py``, what a trial computes in ``downstream/study.py``, what is kept of it in
``sweep.py``.
"""

from __future__ import annotations

import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import tune
from ray.tune.result import RESULT_DUPLICATE
from ray.tune.schedulers import FIFOScheduler

from physio_dist import __version__, storage
from physio_dist.config import TuneConfig
from physio_dist.errors import PhysioError, UserError
from physio_dist.evaluation import study, trial_log
from physio_dist.evaluation.trials import Study
from physio_dist.ray_backend.metrics_export import MetricsExporter
from physio_dist.ray_backend.schedulers import FoldwiseASHA, FoldwiseOptuna, line_of

# Again, of a trial whose worker was lost. What a trial itself raises is not tried again: it would be raised again.
_TRIES = 3
_ABSENT = (
    "a node of the cluster has no physio_dist: install it on every node, or bring it along with `ray job submit "
    "--working-dir . -- python -m physio_dist.tune ...` from a checkout"
)


class TrialError(PhysioError):
    """A trial failed; what the others found is kept."""


class FusionTrial(tune.Trainable):  # type: ignore[misc]
    """One configuration on one kind of input; a step is an epoch on all folds.

    A class and not a function, because its name is what the dashboard shows, and because an actor that serves many
    trials has nothing to wait for between two of them.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> tune.PlacementGroupFactory:
        """What an actor holds."""
        return tune.PlacementGroupFactory([{"CPU": config["cpus"]}])

    def setup(self, config: dict[str, Any], study_of_all: Study | None = None, version: str = "") -> None:
        """Called once an actor."""
        assert study_of_all is not None
        self._unfit = ""
        if version != __version__:
            here = f"physio-dist is {__version__} on node {socket.gethostname()}"
            self._unfit = f"{here} and {version} where the sweep was started"
        torch.set_num_threads(max(1, int(config["cpus"])))
        self._study = study_of_all
        self._begin(config["trial"])

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial of the same actor."""
        self._begin(new_config["trial"])
        return True

    def _begin(self, trial: dict[str, Any]) -> None:
        # It stands in the actor's log, which is where the dashboard tells which trials an actor served.
        print(f"trial {trial['name']}: {trial['config']}", flush=True)
        self._epochs: Iterator[dict[str, float]] = study.train(
            self._study, trial["row"], trial["config"], trial["fold"]
        )

    def step(self) -> dict[str, Any]:
        """One epoch, as the study yields it."""
        if self._unfit:
            return {"failure": self._unfit, "unfit": True, "done": True}
        try:
            line = next(self._epochs, None)
        except Exception as error:
            # Raised here, Ray would take it for a lost worker and try again.
            return {"failure": _told(error), "traceback": traceback.format_exc(), "done": True}
        if line is None:
            return {RESULT_DUPLICATE: True, "done": True}
        return {"line": line}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


class _Shown:
    """Trials in the dashboard: a task for each, of the trial's name, that runs as long as the trial does.

    Actors serve one trial after the other, and Ray names them for good when they start.
    """

    def __init__(self) -> None:
        # Defined in here, so that its process imports nothing of ours.
        class Trials:
            def __init__(self) -> None:
                import asyncio

                self._ended: dict[str, asyncio.Event] = {}
                self._event = asyncio.Event

            async def run(self, name: str, config: dict[str, Any]) -> None:
                await self._ended.setdefault(name, self._event()).wait()

            async def end(self, name: str) -> None:
                self._ended.setdefault(name, self._event()).set()

        Trials.__qualname__ = "Trials"
        self._actor = ray.remote(num_cpus=0, max_concurrency=10_000)(Trials).remote()

    def start(self, trial: Any) -> None:
        self._actor.run.options(name=_name(trial)).remote(_name(trial), trial.config["trial"]["config"])

    def end(self, trial: Any) -> None:
        self._actor.end.remote(_name(trial))


class _OfDriver:
    """Tune pickles what it is given, for a way of going on that is not ours; open files stay out of it."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Reporter(_OfDriver, tune.Callback):  # type: ignore[misc]
    """Hands on to the ledger what Ray tells the driver."""

    def __init__(self, ledger: trial_log.TrialLog, say: Callable[[str], None]) -> None:
        self._ledger, self._say, self._shown = ledger, say, _Shown()
        # Whether a node of the cluster will not do, which no second try mends.
        self.unfit = False
        # Of the scheduler, as :class:`FoldwiseASHA` has it.
        self.last: dict[str, dict[str, int]] = {}
        self._gauges = MetricsExporter(ledger.run.url)
        self._show()

    def _show(self) -> None:
        self._gauges.set(self._ledger.counts())

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ledger.start(_name(trial))
        self._shown.start(trial)
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "failure" in result:
            self.unfit |= result.get("unfit", False)
            if self._ledger.failure is None and "traceback" in result:
                print(result["traceback"], file=sys.stderr, flush=True)
            self._ledger.fail(_name(trial), result["failure"])
        elif line := line_of(result):
            self._ledger.epoch(_name(trial), line)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._shown.end(trial)
        self._ledger.end(_name(trial), self.last.get(_name(trial), {}))
        self._show()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self._absent(trial):
            self._say(f"the worker of trial {_name(trial)} is lost; the trial starts again ({_why(trial)})")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if not self._absent(trial) and trial.run_metadata.num_failures > _TRIES:
            self._ledger.fail(_name(trial), f"its worker was lost again and again ({_why(trial)})")
        # Else it was lost while it took over from another trial: Ray 2.60 tells of that twice, first as something to
        # recover from, then as the end of the trial. It is left over, and comes with the next round.

    def _absent(self, trial: Any) -> bool:
        if "No module named 'physio_dist" not in _noted(trial):
            return False
        self.unfit = True
        self._ledger.fail(_name(trial), _ABSENT)
        return True


class _OnFailure(_OfDriver, tune.Stopper):  # type: ignore[misc]
    """Ends the sweep when a trial has failed."""

    def __init__(self, ledger: trial_log.TrialLog) -> None:
        self._ledger = ledger

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        return self._ledger.failure is not None


def _for_arrow(url: str) -> tuple[Any, str]:
    """A URL as Ray takes it: a file system of Arrow's (None for the local one) and a path.

    Arrow's own S3 client writes objects for folders, which servers that keep real folders refuse.
    """
    if storage.is_local(url):
        return None, url
    shared, path = storage.resolve(url)
    # Ours has its tries counted by our storage; here the client itself has to try again. What it was made with carries
    # no credentials: whoever unpickles it finds its own, where S3 clients look for them.
    return PyFileSystem(FSSpecHandler(type(shared)(skip_instance_cache=True))), path


def _why(trial: Any) -> str:
    """What Ray noted of a lost worker, shortened."""
    text = _noted(trial)
    # What comes before it is a traceback of Ray's own code, or ids.
    start = max(text.rfind("\nray.exceptions."), text.find("The actor is dead"), 0)
    return " ".join(text[start:].split())[:300] or "Ray noted no reason"


def _noted(trial: Any) -> str:
    try:
        return Path(trial.error_file).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return ""


def _name(trial: Any) -> str:
    return str(trial.config["trial"]["name"])


def search(
    options: TuneConfig, ledger: trial_log.TrialLog, prepared: Study, attempt: int, say: Callable[[str], None]
) -> None:
    """Run the trials that are left; the ledger holds what they found.

    Raises:
        TrialError: one failed.
        UserError: a node has no physio-dist, or another one.
    """
    if not ledger.left:
        return
    # In the object store once; a node's trials share one copy of its arrays.
    trainable = tune.with_parameters(FusionTrial, study_of_all=prepared, version=__version__)
    # The dashboard would name them after a function of Ray's.
    trainable.__qualname__ = FusionTrial.__qualname__
    reporter = _Reporter(ledger, say)
    for number in range(_TRIES + 1):
        if ledger.left and ledger.failure is None:
            again = f".{number}" if number else ""
            _round(options, ledger, trainable, reporter, f"{options.run.name}-{attempt}{again}")
    kept = "the trials that are done are kept, and the same command goes on with the others"
    if ledger.failure is not None:
        raise (UserError if reporter.unfit else TrialError)(f"{ledger.failure}; {kept}")
    if ledger.left:
        raise TrialError(f"{len(ledger.left)} trial(s) did not end, Ray has said why if it knows; {kept}")


def _round(options: TuneConfig, ledger: trial_log.TrialLog, trainable: Any, reporter: _Reporter, name: str) -> None:
    """One of Ray's own searches, over all that is left."""
    space: dict[str, Any] = {}
    proposed = FoldwiseOptuna(options, ledger) if options.tune.search == "optuna" else None
    if proposed is None:
        space["trial"] = tune.grid_search([asdict(trial) for trial in ledger.left])
    asha = FoldwiseASHA(options.tune.max_epochs, ledger.records()) if options.tune.scheduler == "asha" else None
    reporter.last = asha.last if asha else {}
    filesystem, path = _for_arrow(options.tune.ray_storage)
    tune.Tuner(
        trainable,
        param_space={**space, "cpus": options.tune.cpus},
        tune_config=tune.TuneConfig(
            scheduler=asha or FIFOScheduler(), search_alg=proposed, num_samples=len(ledger.left) if proposed else 1,
            reuse_actors=True, trial_name_creator=_name, trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=name, storage_path=path, storage_filesystem=filesystem, verbose=0,
            callbacks=[reporter], stop=_OnFailure(ledger),
            failure_config=tune.FailureConfig(max_failures=_TRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    ).fit()  # fmt: skip
