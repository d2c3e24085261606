"""What a sweep tries, knows and keeps: its trials, their files, their progress. No Ray here."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

from physio_dist import storage
from physio_dist.config import FoldEncoders, TuneConfig, refuse_another
from physio_dist.config.task import LEAKY, SHARED_PEOPLE
from physio_dist.data.format.index import open_set
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
from physio_dist.stats.scores import METRICS

BOARD = "tensorboard"
# They say where and how fast a sweep runs, not what it finds.
MAY_DIFFER = frozenset(["run.dir", "tune.cpus", "tune.placement_timeout_s", "tune.ray_storage", "tune.feature_cache"])
# A run in a bucket is looked at from elsewhere while it grows.
_SEND_S = 15.0
_TELL_S = 10.0
_FLUSH_S = 1.0
_FACTS = ("trial", "row", "config", "seconds", "last", "folds")


def finished(run: RunDir, options: TuneConfig) -> dict[str, Any] | None:
    """The results of this very sweep, if it is finished.

    Raises:
        UserError: the run's directory holds another sweep, or no sweep at all.
    """
    try:
        refuse_another(run.file(CONFIG), options, MAY_DIFFER)
    except UserError as error:
        if "train.steps" in str(error):
            raise UserError(f"{run.url} is a run of pretraining: choose another run.name or run.dir") from None
        raise
    try:
        document = storage.read_json(run.file(RESULTS))
    except storage.NotFoundError:
        return None
    if not isinstance(document, dict) or "rows" not in document:
        raise UserError(f"{run.file(RESULTS)} holds no results of a sweep: choose another run.name")
    refuse_other_inputs(run, _facts_now(options, [str(fold["fold"]) for fold in document.get("folds", ())]))
    return document


def _facts_now(options: TuneConfig, folds: list[str]) -> dict[str, Any]:
    """As much of ``data.json`` as can be told without opening an encoder; None where it cannot."""

    def hashes(encoders: FoldEncoders) -> dict[str, str | None] | str | None:
        if encoders.differ:
            return {fold: exported_hash(url) for fold, url in encoders.urls(folds).items()}
        return exported_hash(encoders.url)

    tune = options.tune
    return {
        "indexes": [{"fingerprint": open_set(tune.data).fingerprint}],
        "encoders": {signal: hashes(encoders) for signal, encoders in tune.encoders.items()},
    }


def facts_of(data: str, encoders: dict[str, Any]) -> dict[str, Any]:
    """``data.json``: facts of the inputs for the report, which must be the same when a sweep goes on.

    Args:
        data: URL of the shard set.
        encoders: what the study knows of them.
    """
    shards = open_set(data)
    channels = {name: list(info.channels) for name, info in shards.signals.items()}
    index = ShardSetFacts(
        url=shards.url, fingerprint=shards.fingerprint, splits=shards.splits, people=shards.people, rate=shards.rate,
        channels=[name for names in channels.values() for name in names], signals=channels,
        simulated=shards.simulated, sources=list(shards.sources),
    )  # fmt: skip
    facts: dict[str, Any] = to_json(DataFacts([index], encoders))
    return facts


def refuse_other_inputs(run: RunDir, facts: dict[str, Any]) -> None:
    """Keep trials of one shard set or encoder from being continued with another at the same URL.

    Raises:
        UserError: an input is not what it was when the sweep that is there began.
    """
    try:
        there = storage.read_json(run.file(DATA))
    except storage.NotFoundError:
        return

    def hashes(document: dict[str, Any]) -> dict[str, Any]:
        prints = [one["fingerprint"] for one in document["indexes"]]
        return {"tune.data": prints, **{f"tune.encoders.{name}": _sha(of) for name, of in document["encoders"].items()}}

    old, new = hashes(there), hashes(facts)
    if changed := [name for name in new if new[name] is not None and old.get(name) != new[name]]:
        raise UserError(
            f"what {' and '.join(changed)} leads to has changed since {run.url} was begun: its trials and new ones "
            "would not be of the same kind. Choose another run.name"
        )


def _sha(of: Any) -> Any:
    """Hash of an encoder, or of each fold's where they differ, out of what is told of it; None where it is not."""
    if not isinstance(of, dict):
        return of
    each = of.get("by_fold", of if "sha256" not in of else None)
    if each is None:
        return of["sha256"]
    found = {str(fold): _sha(one) for fold, one in each.items()}
    if None in found.values():
        return None
    return next(iter(found.values())) if len(set(found.values())) == 1 else found


def _number(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def best(history: Iterable[dict[str, Any]]) -> float | None:
    """The best mean over folds of the AUC on validation people; None where it is never defined."""
    found = [line["val_auc"] for line in history if line.get("val_auc") is not None and math.isfinite(line["val_auc"])]
    return max(found, default=None)


def to_line(record: TrialRecord, max_epochs: int) -> dict[str, Any]:
    """A record as a line of ``trials.jsonl``; :func:`from_line` is its inverse."""
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
    """A line of ``trials.jsonl`` as a record; ``UserError`` where it is damaged."""
    line = from_json(TrialResult, document, TRIALS)
    history = [
        {"epoch": epoch, "val_auc": auc, **{name: values[index] for name, values in line.folds.items()}}
        for index, (epoch, auc) in enumerate(line.history)
    ]
    return TrialRecord(line.trial, line.row, line.config, history, line.last, line.seconds)


@dataclass
class _Running:
    record: TrialRecord
    board: SummaryWriter
    began: float
    flushed: float = field(default_factory=time.monotonic)


class TrialLog:
    """The trials of a sweep in its driver: what has ended, what runs, and the files that tell of both.

    ``trials.jsonl`` grows by a line when a trial ends; a sweep that was interrupted takes those lines as done.
    TensorBoard's files grow while trials run.

    Args:
        run: the sweep's directory, begun.
        trials: of :func:`physio_dist.evaluation.search_space.plan`.
        max_epochs: of a trial.
        say: told about the progress where there is no terminal to draw a bar on.
    """

    def __init__(self, run: RunDir, trials: list[Trial], max_epochs: int, say: Callable[[str], None]) -> None:
        self.run, self.trials, self._max_epochs, self._say = run, trials, max_epochs, say
        self.failure: str | None = None
        run.open_lines(TRIALS)
        self.ended = {record.trial: record for record in self._kept()}
        for trial in self.left:
            self._forget_events(trial.name)
        self._running: dict[str, _Running] = {}
        self._planned = {trial.name: trial for trial in trials}
        self._began = self._told = self._sent = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=len(trials), initial=len(self.ended), unit="trial", dynamic_ncols=True)

    @property
    def left(self) -> list[Trial]:
        """The trials that have not ended."""
        return [trial for trial in self.trials if trial.name not in self.ended]

    def _kept(self) -> list[TrialRecord]:
        """What an earlier attempt of this sweep has left: lines of trials that are still to be tried."""
        planned = {trial.name: trial for trial in self.trials}
        text = (self.run.spool / TRIALS).read_text(encoding="utf-8")
        records = []
        for line in text.splitlines():
            # A line that is damaged is of a trial that runs again.
            with contextlib.suppress(ValueError, IndexError, UserError):
                records.append(from_line(json.loads(line)))
        return [
            record
            for record in records
            if record.trial in planned and planned[record.trial].config in (record.config, {}) and record.history
        ]

    def propose(self, name: str, config: dict[str, Any]) -> None:
        """The configuration of a trial is known now."""
        self._planned[name] = replace(self._planned[name], config=config)

    def start(self, name: str) -> None:
        """A trial starts, perhaps again after its worker was lost."""
        if name in self._running:
            self._running.pop(name).board.close()
            self._forget_events(name)
        trial = self._planned[name]
        board = SummaryWriter(str(self.run.spool / BOARD / name), flush_secs=10)
        self._running[name] = _Running(TrialRecord(name, trial.row, trial.config, []), board, time.monotonic())

    def _forget_events(self, name: str) -> None:
        """Events of a trial that was cut off would be drawn together with those of its second try."""
        storage.remove(self.run.file(BOARD, name), recursive=True)
        shutil.rmtree(self.run.spool / BOARD / name, ignore_errors=True)

    def epoch(self, name: str, line: dict[str, Any]) -> None:
        """A trial has finished an epoch and yielded ``line``."""
        if name not in self._running:
            self.start(name)
        running = self._running[name]
        running.record.history.append(line)
        for tag, value in line.items():
            if tag != "epoch" and _number(value) is not None:
                running.board.add_scalar(tag, value, line["epoch"])
        now = time.monotonic()
        if now - running.flushed > _FLUSH_S:
            running.board.flush()
            running.flushed = now
        if now - self._sent > _SEND_S:
            # An outage of storage matters when the sweep ends; until then only TensorBoard lags behind.
            with contextlib.suppress(storage.StorageError):
                self.run.sync()
            self._sent = time.monotonic()
        self._show()

    def end(self, name: str, last: dict[str, int]) -> None:
        """A trial has ended well; ``last`` as in :class:`TrialRecord`."""
        running = self._running.pop(name, None)
        if running is None or not running.record.history or self.failure is not None:
            # After a failure trials end because they are told to.
            if running is not None:
                running.board.close()
            return
        record = running.record
        record.last, record.seconds = dict(last), round(time.monotonic() - running.began, 3)
        self.run.add_line(TRIALS, to_line(record, self._max_epochs))
        self.ended[name] = record
        self._hparams(running)
        running.board.close()
        if self._bar is not None:
            self._bar.update(1)
        self._show()

    def fail(self, name: str, why: str) -> None:
        """A trial has failed; the first failure is the one that is told."""
        running = self._running.pop(name, None)
        if running is not None:
            running.board.close()
        if self.failure is None:
            config = ", ".join(f"{key} {value}" for key, value in self._planned[name].config.items())
            self.failure = f"trial {name} ({config}) failed: {why}"

    def records(self) -> list[TrialRecord]:
        """Of all trials that have ended, in the order of the plan."""
        return [self.ended[trial.name] for trial in self.trials if trial.name in self.ended]

    def counts(self) -> dict[str, float]:
        """How many trials there are, have ended, are at work."""
        return {"trials": len(self.trials), "trials_done": len(self.ended), "trials_running": len(self._running)}

    def lines(self) -> bytes:
        """``trials.jsonl`` in the order of the plan."""
        lines = [json.dumps(to_line(record, self._max_epochs)) + "\n" for record in self.records()]
        return "".join(lines).encode()

    def close(self) -> None:
        """Close all files and send what has to be sent."""
        for running in self._running.values():
            running.board.close()
        self._running.clear()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self.run.close()

    def _hparams(self, running: _Running) -> None:
        """What TensorBoard's HParams page lists."""
        record = running.record
        known = {name: value for name, value in record.config.items() if isinstance(value, str | int | float | bool)}
        metric = best(record.history)
        write: Any = running.board.file_writer
        for summary in hparams({"row": record.row, **known}, {"val_auc": -1.0 if metric is None else metric}):  # type: ignore[no-untyped-call]
            write.add_summary(summary)

    def _show(self) -> None:
        text = self.summary_line()
        if self._bar is not None:
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._told > _TELL_S:
            self._told = time.monotonic()
            elapsed = time.strftime("%H:%M:%S", time.gmtime(self._told - self._began))
            self._say(
                f"{len(self.ended)} of {len(self.trials)} trials done, {len(self._running)} running; {text}; {elapsed}"
            )

    def summary_line(self) -> str:
        """Best AUC on validation people so far, a row."""
        found: dict[str, float] = {}
        running = [trial.record for trial in self._running.values()]
        for record in [*self.ended.values(), *running]:
            # Of a single fold it is no mean over folds.
            value = None if self._planned[record.trial].fold else best(record.history)
            if value is not None:
                found[record.row] = max(value, found.get(record.row, 0.0))
        rows = [f"{row} {found[row]:.3f}" for row in SEARCHED if row in found]
        return "best validation AUC " + (", ".join(rows) or "not known yet")


def table(results: dict[str, Any]) -> list[str]:
    """The rows of ``results.json`` as lines of text, metrics over the pooled windows of all held-out people."""
    simulated = "SIMULATED signals: " if results.get("simulated") else ""
    leaky = results["protocol"] == LEAKY
    names = [row["name"] + " LEAKY" * leaky for row in results["rows"]]
    wide = max(14, *map(len, names)) + 2
    titles = {"accuracy": 10, "balanced": 10, "macro F1": 10, "ROC-AUC": 10, "95% interval": 16, "PR-AUC": 10}
    head = " " * wide + "".join(f"{title:>{room}}" for title, room in titles.items())
    who = "people" if results["protocol"] in SHARED_PEOPLE else "held-out people"
    lines = [
        f"{simulated}{results['task']}, {results['protocol']}: {results['windows']} windows of "
        f"{results['people']} {who}",
        head,
    ]
    if leaky:
        lines.insert(0, "LEAKY SPLIT: windows of the same people and recordings train and test; no row below holds")
    for name, row in zip(names, results["rows"], strict=True):
        values = {one: "-" if row.get(one) is None else f"{row[one]:.3f}" for one in METRICS}
        span = row.get("auc_ci")
        known = span is not None and None not in span
        interval = f"{span[0]:.3f} to {span[1]:.3f}" if known and span is not None else "-"
        lines.append(
            f"{name:{wide}}{values['accuracy']:>10}{values['balanced_accuracy']:>10}{values['macro_f1']:>10}"
            f"{values['auc']:>10}{interval:>16}{values['pr_auc']:>10}"
        )
    for one in results.get("differences", []):
        if one["auc"] is not None and one["p"] is not None:
            interval = f"{one['ci'][0]:+.3f} to {one['ci'][1]:+.3f}"
            what = f"{'LEAKY ' * leaky}{one['row']} - {one['minus']}"
            lines.append(f"{what}: {one['auc']:+.3f} ({interval}), p = {one['p']:.2g}")
    if any(row["name"].startswith("bound_") for row in results["rows"]):
        lines.append("bound_*: the best that the simulator's hidden state allows")
    if paper := results.get("published"):
        lines.append(f"{paper['source']} reports {paper['metric']} {paper['value']:.4f}; unknown: {paper['unknown']}")
    lines += [f"note: {note}" for note in results.get("notes", [])]
    return lines
