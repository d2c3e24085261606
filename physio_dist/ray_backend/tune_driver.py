"""The fusion sweep: ``python -m physio_dist.tune --config FILE [key=value ...]``, also under ``ray job submit``.

The trials are in ``search.py``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import ray

from physio_dist import config, storage
from physio_dist.config import TuneConfig
from physio_dist.config.loader import Parser
from physio_dist.errors import EXIT_FAULT
from physio_dist.evaluation import study, trial_log
from physio_dist.evaluation.search_space import STARTUP, need_optuna, plan
from physio_dist.evaluation.serving import classifier_files
from physio_dist.evaluation.trials import Study
from physio_dist.models.cbramod import CBRAMOD
from physio_dist.ray_backend import cluster
from physio_dist.ray_backend.tune_trials import search
from physio_dist.runs import job_paths
from physio_dist.runs.lease import Lease, end_process, wait_for_its_end
from physio_dist.runs.run_dir import CONFIG, RunDir
from physio_dist.runtime import exit_status
from physio_dist.runtime.processes import cores

# What is kept and told of trials is our own, so is Ctrl-C, and a trial's working directory stays as it was.
_TUNE = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0",
}  # fmt: skip


def run(options: TuneConfig, say: Callable[[str], None]) -> None:
    """Sweep, conclude, write.

    Raises:
        PhysioError: everything that has a documented status.
    """
    need_optuna(options)
    _settle(options)
    directory = RunDir(storage.join(options.run.dir, options.run.name), 0)
    # Before features are computed, which may take long.
    wait_for_its_end(directory.url, say)
    if (results := trial_log.finished(directory, options)) is not None:
        _tell(directory, results, say, "finished already")
        return
    if os.environ.get("RAY_ADDRESS") or options.tune.cpus > cores():
        # Whether it is there and large enough is soon known; to start one only to refuse the input would be a waste.
        _connect(options, say)
    prepared = study.prepare(options, options.tune.feature_cache, say)
    facts = trial_log.facts_of(options.tune.data, prepared.about)
    if not ray.is_initialized():
        _connect(options, say)
    held = Lease(directory.url, lambda why: end_process(why, EXIT_FAULT), say)
    try:
        # Another driver may have finished it while this one waited.
        results = trial_log.finished(directory, options)
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
    trial_log.refuse_other_inputs(directory, facts)
    trials = plan(options, [fold.name for fold in prepared.folds])
    ledger = trial_log.TrialLog(directory, trials, options.tune.max_epochs, say)
    try:
        storage.write_bytes(directory.file(CONFIG), config.to_yaml(options).encode())
        storage.write_json(directory.file(trial_log.DATA), facts)
        kept = f", {len(ledger.ended)} of them done in an earlier attempt" if ledger.ended else ""
        each = f"{len(study.SEARCHED)} rows"
        if any(trial.fold for trial in trials):
            each += f" and, beyond the first {STARTUP}, {len(prepared.folds)} folds"
        say(f"{len(trials)} trials: {options.tune.trials} configurations for each of {each}{kept}")
        # Otherwise TensorBoard would not notice trials that begin after it did.
        fresh = "" if storage.is_local(directory.url) else "FSSPEC_S3='{\"use_listings_cache\": false}' "
        say(f"while they run: {fresh}tensorboard --logdir {directory.file(trial_log.BOARD)}")
        search(options, ledger, prepared, held.attempt, say)
        say(ledger.summary_line())
    finally:
        ledger.close()
    outcome = study.conclude(prepared, ledger.records(), say)
    held.check()
    classifier_files.save_classifier(prepared, ledger.records(), directory.file(classifier_files.FOLDER), say)
    storage.write_bytes(directory.file(trial_log.TRIALS), ledger.lines())
    storage.write_bytes(directory.file(trial_log.PREDICTIONS), outcome.predictions)
    if outcome.embedding is not None:
        storage.write_bytes(directory.file(trial_log.EMBEDDING), outcome.embedding)
    # Last: with it the sweep is finished.
    storage.write_json(directory.file(trial_log.RESULTS), outcome.results)
    return outcome.results


def _connect(options: TuneConfig, say: Callable[[str], None]) -> None:
    os.environ.update(_TUNE)
    # It misses the files of the loggers that are switched off.
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)
    # It lists trials that did not end, which is told better or does not matter.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    cluster.connect(say, hear_workers=False)
    # Ray puts handlers of its own in their place.
    exit_status.interrupt_on_sigterm()
    cluster.require_resources(
        options.tune.cpus, 0.0, 1, options.tune.placement_timeout_s, say, "tune.placement_timeout_s"
    )


def _settle(options: TuneConfig) -> None:
    """Make all local paths absolute, so that the next start may be from another folder or inside a job.

    Raises:
        UserError: one is relative inside a Ray job, or ``tune.ray_storage`` cannot be listed.
    """
    chosen, where = options.tune, options.run
    where.dir = job_paths.resolve_durable(where.dir, "run.dir")
    chosen.data = job_paths.resolve_durable(chosen.data.removesuffix("/index.json"), "tune.data")
    chosen.encoders = {
        signal: encoders.map(functools.partial(_durable, name=f"encoders.{signal}"))
        for signal, encoders in chosen.encoders.items()
    }
    chosen.feature_cache = job_paths.resolve_durable(
        chosen.feature_cache or storage.join(where.dir, "features"), "tune.feature_cache"
    )
    ray_storage = chosen.ray_storage or storage.join(where.dir, options.run.name, "ray")
    chosen.ray_storage = job_paths.resolve_durable(ray_storage, "tune.ray_storage")
    # Ray opens it with a client of its own, whose messages are of another kind.
    storage.names(chosen.ray_storage)


def _durable(url: str, name: str) -> str:
    return url if url == CBRAMOD else job_paths.resolve_durable(url, f"tune.{name}")


def _tell(directory: RunDir, results: dict[str, Any], say: Callable[[str], None], how: str) -> None:
    print("\n".join(trial_log.table(results)), flush=True)
    say(f"{how}: {directory.file(trial_log.RESULTS)}; `physio-dist report {directory.url}` draws the report")


def _say(text: str) -> None:
    print(f"physio-dist: {text}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Read the options, then sweep."""
    parser = Parser(prog="python -m physio_dist.tune", description="Sweep fusion heads over frozen features.")
    parser.add_argument("--config", required=True, help="YAML file; the ones that ship are in configs/tune/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that go over the file's")
    given = parser.parse_intermixed_args(arguments)
    exit_status.interrupt_on_sigterm()
    try:
        run(config.load(TuneConfig, given.config, given.overrides), _say)
    finally:
        ray.shutdown()
