"""Record of a sweep: its inputs, its trials, their files and their progress. Independent of Ray."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from physio_dist import storage
from physio_dist.config import FoldEncoders, TuneConfig, refuse_another
from physio_dist.config.loader import OptionsDifferError
from physio_dist.config.task import LEAKY, SHARED_PEOPLE
from physio_dist.data.format.index import ShardSet, open_set
from physio_dist.errors import UserError
from physio_dist.evaluation.backbones import exported_hash
from physio_dist.evaluation.search_space import Trial
from physio_dist.evaluation.trials import SEARCHED, TrialRecord
from physio_dist.runs.run_dir import CONFIG, RunDir
from physio_dist.runs.run_files import DATA as DATA
from physio_dist.runs.run_files import DataFacts, ShardSetFacts
from physio_dist.runs.sweep_results import EMBEDDING as EMBEDDING
from physio_dist.runs.sweep_results import PREDICTIONS as PREDICTIONS
from physio_dist.runs.sweep_results import RESULTS as RESULTS
from physio_dist.runs.sweep_results import TRIALS as TRIALS
from physio_dist.runs.sweep_results import TrialResult
from physio_dist.runs.typed_json import from_json, to_json
from physio_dist.runtime.progress import Progress
from physio_dist.stats.scores import METRICS

BOARD = "tensorboard"
# Options that do not change a sweep's results.
MAY_DIFFER = frozenset(
    [
        "run.dir", "data.cache_dir", "data.cache_gb", "tune.cpus", "tune.placement_timeout_s", "tune.ray_storage",
        "tune.feature_cache",
    ]
)  # fmt: skip
# A run in a bucket is watched from elsewhere while it grows.
_SYNC_S = 15.0
_REPORT_S = 10.0
_FLUSH_S = 1.0


def finished(run: RunDir, options: TuneConfig) -> dict[str, Any] | None:
    """Return the results of this sweep if it is finished.

    Raises:
        UserError: the run's directory holds another sweep, or no sweep at all.
    """
    try:
        refuse_another(run.file(CONFIG), options, MAY_DIFFER)
    except OptionsDifferError as error:
        if "train.steps" in error.options:
            raise UserError(f"{run.url} is a run of pretraining: choose another run.name or run.dir") from None
        raise
    try:
        document = storage.read_json(run.file(RESULTS))
    except storage.NotFoundError:
        return None
    if not isinstance(document, dict) or "rows" not in document:
        raise UserError(f"{run.file(RESULTS)} holds no results of a sweep: choose another run.name")
    refuse_other_inputs(run, _current_facts(options, [str(fold["fold"]) for fold in document.get("folds", ())]))
    return document


def _current_facts(options: TuneConfig, folds: list[str]) -> dict[str, Any]:
    """Collect as much of ``data.json`` as can be known without opening an encoder; None for the rest."""

    def hashes(encoders: FoldEncoders) -> dict[str, str | None] | str | None:
        if encoders.differ:
            return {fold: exported_hash(url) for fold, url in encoders.urls(folds).items()}
        return exported_hash(encoders.url)

    tune = options.tune
    return {
        "indexes": [{"fingerprint": open_set(tune.data).fingerprint}],
        "encoders": {signal: hashes(encoders) for signal, encoders in tune.encoders.items()},
    }


def facts_of(shards: ShardSet, encoders: dict[str, Any]) -> dict[str, Any]:
    """Return ``data.json``: the inputs as the report shows them, and what must not change when a sweep continues.

    Args:
        shards: index of the shard set.
        encoders: ``Study.about``.
    """
    channels = {name: list(info.channels) for name, info in shards.signals.items()}
    index = ShardSetFacts(
        url=shards.url, fingerprint=shards.fingerprint, splits=shards.splits, people=shards.people, rate=shards.rate,
        channels=[name for names in channels.values() for name in names], signals=channels,
        simulated=shards.simulated, sources=list(shards.sources),
    )  # fmt: skip
    facts: dict[str, Any] = to_json(DataFacts([index], encoders))
    return facts


def refuse_other_inputs(run: RunDir, facts: dict[str, Any]) -> None:
    """Refuse to continue a sweep with another shard set or encoder at the same URL.

    Raises:
        UserError: an input has changed since the sweep began.
    """
    try:
        before = storage.read_json(run.file(DATA))
    except storage.NotFoundError:
        return

    def hashes(document: dict[str, Any]) -> dict[str, Any]:
        encoders = {f"tune.encoders.{name}": _sha256(encoder) for name, encoder in document["encoders"].items()}
        return {"tune.data": [index["fingerprint"] for index in document["indexes"]], **encoders}

    old, new = hashes(before), hashes(facts)
    if changed := [name for name in new if new[name] is not None and old.get(name) != new[name]]:
        raise UserError(
            f"what {' and '.join(changed)} leads to has changed since {run.url} was begun: its trials and new ones "
            "would not be of the same kind. Choose another run.name"
        )


def _sha256(encoder: Any) -> Any:
    """Return the hash of an entry of ``encoders`` in ``data.json``; a dict where folds differ, None if unknown."""
    if not isinstance(encoder, dict):
        return encoder
    by_fold = encoder.get("by_fold", encoder if "sha256" not in encoder else None)
    if by_fold is None:
        return encoder["sha256"]
    hashes = {str(fold): _sha256(each) for fold, each in by_fold.items()}
    if None in hashes.values():
        return None
    return next(iter(hashes.values())) if len(set(hashes.values())) == 1 else hashes


def _number(value: Any) -> Any:
    """Return the value, or None for a float that JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def best(history: Iterable[dict[str, Any]]) -> float | None:
    """Return the best mean AUC over folds on validation subjects; None if it is never defined."""
    return max((value for line in history if (value := _number(line.get("val_auc"))) is not None), default=None)


def to_line(record: TrialRecord, max_epochs: int) -> dict[str, Any]:
    """Convert a record to a line of ``trials.jsonl``; :func:`from_line` is the inverse."""
    history, best_auc = record.history, best(record.history)
    names = sorted({name for line in history for name in line} - {"epoch", "val_auc"})
    document: dict[str, Any] = to_json(
        TrialResult(
            trial=record.trial, row=record.row, config=record.config,
            val_auc=math.nan if best_auc is None else best_auc, epochs=len(history), stopped=len(history) < max_epochs,
            seconds=record.seconds, history=[(line["epoch"], line["val_auc"]) for line in history],
            folds={name: [line.get(name, math.nan) for line in history] for name in names}, last=record.last,
        )
    )  # fmt: skip
    return document


def from_line(document: Any) -> TrialRecord:
    """Convert a line of ``trials.jsonl`` to a record.

    Raises:
        UserError: the line is damaged.
    """
    line = from_json(TrialResult, document, TRIALS)
    history = [
        {"epoch": epoch, "val_auc": auc, **{name: values[index] for name, values in line.folds.items()}}
        for index, (epoch, auc) in enumerate(line.history)
    ]
    return TrialRecord(line.trial, line.row, line.config, history, line.last, line.seconds)


@dataclass
class _Running:
    record: TrialRecord
    writer: SummaryWriter
    started: float
    flushed: float = field(default_factory=time.monotonic)


class TrialLog:
    """Trials of a sweep in its driver: those that have ended, those that run, and their files.

    ``trials.jsonl`` gets a line when a trial ends; a sweep that was interrupted takes these lines as done. Ray Tune's
    own record cannot serve for that: it is written now and then, so that a driver that is killed would lose trials, and
    it is pickled. TensorBoard's files grow while trials run.

    Args:
        run: the sweep's directory, begun.
        trials: of :func:`physio_dist.evaluation.search_space.plan`.
        max_epochs: epochs of a trial.
        say: receives the progress if standard error is no terminal.

    Attributes:
        ended: trial -> its record.
        failure: message about the first trial that failed, if any.
    """

    def __init__(self, run: RunDir, trials: list[Trial], max_epochs: int, say: Callable[[str], None]) -> None:
        self.run, self.trials, self._max_epochs, self._say = run, trials, max_epochs, say
        self.failure: str | None = None
        run.open_lines(TRIALS)
        self._planned = {trial.name: trial for trial in trials}
        self.ended = {record.trial: record for record in self._load()}
        for trial in self.pending:
            self._remove_events(trial.name)
        self._running: dict[str, _Running] = {}
        self._best: dict[str, float] = {}
        for record in self.ended.values():
            for line in record.history:
                self._update_best(record, line)
        self._started = self._reported = self._synced = time.monotonic()
        self._progress = Progress(len(trials), "trials", initial=len(self.ended))

    @property
    def pending(self) -> list[Trial]:
        """Trials that have not ended."""
        return [trial for trial in self.trials if trial.name not in self.ended]

    def _load(self) -> list[TrialRecord]:
        """Read the records of earlier attempts, of trials that are still planned."""
        text = (self.run.spool / TRIALS).read_text(encoding="utf-8")
        records = []
        for line in text.splitlines():
            # A trial whose line is damaged runs again.
            with contextlib.suppress(ValueError, IndexError, UserError):
                records.append(from_line(json.loads(line)))
        return [
            record
            for record in records
            if record.trial in self._planned
            and self._planned[record.trial].config in (record.config, {})
            and record.history
        ]

    def propose(self, name: str, config: dict[str, Any]) -> None:
        """Set the configuration of a trial that was planned without one."""
        self._planned[name] = replace(self._planned[name], config=config)

    def start(self, name: str) -> None:
        """Record that a trial starts, perhaps again after its worker was lost."""
        if name in self._running:
            self._running.pop(name).writer.close()
            self._remove_events(name)
        trial = self._planned[name]
        writer = SummaryWriter(str(self.run.spool / BOARD / name), flush_secs=10)
        self._running[name] = _Running(TrialRecord(name, trial.row, trial.config, []), writer, time.monotonic())

    def _remove_events(self, name: str) -> None:
        """Remove the events of a trial that was cut off, which TensorBoard would draw together with the new ones."""
        storage.remove(self.run.file(BOARD, name), recursive=True)
        shutil.rmtree(self.run.spool / BOARD / name, ignore_errors=True)

    def epoch(self, name: str, line: dict[str, Any]) -> None:
        """Record an epoch of a trial: ``epoch``, ``val_auc`` and ``fold_<name>``."""
        if name not in self._running:
            self.start(name)
        running = self._running[name]
        running.record.history.append(line)
        self._update_best(running.record, line)
        for tag, value in line.items():
            if tag != "epoch" and _number(value) is not None:
                running.writer.add_scalar(tag, value, line["epoch"])
        now = time.monotonic()
        if now - running.flushed > _FLUSH_S:
            running.writer.flush()
            running.flushed = now
        if now - self._synced > _SYNC_S:
            # A storage outage matters when the sweep ends; until then only TensorBoard lags behind.
            with contextlib.suppress(storage.StorageError):
                self.run.sync()
            self._synced = time.monotonic()
        self._report()

    def end(self, name: str, last: dict[str, int]) -> None:
        """Record that a trial has ended without a failure; ``last`` as in :class:`TrialRecord`."""
        running = self._running.pop(name, None)
        if running is None:
            return
        record = running.record
        # After a failure Tune stops the other trials, which are not complete.
        if record.history and self.failure is None:
            record.last, record.seconds = dict(last), round(time.monotonic() - running.started, 3)
            self.run.add_line(TRIALS, to_line(record, self._max_epochs))
            self.ended[name] = record
            self._write_hparams(running)
        running.writer.close()
        self._report()

    def fail(self, name: str, reason: str) -> None:
        """Record that a trial has failed; only the first failure is kept."""
        running = self._running.pop(name, None)
        if running is not None:
            running.writer.close()
        if self.failure is None:
            config = ", ".join(f"{key} {value}" for key, value in self._planned[name].config.items())
            self.failure = f"trial {name} ({config}) failed: {reason}"

    def records(self) -> list[TrialRecord]:
        """Return the records of all trials that have ended, in the order of the plan."""
        return [self.ended[trial.name] for trial in self.trials if trial.name in self.ended]

    def counts(self) -> dict[str, float]:
        """Return the numbers of trials that are planned, have ended, and run."""
        return {"trials": len(self.trials), "trials_done": len(self.ended), "trials_running": len(self._running)}

    def lines(self) -> bytes:
        """Return ``trials.jsonl`` in the order of the plan."""
        return "".join(json.dumps(to_line(record, self._max_epochs)) + "\n" for record in self.records()).encode()

    def close(self) -> None:
        """Close all files and send them to storage."""
        for running in self._running.values():
            running.writer.close()
        self._running.clear()
        self._progress.close()
        self.run.close()

    def _write_hparams(self, running: _Running) -> None:
        """Write what TensorBoard's HParams page lists."""
        record = running.record
        params = {name: value for name, value in record.config.items() if isinstance(value, str | int | float | bool)}
        metric = best(record.history)
        writer: Any = running.writer.file_writer
        for summary in hparams({"row": record.row, **params}, {"val_auc": -1.0 if metric is None else metric}):  # type: ignore[no-untyped-call]
            writer.add_summary(summary)

    def _update_best(self, record: TrialRecord, line: dict[str, Any]) -> None:
        # The metric of a trial for a single fold is no mean over folds.
        value = None if self._planned[record.trial].fold else _number(line.get("val_auc"))
        if value is not None:
            self._best[record.row] = max(value, self._best.get(record.row, 0.0))

    def _report(self) -> None:
        if self._progress.is_bar:
            self._progress.report(len(self.ended), self.summary_line())
        elif time.monotonic() - self._reported > _REPORT_S:
            self._reported = time.monotonic()
            elapsed = time.strftime("%H:%M:%S", time.gmtime(self._reported - self._started))
            progress = f"{len(self.ended)} of {len(self.trials)} trials done, {len(self._running)} running"
            self._say(f"{progress}; {self.summary_line()}; {elapsed}")

    def summary_line(self) -> str:
        """Return the best mean validation AUC of each row so far, as text."""
        rows = [f"{row} {self._best[row]:.3f}" for row in SEARCHED if row in self._best]
        return "best validation AUC " + (", ".join(rows) or "not known yet")


def table(results: dict[str, Any]) -> list[str]:
    """Format ``results.json`` as lines of text, metrics over the pooled windows of all held-out subjects."""
    leaky = results["protocol"] == LEAKY
    mark = "LEAKY " if leaky else ""
    names = [row["name"] + " LEAKY" * leaky for row in results["rows"]]
    name_width = max(14, *map(len, names)) + 2
    columns = {"accuracy": 10, "balanced": 10, "macro F1": 10, "ROC-AUC": 10, "95% interval": 16, "PR-AUC": 10}
    subjects = "people" if results["protocol"] in SHARED_PEOPLE else "held-out people"
    lines = ["LEAKY SPLIT: windows of the same people and recordings train and test; no row below holds"] * leaky
    lines += [
        f"{'SIMULATED signals: ' if results.get('simulated') else ''}{results['task']}, {results['protocol']}: "
        f"{results['windows']} windows of {results['people']} {subjects}",
        " " * name_width + "".join(f"{title:>{width}}" for title, width in columns.items()),
    ]
    for name, row in zip(names, results["rows"], strict=True):
        values = {metric: "-" if row.get(metric) is None else f"{row[metric]:.3f}" for metric in METRICS}
        low, high = row.get("auc_ci") or (None, None)
        interval = "-" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        lines.append(
            f"{name:{name_width}}{values['accuracy']:>10}{values['balanced_accuracy']:>10}{values['macro_f1']:>10}"
            f"{values['auc']:>10}{interval:>16}{values['pr_auc']:>10}"
        )
    for difference in results.get("differences", []):
        if difference["auc"] is not None and difference["p"] is not None:
            interval = f"{difference['ci'][0]:+.3f} to {difference['ci'][1]:+.3f}"
            pair = f"{mark}{difference['row']} - {difference['minus']}"
            lines.append(f"{pair}: {difference['auc']:+.3f} ({interval}), p = {difference['p']:.2g}")
    if any(row["name"].startswith("bound_") for row in results["rows"]):
        lines.append("bound_*: the best that the simulator's hidden state allows")
    if paper := results.get("published"):
        lines.append(f"{paper['source']} reports {paper['metric']} {paper['value']:.4f}; unknown: {paper['unknown']}")
    return lines + [f"note: {note}" for note in results.get("notes", [])]
