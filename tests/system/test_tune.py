"""The fusion sweep on two real nodes, with real recordings and TensorBoard and the dashboard looking on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.numpy import load

from physio_dist import config
from physio_dist.data.convert import converter
from physio_dist.data.format.index import open_set
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.errors import UserError
from physio_dist.evaluation.serving.classifier import FusionClassifier
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, preset
from physio_dist.models.export import save_encoder
from physio_dist.ray_backend import tune_driver
from physio_dist.ray_backend.tune_search import param_space, suggest
from physio_dist.runs import job_paths
from physio_dist.runs.lease import Lease
from physio_dist.signals.readers import read_file
from tests.conftest import S3
from tests.system.clusters import Cluster, ask
from tests.system.launching import BIN, ROOT, end_session, free_port, wait_until

pytestmark = pytest.mark.xdist_group("ray")

PEOPLE = 9
CONFIG = "configs/tune/eegmat.yaml"
ROWS = ["majority", "untrained", "handmade", "ecg", "eeg", "fused"]
METRICS = {"accuracy", "balanced_accuracy", "macro_f1", "auc", "pr_auc"}
# Every trial to its end: then the outcome does not depend on the order in which trials end.
SMALL = ("tune.folds=3", "tune.val_folds=2", "tune.trials=4", "tune.max_epochs=6", "tune.scheduler=fifo")


def converted(raw: Path, out: Path, *words: str) -> str:
    given = config.load(config.ShardConfig, None, ["workers=1", "leads=ECG", *words])
    converter.convert("edf", str(raw), str(out), given)
    return str(out)


def exported(folder: Path, signal_name: str, channels: list[str], people: list[int]) -> str:
    """A tiny untrained encoder as `physio-dist export` would have written it."""
    torch.manual_seed(3)
    about = {"signal": signal_name, "channels": channels, "rate": 200.0, "unit_uv": 100.0, "simulated": False}
    folder.mkdir()
    for name, data in save_encoder(CrissCrossEncoder(preset("tiny")), about).items():
        (folder / name).write_bytes(data)
    (folder / "people.json").write_text(json.dumps([f"{person:016x}" for person in people]))
    return str(folder)


@dataclass(frozen=True)
class Place:
    """Paired recordings of nine people of eegmat and an encoder for each signal, which know none of them."""

    folder: Path
    raw: Path
    data: str
    ecg: str
    eeg: str

    def words(self, *more: str) -> list[str]:
        features = f"tune.feature_cache={self.folder / 'features'}"
        encoders = (f"tune.encoders.ecg={self.ecg}", f"tune.encoders.eeg={self.eeg}")
        return [f"tune.data={self.data}", *encoders, features, *more]


@pytest.fixture(scope="module")
def place(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("paired")
    raw = folder / "raw"
    raw.mkdir()
    table = ["file,subject,task,room"]
    for number in range(PEOPLE):
        for part, task in (("1", "rest"), ("2", "arithmetic")):
            name = f"Subject{number:02d}_{part}.edf"
            shutil.copyfile(data_dir / "eegmat" / name, raw / name)
            table.append(f"{name},Subject{number:02d},{task},quiet")
    (raw / "recordings.csv").write_text("\n".join([*table, ""]))
    data = converted(raw, folder / "set", "signals=ecg,eeg")
    channels = {name: list(info.channels) for name, info in open_set(data).signals.items()}
    ecg, eeg = (exported(folder / name, name, channels[name], [7]) for name in ("ecg", "eeg"))
    return Place(folder, raw, data, ecg, eeg)


@dataclass
class Sweep:
    """A sweep to be started, perhaps several times with the same options."""

    place: Place
    folder: Path
    name: str
    env: dict[str, str]
    options: tuple[str, ...] = SMALL
    run_dir: str = ""
    code: Path = ROOT
    configuration: str = CONFIG
    program: tuple[str, ...] = ("-m", "physio_dist.tune")
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.log = self.folder / f"{self.name}.log"
        self.run_dir = self.run_dir or str(self.folder / "runs")

    @property
    def path(self) -> Path:
        return Path(self.run_dir) / self.name

    def start(self, job: str = "", extra: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Start it by itself, or as a job of the cluster whose dashboard is at ``job``."""
        words = [f"run.dir={self.run_dir}", f"run.name={self.name}", *self.place.words(*self.options), *extra]
        given = self.configuration if job else str(ROOT / self.configuration)
        command = [sys.executable, *self.program, "--config", given, *words]
        if job:
            submit = [str(BIN / "ray"), "job", "submit", "--address", job]
            command = [*submit, "--working-dir", str(self.code), "--", *command]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env={**os.environ, **self.env}, stdout=log, stderr=log,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def __call__(self, job: str = "", extra: tuple[str, ...] = ()) -> int:
        process = self.start(job, extra)
        try:
            return process.wait(timeout=240)
        finally:
            end_session(process)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def told(self) -> list[str]:
        return [line.partition("physio-dist: ")[2] for line in self.said().splitlines() if "physio-dist: " in line]

    def results(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads((self.path / "results.json").read_text())
        return document

    def trials(self) -> list[dict[str, Any]]:
        file = self.path / "trials.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for_trials(self, process: subprocess.Popen[bytes], count: int) -> None:
        wait_until(lambda: len(self.trials()) >= count or process.poll() is not None, f"{count} trials of {self.name}")
        assert process.poll() is None, self.said()


Make = Callable[..., Sweep]


@pytest.fixture()
def sweep(place: Place, ray_nodes: Cluster, tmp_path: Path) -> Make:
    def make(name: str, **given: Any) -> Sweep:
        return Sweep(place, tmp_path, name, dict(ray_nodes.env), **given)

    return make


@pytest.fixture()
def tensorboard(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Starts TensorBoard over a folder that need not be there yet; its URL."""
    running: list[subprocess.Popen[bytes]] = []

    def start(folder: Path) -> str:
        port = free_port()
        words = ["--logdir", str(folder), "--port", str(port), "--host", "127.0.0.1", "--reload_interval", "1"]
        with (tmp_path / "tensorboard.log").open("wb") as log:
            running.append(subprocess.Popen([sys.executable, "-m", "tensorboard.main", *words], stdout=log, stderr=log))
        return f"http://127.0.0.1:{port}"

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def finished(place: Place, ray_nodes: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep that nothing disturbed, with one more trial worth of everything else."""
    run = Sweep(place, tmp_path_factory.mktemp("finished"), "calm", dict(ray_nodes.env))
    assert run() == 0, run.said()
    return run


def test_submitted_sweep_equals_local_one_and_can_be_followed_live(
    sweep: Make, ray_nodes: Cluster, tensorboard: Callable[[Path], str], finished: Sweep
) -> None:
    run = sweep("job")
    board = tensorboard(run.path / "tensorboard")
    wait_until(lambda: ask(f"{board}/data/runs") is not None, "TensorBoard")
    process = run.start(job=ray_nodes.dashboard)
    shown: set[str] = set()
    drawn: dict[str, Any] = {}
    figures: dict[str, float] = {}

    def seen() -> bool:
        figures.update(ray_nodes.figures(str(run.path)))
        if process.poll() is not None:
            return True
        actors = ask(
            f"{ray_nodes.dashboard}/api/v0/actors?detail=1&limit=1000&filter_keys=state"
            "&filter_predicates=%3D&filter_values=ALIVE", ray_nodes.env["RAY_AUTH_TOKEN"]
        )  # fmt: skip
        shown.update(actor["class_name"] for actor in (actors["data"]["result"]["result"] if actors else []))
        drawn.update(ask(f"{board}/data/plugin/scalars/tags") or {})
        return "FusionTrial" in shown and any("val_auc" in tags for tags in drawn.values())

    try:
        wait_until(seen, "actors in the dashboard and a trial in TensorBoard", 180)
        running = process.poll() is None
        assert process.wait(timeout=240) == 0, run.said()
    finally:
        end_session(process)
    # A short sweep's figures may come at its end only, where they stay for some seconds.
    seen()
    assert figures["trials"] == len(run.trials()) and set(figures) == {"trials", "trials_done", "trials_running"}
    assert running, f"it ended before its trials were seen: {shown} {drawn}"
    names = {trial["trial"] for trial in run.trials()}
    assert set(drawn) <= names
    assert {"val_auc", "fold_0", "fold_1", "fold_2"} <= set().union(*drawn.values())
    told = run.told()
    assert told[-1].startswith(f"done: {run.path}/results.json; `physio-dist report {run.path}` draws the report")
    assert f"dashboard: {ray_nodes.dashboard}" in told
    assert f"while they run: tensorboard --logdir {run.path}/tensorboard" in told
    # As a job, on whatever nodes: the same sweep. Where it lies is not part of what it found.
    assert run.results() == finished.results()
    kept = [folder / "predictions.safetensors" for folder in (run.path, finished.path)]
    assert kept[0].read_bytes() == kept[1].read_bytes()


def test_finished_sweep_has_all_files(finished: Sweep, place: Place) -> None:
    assert {file.name for file in finished.path.iterdir()} == {
        "classifier", "config.yaml", "data.json", "embedding.safetensors", "lease.json", "predictions.safetensors",
        "ray", "results.json", "tensorboard", "trials.jsonl",
    }  # fmt: skip
    predictions = load((finished.path / "predictions.safetensors").read_bytes())
    first = int(np.flatnonzero(predictions["fold"] == 0)[0])
    key = predictions["key"][first].tobytes().rstrip(b"\0").decode()
    model = FusionClassifier.load(str(finished.path), fold=0)
    said = [model.predict_recording(read_file(str(file))).probability for file in place.raw.glob("*.edf")]
    window = int(key.rsplit("-", 1)[1])
    mine = np.stack([one[window] for one in said if len(one) > window])
    assert np.abs(mine - predictions["probability.fused"][first]).max(axis=1).min() < 1e-5
    shards = open_set(place.data)
    results = finished.results()
    assert (results["task"], results["protocol"], results["label"]) == ("eegmat", "grouped_kfold", "task")
    assert (results["windows"], results["people"], results["simulated"]) == (shards.nsamples, PEOPLE, False)
    assert [row["name"] for row in results["rows"]] == ROWS
    for row in results["rows"]:
        assert METRICS | {"modalities", "auc_ci", "per_fold", "spread", "confusion"} <= set(row)
        assert all(0 <= row[name] <= 1 for name in METRICS)
        assert [part["fold"] for part in row["per_fold"]] == ["0", "1", "2"]
        assert sum(map(sum, row["confusion"])) == shards.nsamples
    assert json.loads((finished.path / "data.json").read_text())["indexes"][0]["fingerprint"] == shards.fingerprint
    trials = finished.trials()
    assert [trial["trial"] for trial in trials] == [
        f"{row}-{number:03d}" for number in range(4) for row in ("fused", "ecg", "eeg", "untrained")
    ]
    for trial in trials:
        assert {"row", "config", "val_auc", "stopped", "seconds", "history"} <= set(trial)
        assert (trial["epochs"], trial["stopped"], len(trial["history"])) == (6, False, 6)
        assert trial["val_auc"] == max(auc for _, auc in trial["history"])
    kept = load((finished.path / "predictions.safetensors").read_bytes())
    assert len(kept["label"]) == shards.nsamples
    assert set(kept) == {"fold", "person", "recording", "label", "key"} | {f"probability.{name}" for name in ROWS}
    assert {folder.name for folder in (finished.path / "tensorboard").iterdir()} == {t["trial"] for t in trials}
    assert any(line.startswith("fused ") for line in finished.said().splitlines())


def test_finished_sweep_is_not_run_again(finished: Sweep) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished.path.rglob("*")}
    quiet = Sweep(finished.place, finished.folder, finished.name, {"RAY_ADDRESS": "127.0.0.1:1"})
    shutil.move(finished.log, finished.folder / "first.log")
    try:
        # Not even a cluster is needed.
        assert quiet() == 0, quiet.said()
        assert quiet.told() == [
            f"finished already: {finished.path}/results.json; `physio-dist report {finished.path}` draws the report"
        ]
        assert quiet(extra=("tune.max_epochs=7",)) == 2
        assert quiet.told()[1:] == [
            f"wrong input or configuration: {finished.path} was started with another configuration (tune.max_epochs: 6 "
            "there, 7 now). Give the same options to go on, or choose another run.name (exit status 2)"
        ]
    finally:
        shutil.move(finished.folder / "first.log", finished.log)
    assert before == {file: file.stat().st_mtime_ns for file in finished.path.rglob("*")}


def workers(ray_nodes: Cluster) -> list[psutil.Process]:
    return [process for process in ray_nodes.processes() if "FusionTrial" in " ".join(process.cmdline())]


def test_interrupted_sweep_gives_the_same_results(sweep: Make, ray_nodes: Cluster, finished: Sweep) -> None:
    run = sweep("stopped")
    before: list[dict[str, Any]] = []
    # The driver is asked to end, and the last time it is killed.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        done, killed = len(before), number == signal.SIGKILL
        process = run.start()
        try:
            run.wait_for_trials(process, done + 2)
            process.send_signal(number)
            assert process.wait(timeout=60) == (-signal.SIGKILL if killed else 75), run.said()
        finally:
            end_session(process)
        if not killed:
            assert run.told()[-1] == "stopped: interrupted; the same command goes on where it can (exit status 75)"
        assert "Traceback" not in run.said()
        assert not (run.path / "results.json").exists()
        before = run.trials()
        assert done + 2 <= len(before) < 16
        assert json.loads((run.path / "lease.json").read_text())["released"] is not killed
    process = run.start()
    try:
        # And a worker is lost on top of it.
        run.wait_for_trials(process, len(before) + 2)
        workers(ray_nodes)[0].kill()
        assert process.wait(timeout=240) == 0, run.said()
    finally:
        end_session(process)
    plan = f"16 trials: 4 configurations for each of 4 rows, {len(before)} of them done in an earlier attempt"
    assert plan in run.told()
    assert sum(line.startswith("the worker of trial ") for line in run.told()) == 1
    assert run.results() == finished.results()
    after = {trial["trial"]: trial for trial in run.trials()}
    assert all(after[trial["trial"]] == trial for trial in before)


# A worker whose machine loses its power at the moment when it is to take over the next trial.
DYING = """
import os, signal, sys
from physio_dist.ray_backend import tune_driver, tune_trials
from physio_dist.runtime import exit_status

class FusionTrial(tune_trials.FusionTrial):
    def reset_config(self, new_config):
        try:
            os.close(os.open({mark!r}, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return super().reset_config(new_config)
        os.kill(os.getpid(), signal.SIGKILL)

tune_trials.FusionTrial = FusionTrial
sys.exit(exit_status.status_of(tune_driver.main))
"""


@pytest.mark.parametrize("search", ["latin_hypercube", "optuna"])
def test_worker_lost_between_two_trials_costs_no_trial(
    sweep: Make, finished: Sweep, tmp_path: Path, search: str
) -> None:
    mark = tmp_path / "mark"
    (tmp_path / "dying.py").write_text(DYING.format(mark=str(mark)))
    run = sweep(search, options=(*SMALL, f"tune.search={search}"), program=(str(tmp_path / "dying.py"),))
    assert run() == 0, run.said()
    assert mark.exists()
    assert sum(line.startswith("the worker of trial ") for line in run.told()) == 1
    assert "Trials did not complete" not in run.said()
    # All configurations are drawn where there are so few of them.
    for row, undisturbed in zip(run.results()["rows"], finished.results()["rows"], strict=True):
        assert row == undisturbed


def test_optuna_suggests_by_one_fold_and_continues_after_killed_driver(sweep: Make) -> None:
    options = (*SMALL, "tune.search=optuna", "tune.trials=12", "tune.max_epochs=2", "search.components=[8]")
    run = sweep("optuna", options=options)
    process = run.start()
    try:
        # Four rows share ten drawn configurations; then each row and fold goes on by itself.
        run.wait_for_trials(process, 44)
        process.kill()
        process.wait(timeout=60)
    finally:
        end_session(process)
    before = run.trials()
    assert 44 <= len(before) < 64
    assert run() == 0, run.said()
    plan = "64 trials: 12 configurations for each of 4 rows and, beyond the first 10, 3 folds"
    assert f"{plan}, {len(before)} of them done in an earlier attempt" in run.told()
    trials = run.trials()
    after = {trial["trial"]: trial for trial in trials}
    assert all(after[trial["trial"]] == trial for trial in before)
    proposed = [name for name in after if name.count("-") == 2]
    assert len(after) == 64 and len(proposed) == 4 * 2 * 3
    search = config.load(config.TuneConfig, str(ROOT / CONFIG), run.place.words(*options)).search
    for name in proposed:
        row, number, fold = name.split("-")
        tag = f"fold_{fold}"
        assert list(after[name]["folds"]) == [tag]
        earlier = [one for one in trials if one["row"] == row and tag in one["folds"]]
        past = [(one["config"], max(one["folds"][tag])) for one in earlier[: int(number)]]
        assert after[name]["config"] == suggest(param_space(search), f"0/{name}", past)
    results = run.results()
    assert any(note.startswith("Search: 10 configurations drawn for all folds, then 2") for note in results["notes"])
    tried = [one["config"] for one in trials]
    assert all(fold["config"] in tried for fold in results["rows"][-1]["per_fold"])
    assert np.isfinite(
        FusionClassifier.load(str(run.path))
        .predict_recording(read_file(str(run.place.raw / "Subject00_1.edf")))
        .probability
    ).all()


def test_sweep_keeps_all_files_in_bucket(sweep: Make, ray_nodes: Cluster, s3: S3) -> None:
    options = (*SMALL[:2], "tune.trials=2", "tune.max_epochs=3", f"tune.feature_cache={s3.bucket}/features")
    run = sweep("cloud", options=options, run_dir=f"{s3.bucket}/runs")
    run.env.update(s3.env)
    assert run() == 0, run.said()
    there = s3.folder / "runs" / "cloud"
    assert len(json.loads((there / "results.json").read_text())["rows"]) == 6
    assert len((there / "trials.jsonl").read_text().splitlines()) == 8
    assert len(list((there / "tensorboard").glob("*/events.*"))) == 8
    assert list((there / "ray" / "cloud-1").glob("experiment_state-*.json"))
    assert len(list((s3.folder / "features").iterdir())) == 4
    assert s3.secret not in run.said()
    assert not [file for file in s3.folder.rglob("*") if file.is_file() and s3.secret.encode() in file.read_bytes()]
    assert not (run.folder / "s3:").exists()
    fresh = "FSSPEC_S3='{\"use_listings_cache\": false}'"
    assert f"while they run: {fresh} tensorboard --logdir {run.run_dir}/cloud/tensorboard" in run.told()


def test_failing_trial_ends_sweep_and_is_reported_once(sweep: Make, ray_nodes: Cluster, tmp_path: Path) -> None:
    """The code that a job brings along is broken."""
    broken = tmp_path / "broken"
    shutil.copytree(ROOT / "physio_dist", broken / "physio_dist", ignore=shutil.ignore_patterns("__pycache__"))
    source = broken / "physio_dist" / "evaluation" / "head_training.py"
    text = source.read_text()
    assert text.count("    def epoch(self") == 1
    head, _, rest = text.partition("    def epoch(self")
    first, _, rest = rest.partition("\n")
    fault = '\n        raise ValueError("this head is broken")\n'
    source.write_text(f"{head}    def epoch(self{first}{fault}{rest}")
    shutil.copytree(ROOT / "configs", broken / "configs")
    run = sweep("broken", code=broken)
    assert run(job=ray_nodes.dashboard) == 1, run.said()
    # `ray job submit` repeats the end of the log of a job that failed.
    (failed,) = {line for line in run.told() if line.startswith("failed: trial ")}
    assert "failed: ValueError: this head is broken; the trials that are done are kept" in failed
    assert ", lr " in failed
    # The other trials are not told at all.
    assert sum(line.startswith("ValueError: this head") for line in run.said().splitlines()) <= 2
    assert not (run.path / "results.json").exists()


def test_sweep_refuses_more_cpus_than_the_cluster_has(
    place: Place, ray_nodes: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ray_nodes.env.items():
        monkeypatch.setenv(name, value)
    run = Sweep(place, tmp_path, "large", dict(ray_nodes.env))
    assert run(extra=("tune.cpus=3",)) == 2
    (last,) = [line for line in run.told() if line.startswith("wrong input")]
    assert "asked for 1 worker(s) of 3 CPU(s)" in last
    assert "2 CPU(s)" in last
    assert run(extra=("tune.cpus=3", "tune.placement_timeout_s=2")) == 2
    assert (
        "Waited 2 s in vain. Ask for less or add nodes; tune.placement_timeout_s=SECONDS waits for them"
        in run.told()[-1]
    )
    assert not (run.path / "config.yaml").exists()


ABSENT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "physio_dist":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
"""


def test_sweep_refuses_node_with_other_physio_dist_or_none(
    sweep: Make, with_node: Callable[..., None], tmp_path: Path
) -> None:
    older, absent = tmp_path / "older", tmp_path / "absent"
    shutil.copytree(ROOT / "physio_dist", older / "physio_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (older / "physio_dist" / "__init__.py").write_text('"""Older."""\n\n__version__ = "0.0.1"\n')
    absent.mkdir()
    (absent / "sitecustomize.py").write_text(ABSENT)
    for node, what in ((older, "physio-dist is 0.0.1 on node "), (absent, "a node of the cluster has no physio_dist")):
        with_node(PYTHONPATH=str(node))
        run = sweep(node.name)
        assert run() == 2, run.said()
        assert what in run.told()[-1]
        assert run.told()[-1].endswith("(exit status 2)")
        assert "is lost; the trial starts again" not in run.said()
        assert "Traceback" not in run.said()


def test_submitted_embed_equals_local_one(ray_nodes: Cluster, place: Place, tmp_path: Path) -> None:
    here = [sys.executable, "-m", "physio_dist.cli", "embed", "--encoder", place.ecg, "--data", place.data]
    submit = [str(BIN / "ray"), "job", "submit", "--address", ray_nodes.dashboard, "--working-dir", str(ROOT), "--"]
    subprocess.run([*here, "--out", str(tmp_path / "here")], check=True)
    subprocess.run(
        [*submit, *here, "--out", str(tmp_path / "job")], check=True, env={**os.environ, **ray_nodes.env}, timeout=240
    )
    found, expected = (load((tmp_path / name / "features-00000.safetensors").read_bytes()) for name in ("job", "here"))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_live_sweep_is_refused_before_features_are_computed(
    sweep: Make, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = sweep("alive")
    held = Lease(str(run.path), lambda why: None, print)
    try:
        assert run(extra=(f"tune.feature_cache={tmp_path / 'features'}",)) == 2
    finally:
        held.release()
    assert f"the run at {run.path} is live: process {os.getpid()} on " in run.told()[-1]
    assert not (tmp_path / "features").exists()


Change = Callable[[Place, Path], list[str]]


def few_people(place: Place, _: Path) -> list[str]:
    return ["tune.folds=10"]


def unknown_label(place: Place, _: Path) -> list[str]:
    return ["tune.task=labels", "tune.label=rooom"]


def one_class(place: Place, _: Path) -> list[str]:
    return ["tune.task=labels", "tune.label=room"]


def no_eeg(place: Place, folder: Path) -> list[str]:
    raw = folder / "one"
    raw.mkdir()
    shutil.copy(place.raw / "Subject00_2.edf", raw)
    return [f"tune.data={converted(raw, folder / 'ecg-only', 'signals=ecg')}"]


def knows_test_people(place: Place, folder: Path) -> list[str]:
    shards = open_set(place.data)
    person = int(read_sample_table(shards).person[0])
    return [f"tune.encoders.eeg={exported(folder / 'knows', 'eeg', list(shards.signals['eeg'].channels), [person])}"]


def no_encoder(place: Place, folder: Path) -> list[str]:
    return [f"tune.encoders.ecg={folder}/nowhere"]


def wrong_signal(place: Place, _: Path) -> list[str]:
    return [f"tune.encoders.ecg={place.eeg}"]


def credentials(place: Place, _: Path) -> list[str]:
    return ["tune.ray_storage=s3://key:secret@bucket/state"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (few_people, ["tune.folds=10", "9 people"]),
        (unknown_label, ["tune.label=rooom", "did you mean 'room'"]),
        (one_class, ["tune.label=room", "only the value quiet"]),
        (no_eeg, ["has no eeg", "signals=ecg,eeg"]),
        (knows_test_people, ["pretrain", "fold "]),
        (no_encoder, ["/nowhere", "config.json"]),
        (wrong_signal, ["ecg", "eeg"]),
        (credentials, ["credentials", "s3://bucket/state"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_input_is_refused_before_ray_starts(
    place: Place, tmp_path: Path, change: Change, words: list[str], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    given = place.words(*SMALL, f"run.dir={tmp_path / 'runs'}", *change(place, tmp_path))
    with pytest.raises(UserError) as raised:
        tune_driver.main(["--config", str(ROOT / CONFIG), *given])
    message = str(raised.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "secret" not in message
    assert "Ray" not in "".join(capfd.readouterr())
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("option", "absolute"),
    [
        ("run.dir=runs", ""), ("tune.ray_storage=state", ""), ("tune.feature_cache=kept", ""), ("tune.data=set", ""),
        ("tune.encoders.ecg=ecg", ""), ("tune.encoders.eeg={0: /e, 1: eeg}", ""),
    ],
    ids=lambda value: value.partition("=")[0],
)  # fmt: skip
def test_relative_path_inside_ray_job_is_refused(
    place: Place, tmp_path: Path, option: str, absolute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(job_paths._JOB, "{}")
    given = place.words(f"run.dir={tmp_path}", option)
    with pytest.raises(UserError, match=f"{option.partition('=')[0]}=.* is relative, and a Ray job"):
        tune_driver.main(["--config", str(ROOT / CONFIG), *given])


def test_sweep_without_cluster_at_address_is_refused(place: Place, tmp_path: Path) -> None:
    run = Sweep(place, tmp_path, "alone", {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"})
    assert run() == 2
    (line,) = run.told()
    assert "no Ray cluster answers at 127.0.0.1:" in line
    assert not run.path.exists()
