"""The fusion sweep: ``python -m physio_dist.tune --config FILE [key=value ...]``, also under ``ray job submit``.

Ray Tune places the trials; early stopping is in ``foldwise.py``, what a trial computes in
``downstream/study.py``, what is kept of it in ``sweep.py``.
"""

from __future__ import annotations

import argparse
import logging
import os
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

from physio_dist import cluster, config, exits, storage, sweep
from physio_dist.config import TuneConfig
from physio_dist.downstream import classifier_folder, study
from physio_dist.downstream.backbones import CBRAMOD
from physio_dist.downstream.proposals import STARTUP, need_optuna, plan
from physio_dist.downstream.trials import Study
from physio_dist.errors import EXIT_FAULT, PhysioError
from physio_dist.foldwise import FoldwiseAsha, FoldwiseOptuna, line_of
from physio_dist.gauges import Gauges
from physio_dist.training.lease import Lease, end_process
from physio_dist.training.rundir import CONFIG, RunDir

# Of a trial whose worker was lost. What a trial itself raises is not tried again: it would be raised again.
_TRIES = 3

# What is kept and told of trials is our own, so is Ctrl-C, and a trial's working directory stays as it was.
_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0",
}  # fmt: skip


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

    def setup(self, config: dict[str, Any], study_of_all: Study | None = None) -> None:
        """Called once an actor."""
        assert study_of_all is not None
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

    def __init__(self, ledger: sweep.Ledger, last: dict[str, dict[str, int]], say: Callable[[str], None]) -> None:
        self._ledger, self._last, self._say, self._shown = ledger, last, say, _Shown()
        self._gauges = Gauges(ledger.run.url)
        self._show()

    def _show(self) -> None:
        self._gauges.set(self._ledger.counts())

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ledger.start(_name(trial))
        self._shown.start(trial)
        self._show()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any) -> None:
        if "failure" in result:
            if self._ledger.failure is None:
                print(result["traceback"], file=sys.stderr, flush=True)
            self._ledger.fail(_name(trial), result["failure"])
        elif line := line_of(result):
            self._ledger.epoch(_name(trial), line)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._shown.end(trial)
        self._ledger.end(_name(trial), self._last.get(_name(trial), {}))
        self._show()

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(f"the worker of trial {_name(trial)} is lost; the trial starts again ({_why(trial)})")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ledger.fail(_name(trial), f"its worker was lost {_TRIES + 1} times ({_why(trial)})")


class _OnFailure(_OfDriver, tune.Stopper):  # type: ignore[misc]
    """Ends the sweep when a trial has failed."""

    def __init__(self, ledger: sweep.Ledger) -> None:
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
    try:
        text = Path(trial.error_file).read_text(encoding="utf-8")
    except (OSError, TypeError):
        return "Ray noted no reason"
    # What comes before it is a traceback of Ray's own code, or ids.
    start = max(text.rfind("\nray.exceptions."), text.find("The actor is dead"), 0)
    return " ".join(text[start:].split())[:300]


def _name(trial: Any) -> str:
    return str(trial.config["trial"]["name"])


def search(
    options: TuneConfig, ledger: sweep.Ledger, prepared: Study, attempt: int, say: Callable[[str], None]
) -> None:
    """Run the trials that are left; the ledger holds what they found.

    Raises:
        TrialError: one failed.
    """
    if not ledger.left:
        return
    space: dict[str, Any] = {}
    proposed = FoldwiseOptuna(options, ledger) if options.tune.search == "optuna" else None
    if proposed is None:
        space["trial"] = tune.grid_search([asdict(trial) for trial in ledger.left])
    early = options.tune.scheduler == "asha"
    asha = FoldwiseAsha(options.tune.max_epochs, ledger.records()) if early else None
    filesystem, path = _for_arrow(options.tune.storage)
    # In the object store once; a node's trials share one copy of its arrays.
    trainable = tune.with_parameters(FusionTrial, study_of_all=prepared)
    # The dashboard would name them after a function of Ray's.
    trainable.__qualname__ = FusionTrial.__qualname__
    tuner = tune.Tuner(
        trainable,
        param_space={**space, "cpus": options.tune.cpus},
        tune_config=tune.TuneConfig(
            scheduler=asha or FIFOScheduler(), search_alg=proposed, num_samples=len(ledger.left) if proposed else 1,
            reuse_actors=True, trial_name_creator=_name, trial_dirname_creator=_name,
        ),
        run_config=tune.RunConfig(
            name=f"{options.run.name}-{attempt}", storage_path=path, storage_filesystem=filesystem, verbose=0,
            callbacks=[_Reporter(ledger, asha.last if asha else {}, say)], stop=_OnFailure(ledger),
            failure_config=tune.FailureConfig(max_failures=_TRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )  # fmt: skip
    tuner.fit()
    kept = "the trials that are done are kept, and the same command goes on with the others"
    if ledger.failure is not None:
        raise TrialError(f"{ledger.failure}; {kept}")
    if missing := len(ledger.trials) - len(ledger.ended):
        raise TrialError(f"{missing} trial(s) did not end, Ray has said why if it knows; {kept}")


def run(options: TuneConfig, say: Callable[[str], None]) -> None:
    """Sweep, conclude, write.

    Raises:
        PhysioError: everything that has a documented status.
    """
    need_optuna(options)
    _settle(options)
    directory = RunDir(storage.join(options.run.dir, options.run.name), 0)
    if (results := sweep.finished(directory, options)) is not None:
        _tell(directory, results, say, "finished already")
        return
    if os.environ.get("RAY_ADDRESS"):
        # It is soon known whether it is there; to start one only to refuse the input would be a waste.
        _connect(options, say)
    prepared = study.prepare(options, options.tune.features, say)
    facts = sweep.facts_of(options.tune.data, prepared.about)
    if not ray.is_initialized():
        _connect(options, say)
    held = Lease(directory.url, lambda why: end_process(why, EXIT_FAULT), say)
    try:
        # Another driver may have finished it while this one waited.
        results = sweep.finished(directory, options)
        if results is None:
            results = _sweep(options, directory, prepared, facts, held, say)
    finally:
        held.release()
    _tell(directory, results, say, "done")


def _sweep(
    options: TuneConfig, directory: RunDir, prepared: Study, facts: dict[str, Any], held: Lease,
    say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """All of it that writes to the run's directory."""
    directory.begin(held.attempt)
    sweep.refuse_other_inputs(directory, facts)
    trials = plan(options, [fold.name for fold in prepared.folds])
    ledger = sweep.Ledger(directory, trials, options.tune.max_epochs, say)
    try:
        storage.write_bytes(directory.file(CONFIG), config.to_yaml(options).encode())
        storage.write_json(directory.file(sweep.DATA), facts)
        kept = f", {len(ledger.ended)} of them done in an earlier attempt" if ledger.ended else ""
        each = f"{len(study.SEARCHED)} rows"
        if any(trial.fold for trial in trials):
            each += f" and, beyond the first {STARTUP}, {len(prepared.folds)} folds"
        say(f"{len(trials)} trials: {options.tune.trials} configurations for each of {each}{kept}")
        # Otherwise TensorBoard would not notice trials that begin after it did.
        fresh = "" if storage.is_local(directory.url) else "FSSPEC_S3='{\"use_listings_cache\": false}' "
        say(f"while they run: {fresh}tensorboard --logdir {directory.file(sweep.BOARD)}")
        search(options, ledger, prepared, held.attempt, say)
        say(ledger.standing())
    finally:
        ledger.close()
    outcome = study.conclude(prepared, ledger.records(), say)
    held.check()
    classifier_folder.keep(prepared, ledger.records(), directory.file(classifier_folder.FOLDER), say)
    storage.write_bytes(directory.file(sweep.TRIALS), ledger.lines())
    storage.write_bytes(directory.file(sweep.PREDICTIONS), outcome.predictions)
    if outcome.embedding is not None:
        storage.write_bytes(directory.file(sweep.EMBEDDING), outcome.embedding)
    # Last: with it the sweep is finished.
    storage.write_json(directory.file(sweep.RESULTS), outcome.results)
    return outcome.results


def _connect(options: TuneConfig, say: Callable[[str], None]) -> None:
    os.environ.update(_TUNE)
    # It misses the files of the loggers that are switched off.
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)
    cluster.connect(say, hear_workers=False)
    # Ray puts handlers of its own in their place.
    exits.interrupt_on_sigterm()
    cluster.require(options.tune.cpus, 0.0, 1, 0.0, say)


def _settle(options: TuneConfig) -> None:
    """Make all local paths absolute, so that the next start may be from another folder or inside a job.

    Raises:
        UserError: one is relative inside a Ray job, or ``tune.storage`` cannot be listed.
    """
    chosen, where = options.tune, options.run
    where.dir = cluster.durable(where.dir, "run.dir")
    chosen.data = cluster.durable(chosen.data.removesuffix("/index.json"), "tune.data")
    for name in ("ecg_encoder", "eeg_encoder"):
        value = getattr(chosen, name)
        if isinstance(value, dict):
            value = {fold: _durable(url, name) for fold, url in value.items()}
        else:
            value = _durable(value, name)
        setattr(chosen, name, value)
    chosen.features = cluster.durable(chosen.features or storage.join(where.dir, "features"), "tune.features")
    chosen.storage = cluster.durable(chosen.storage or storage.join(where.dir, options.run.name, "ray"), "tune.storage")
    # Ray opens it with a client of its own, whose messages are of another kind.
    storage.names(chosen.storage)


def _durable(url: str, name: str) -> str:
    return url if url == CBRAMOD else cluster.durable(url, f"tune.{name}")


def _tell(directory: RunDir, results: dict[str, Any], say: Callable[[str], None], how: str) -> None:
    print("\n".join(sweep.table(results)), flush=True)
    say(f"{how}: {directory.file(sweep.RESULTS)}; `physio-dist report {directory.url}` draws the report")


def _say(text: str) -> None:
    print(f"physio-dist: {text}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, then sweep."""
    parser = argparse.ArgumentParser(
        prog="python -m physio_dist.tune", description="Sweep fusion heads over frozen features."
    )
    parser.add_argument("--config", required=True, help="YAML file; the ones that ship are in configs/tune/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that go over the file's")
    given = parser.parse_intermixed_args(arguments)
    exits.interrupt_on_sigterm()
    try:
        run(config.load(TuneConfig, given.config, given.overrides, config.check_tune), _say)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    # Trials unpickle what this module defines, and would look for it in their own `__main__`.
    from physio_dist.tune import main as main_of_module

    status = exits.status_of(main_of_module)
    sys.exit(status)
