"""Driver of a fusion sweep (``python -m physio_dist.tune``), also under ``ray job submit``.

Ray Tune runs the trials (``tune_trials.py``); before and after them this process prepares features and evaluates.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray

from physio_dist import config, storage
from physio_dist.config import TuneConfig
from physio_dist.config.loader import Parser, load_command_line
from physio_dist.config.options import map_urls
from physio_dist.data.handle import ShardSetHandle, open_handle
from physio_dist.errors import EXIT_FAULT
from physio_dist.evaluation import study, trial_log
from physio_dist.evaluation.search_space import STARTUP, need_optuna, plan
from physio_dist.evaluation.serving import classifier_files
from physio_dist.evaluation.trials import SEARCHED, Study
from physio_dist.models.cbramod import CBRAMOD
from physio_dist.ray_backend import cluster
from physio_dist.ray_backend.tune_trials import run_trials
from physio_dist.runs import job_paths
from physio_dist.runs.lease import Lease, end_process, wait_until_free
from physio_dist.runs.run_dir import CONFIG, RunDir
from physio_dist.runtime import exit_status
from physio_dist.runtime.processes import cores

_TUNE_ENV = {
    # The trial log writes TensorBoard's files where the run is, and errors and Ctrl-C are handled here.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "TUNE_DISABLE_SIGINT_HANDLER": "1", "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0", "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # With a custom searcher Tune would start one actor after the other.
    "TUNE_MAX_PENDING_TRIALS_PG": "16",
}  # fmt: skip
# An epoch takes some 30 ms. Without a scheduler that decides on each, results are sent twice a second.
_BUFFER_ENV = {
    "TUNE_RESULT_BUFFER_LENGTH": "1000", "TUNE_RESULT_BUFFER_MIN_TIME_S": "0.5", "TUNE_RESULT_BUFFER_MAX_TIME_S": "0.5",
}  # fmt: skip


def run(options: TuneConfig, say: Callable[[str], None]) -> None:
    """Prepare the study, run its trials, evaluate and write the results.

    Raises:
        PhysioError: everything that has a documented status.
    """
    need_optuna(options)
    options = _resolve_paths(options)
    directory = RunDir(storage.join(options.run.dir, options.run.name), 0)
    # Before features are computed, which may take long.
    wait_until_free(directory.url, say)
    if (results := trial_log.finished(directory, options)) is not None:
        _print_results(directory, results, say, "finished already")
        return
    if os.environ.get("RAY_ADDRESS") or options.tune.cpus > cores():
        # A missing or small cluster is soon noticed; starting one here only to refuse the input would be a waste.
        _connect(options, say)
    data = open_handle(options.tune.data, options.data)
    prepared = study.prepare(options, data, options.tune.feature_cache, say)
    facts = trial_log.facts_of(data.index, prepared.about)
    if not ray.is_initialized():
        _connect(options, say)
    lease = Lease(directory.url, lambda why: end_process(why, EXIT_FAULT), say)
    try:
        # Another driver may have finished it while this one waited.
        results = trial_log.finished(directory, options)
        if results is None:
            results = _sweep(options, directory, prepared, data, facts, lease, say)
    finally:
        lease.release()
    _print_results(directory, results, say, "done")


def _sweep(
    options: TuneConfig, directory: RunDir, prepared: Study, data: ShardSetHandle, facts: dict[str, Any],
    lease: Lease, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Run everything that writes to the run's directory."""
    directory.begin(lease.attempt)
    trial_log.refuse_other_inputs(directory, facts)
    trials = plan(options, [fold.name for fold in prepared.folds])
    log = trial_log.TrialLog(directory, trials, options.tune.max_epochs, say)
    try:
        storage.write_bytes(directory.file(CONFIG), config.to_yaml(options).encode())
        storage.write_json(directory.file(trial_log.DATA), facts)
        earlier = f", {len(log.ended)} of them done in an earlier attempt" if log.ended else ""
        each = f"{len(SEARCHED)} rows"
        if any(trial.fold for trial in trials):
            each += f" and, beyond the first {STARTUP}, {len(prepared.folds)} folds"
        say(f"{len(trials)} trials: {options.tune.trials} configurations for each of {each}{earlier}")
        # Otherwise TensorBoard would not notice trials that start after it did.
        no_cache = "" if storage.is_local(directory.url) else "FSSPEC_S3='{\"use_listings_cache\": false}' "
        say(f"while they run: {no_cache}tensorboard --logdir {directory.file(trial_log.BOARD)}")
        run_trials(options, log, prepared, lease.attempt, say)
        say(log.summary_line())
    finally:
        log.close()
    outcome = study.conclude(prepared, log.records(), say, data)
    lease.check()
    classifier_files.save_classifier(
        prepared, log.records(), outcome.fused, data.index, directory.file(classifier_files.FOLDER), say
    )
    storage.write_bytes(directory.file(trial_log.TRIALS), log.lines())
    storage.write_bytes(directory.file(trial_log.PREDICTIONS), outcome.predictions)
    if outcome.embedding is not None:
        storage.write_bytes(directory.file(trial_log.EMBEDDING), outcome.embedding)
    # Last, because its presence marks the sweep as finished.
    storage.write_json(directory.file(trial_log.RESULTS), outcome.results)
    return outcome.results


def _connect(options: TuneConfig, say: Callable[[str], None]) -> None:
    os.environ.update(_TUNE_ENV if options.tune.scheduler == "asha" else _TUNE_ENV | _BUFFER_ENV)
    # It warns that the files of the disabled loggers are missing.
    logging.getLogger("ray.tune.analysis").setLevel(logging.ERROR)
    # It lists trials that did not end, which run_trials reports.
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)
    cluster.connect(say, hear_workers=False)
    # Ray has replaced the handlers.
    exit_status.interrupt_on_sigterm()
    cluster.require_resources(
        options.tune.cpus, 0.0, 1, options.tune.placement_timeout_s, say, "tune.placement_timeout_s"
    )


def _resolve_paths(options: TuneConfig) -> TuneConfig:
    """Make all local paths absolute: the next attempt may start in another folder or inside a job.

    Raises:
        UserError: one is relative inside a Ray job, or ``tune.ray_storage`` cannot be listed.
    """
    tune, run = options.tune, options.run
    tune = replace(
        tune,
        data=tune.data.removesuffix("/index.json"),
        feature_cache=tune.feature_cache or storage.join(run.dir, "features"),
        ray_storage=tune.ray_storage or storage.join(run.dir, run.name, "ray"),
    )
    options = map_urls(replace(options, tune=tune), _resolve)
    # Ray opens it with a client of its own, whose messages are less clear.
    storage.names(options.tune.ray_storage)
    return options


def _resolve(url: str, name: str) -> str:
    return url if url == CBRAMOD else job_paths.resolve_durable(url, name)


def _print_results(directory: RunDir, results: dict[str, Any], say: Callable[[str], None], how: str) -> None:
    print("\n".join(trial_log.table(results)), flush=True)
    say(f"{how}: {directory.file(trial_log.RESULTS)}; `physio-dist report {directory.url}` draws the report")


def _say(text: str) -> None:
    print(f"physio-dist: {text}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Read the options and run the sweep."""
    parser = Parser(
        TuneConfig, prog="python -m physio_dist.tune", description="Sweep fusion heads over frozen features."
    )
    exit_status.interrupt_on_sigterm()
    try:
        run(load_command_line(parser, TuneConfig, arguments), _say)
    finally:
        ray.shutdown()
