"""What a sweep keeps of its trials, and when it goes on with them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from physio_dist import config, storage
from physio_dist.config import TuneConfig
from physio_dist.errors import UserError
from physio_dist.evaluation import trial_log
from physio_dist.evaluation.search_space import plan
from physio_dist.evaluation.trials import SEARCHED, TrialRecord
from physio_dist.runs.run_dir import CONFIG, RunDir
from tests.conftest import S3

EPOCHS = 4
GIVEN = ("tune.data=/d", "tune.encoders.ecg=/a", "tune.encoders.eeg=/b", "tune.label=x", "tune.trials=2", "run.dir=/r")


def options(*more: str) -> TuneConfig:
    words = [*GIVEN, f"tune.max_epochs={EPOCHS}", *more]
    return config.load(TuneConfig, None, words)


def begun(url: str, attempt: int = 1) -> RunDir:
    run = RunDir(url, 0)
    run.begin(attempt)
    return run


def ledger(run: RunDir, said: list[str] | None = None) -> trial_log.TrialLog:
    return trial_log.TrialLog(run, plan(options(), ["0", "1"]), EPOCHS, (said if said is not None else []).append)


def epochs(book: trial_log.TrialLog, name: str, *aucs: float) -> None:
    book.start(name)
    for epoch, auc in enumerate(aucs, 1):
        book.epoch(name, {"epoch": epoch, "val_auc": auc, "fold_0": auc, "fold_1": auc / 2})


@pytest.fixture()
def run(tmp_path: Path) -> RunDir:
    return begun(str(tmp_path / "sweep"))


def test_plan_has_same_configs_for_every_row() -> None:
    trials = plan(options(), ["0", "1"])
    assert [trial.name for trial in trials] == [f"{row}-{n}" for n in ("000", "001") for row in SEARCHED]
    for number in range(2):
        same = [trial.config for trial in trials[number * 4 : number * 4 + 4]]
        assert same == [same[0]] * 4
    assert trials[0].config != trials[4].config


def test_to_line_has_documented_fields(run: RunDir) -> None:
    book = ledger(run)
    epochs(book, "ecg-001", 0.5, 0.75, 0.7)
    book.end("ecg-001", {"0": 2, "1": 3})
    (line,) = map(json.loads, (run.spool / trial_log.TRIALS).read_text().splitlines())
    assert line.pop("seconds") >= 0
    assert line == {
        "trial": "ecg-001", "row": "ecg", "config": book.trials[5].config, "val_auc": 0.75, "epochs": 3,
        "stopped": True, "history": [[1, 0.5], [2, 0.75], [3, 0.7]],
        "folds": {"fold_0": [0.5, 0.75, 0.7], "fold_1": [0.25, 0.375, 0.35]}, "last": {"0": 2, "1": 3},
    }  # fmt: skip
    epochs(book, "ecg-000", *[0.5] * EPOCHS)
    book.end("ecg-000", {})
    assert [json.loads(one)["stopped"] for one in book.lines().splitlines()] == [False, True]
    book.close()


def test_trial_log_ignores_damaged_line(run: RunDir) -> None:
    book = ledger(run)
    for name in ("ecg-000", "ecg-001"):
        epochs(book, name, *[0.5] * EPOCHS)
        book.end(name, {})
    book.close()
    good, other = (run.spool / trial_log.TRIALS).read_text().splitlines()
    for damaged in (other[:40], "3", "{}", json.dumps({**json.loads(other), "history": 3}), "[]"):
        (run.spool / trial_log.TRIALS).write_text(f"{damaged}\n{good}\n")
        again = ledger(begun(run.url, 2))
        assert set(again.ended) == {"ecg-000"}
        again.close()


def test_from_line_is_inverse_of_to_line(run: RunDir) -> None:
    history = [
        {"epoch": 1, "val_auc": 0.1 + 0.2, "fold_0": 1 / 3, "fold_1": math.nan},
        {"epoch": 2, "val_auc": math.nan, "fold_0": math.nan, "fold_1": math.nan},
    ]
    record = TrialRecord("ecg-000", "ecg", {"lr": 1e-3}, history, {"0": 1}, 2.5)
    text = json.dumps(trial_log.to_line(record, EPOCHS), allow_nan=False)
    back = trial_log.from_line(json.loads(text))
    assert repr(back) == repr(record)
    assert trial_log.best(history) == 0.1 + 0.2
    assert trial_log.best(history[1:]) is None


def test_trial_log_keeps_ended_trials_of_earlier_attempt(run: RunDir) -> None:
    first = ledger(run)
    assert len(first.pending) == 8
    epochs(first, "fused-000", *[0.6] * EPOCHS)
    first.end("fused-000", {})
    epochs(first, "eeg-000", 0.6)
    first.close()
    with (run.spool / trial_log.TRIALS).open("a") as file:
        other = trial_log.to_line(TrialRecord("ecg-000", "ecg", {"lr": 99.0}, [{"epoch": 1, "val_auc": 0.5}]), EPOCHS)
        file.write(json.dumps(other) + "\n")
        file.write('{"trial": "untrained-000", "row": "untr')
    assert (run.spool / trial_log.BOARD / "eeg-000").is_dir()
    again = ledger(begun(run.url, 2))
    # Not the one that was running, nor the one of other options, nor the line that was cut off.
    assert [record.trial for record in again.records()] == ["fused-000"]
    assert repr(again.records()) == repr(first.records())
    names = [trial.name for trial in again.trials]
    assert [trial.name for trial in again.pending] == [name for name in names if name != "fused-000"]
    assert not (run.spool / trial_log.BOARD / "eeg-000").exists()
    assert (run.spool / trial_log.BOARD / "fused-000").is_dir()
    epochs(again, "eeg-000", 0.7)
    again.end("eeg-000", {})
    assert [record.trial for record in again.records()] == ["fused-000", "eeg-000"]
    again.close()


def test_restarted_trial_discards_earlier_epochs(run: RunDir) -> None:
    book = ledger(run)
    epochs(book, "eeg-000", 0.9, 0.9)
    epochs(book, "eeg-000", 0.6)
    book.end("eeg-000", {})
    assert [line["epoch"] for line in book.records()[0].history] == [1]
    book.close()
    assert events(run, "eeg-000").Scalars("val_auc")[0].value == pytest.approx(0.6)
    assert len(events(run, "eeg-000").Scalars("val_auc")) == 1


def test_trial_log_keeps_first_failure_and_no_later_trial(run: RunDir) -> None:
    book = ledger(run)
    epochs(book, "eeg-000", 0.6)
    epochs(book, "ecg-000", 0.6)
    book.fail("eeg-000", "ValueError: broken")
    book.fail("ecg-001", "another")
    book.end("ecg-000", {})
    assert book.records() == []
    assert book.failure is not None
    assert book.failure.startswith("trial eeg-000 (pooling ")
    assert book.failure.endswith("failed: ValueError: broken")
    assert (run.spool / trial_log.TRIALS).read_text() == ""
    book.close()


def events(run: RunDir, name: str) -> EventAccumulator:
    found = EventAccumulator(str(run.spool / trial_log.BOARD / name))
    found.Reload()
    return found


def test_tensorboard_has_every_epoch_and_hyperparameters(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_log, "_FLUSH_S", 0.0)
    book = ledger(run)
    epochs(book, "ecg-000", 0.5, 0.75)
    # While it runs:
    assert [one.step for one in events(run, "ecg-000").Scalars("val_auc")] == [1, 2]
    book.end("ecg-000", {})
    book.close()
    found = events(run, "ecg-000")
    assert found.Tags()["scalars"] == ["val_auc", "fold_0", "fold_1"]
    assert [one.value for one in found.Scalars("fold_1")] == [0.25, 0.375]
    plugin = found.summary_metadata["_hparams_/session_start_info"].plugin_data
    assert plugin.plugin_name == "hparams"
    assert b"learning" not in plugin.content
    assert all(name.encode() in plugin.content for name in ("row", "pooling", "lr", "weight_decay"))


def test_trial_log_reports_progress_without_terminal(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_log, "_REPORT_S", 0.0)
    said: list[str] = []
    book = ledger(run, said)
    epochs(book, "fused-000", 0.5, 0.75, 0.6)
    book.end("fused-000", {})
    epochs(book, "ecg-000", math.nan)
    book.close()
    assert said[0].startswith("0 of 8 trials done, 1 running; best validation AUC fused 0.500; 00:00:0")
    assert said[-1].startswith("1 of 8 trials done, 1 running; best validation AUC fused 0.750; 00:00:0")


def test_trial_log_in_bucket_is_synced_while_trials_run(s3_here: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial_log, "_SYNC_S", 0.0)
    monkeypatch.setattr(trial_log, "_FLUSH_S", 0.0)
    run = begun(f"{s3_here.bucket}/runs/sweep")
    book = ledger(run)
    epochs(book, "eeg-000", 0.5)
    assert len(list((s3_here.folder / "runs/sweep/tensorboard/eeg-000").iterdir())) == 1
    book.end("eeg-000", {})
    epochs(book, "ecg-000", 0.5)
    book.close()
    again = ledger(begun(run.url, 2))
    assert [record.trial for record in again.records()] == ["eeg-000"]
    assert storage.names(run.file(trial_log.BOARD)) == ["eeg-000"]
    again.close()


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What is told of the inputs now; real ones are looked at in the system tests."""
    now = facts()
    monkeypatch.setattr(trial_log, "_current_facts", lambda *_: now)
    return now


def test_finished_refuses_sweep_of_other_inputs(run: RunDir, inputs: dict[str, Any]) -> None:
    storage.write_bytes(run.file(CONFIG), config.to_yaml(options()).encode())
    storage.write_json(run.file(trial_log.RESULTS), {"rows": []})
    storage.write_json(run.file(trial_log.DATA), facts())
    inputs["encoders"] = {"ecg": "e", "eeg": None}
    assert trial_log.finished(run, options()) == {"rows": []}
    inputs["encoders"] = {"ecg": "other", "eeg": None}
    with pytest.raises(UserError, match=r"what tune.encoders.ecg leads to has changed"):
        trial_log.finished(run, options())


@pytest.mark.parametrize(
    ("of", "told"),
    [
        ({"sha256": "a", "url": "x"}, "a"), ("a", "a"), (None, None), ({"0": "a", "1": "a"}, "a"),
        ({"by_fold": {"0": {"sha256": "a"}, "1": {"sha256": "b"}}}, {"0": "a", "1": "b"}),
        ({"0": "a", "1": "b"}, {"0": "a", "1": "b"}), ({"0": "a", "1": None}, None),
    ],
)  # fmt: skip
def test_sha256_of_encoder_accepts_all_forms(of: Any, told: Any) -> None:
    assert trial_log._sha256(of) == told


def test_finished_compares_encoders_by_fold(run: RunDir) -> None:
    given = options("tune.encoders.eeg={0: /a, 1: /b}")
    storage.write_bytes(run.file(CONFIG), config.to_yaml(given).encode())
    assert trial_log.finished(run, given) is None
    with pytest.raises(UserError, match=r"tune.encoders.eeg.1: /b there, /c now"):
        trial_log.finished(run, options("tune.encoders.eeg={0: /a, 1: /c}"))


def test_finished_compares_encoder_patterns_by_fold(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options("tune.encoders.ecg=/ecg-{fold}")
    assert given.tune.encoders["ecg"].url == "/ecg-{fold}"
    monkeypatch.setattr(trial_log, "open_set", lambda _: SimpleNamespace(fingerprint="f"))
    monkeypatch.setattr(trial_log, "exported_hash", {"/ecg-0": "a", "/ecg-1": "b"}.get)
    results = {"rows": [], "folds": [{"fold": "0"}, {"fold": "1"}]}
    storage.write_json(run.file(trial_log.RESULTS), results)
    by_fold = {"0": {"sha256": "a"}, "1": {"sha256": "b"}}
    known = facts()
    known["encoders"]["ecg"] = {"by_fold": by_fold}
    storage.write_bytes(run.file(CONFIG), config.to_yaml(given).encode())
    storage.write_json(run.file(trial_log.DATA), known)
    assert trial_log.finished(run, given) == results
    by_fold["1"]["sha256"] = "c"
    storage.write_json(run.file(trial_log.DATA), known)
    with pytest.raises(UserError, match=r"what tune.encoders.ecg leads to has changed"):
        trial_log.finished(run, given)


def test_finished_refuses_other_options(run: RunDir, inputs: dict[str, Any]) -> None:
    assert trial_log.finished(run, options()) is None
    storage.write_bytes(run.file(CONFIG), config.to_yaml(options()).encode())
    moved = ("run.dir=/elsewhere", "tune.cpus=2", "tune.ray_storage=/s", "tune.feature_cache=/f")
    assert trial_log.finished(run, options(*moved)) is None
    with pytest.raises(UserError, match=r"configuration \(run.seed: 0 there, 1 now; tune.trials: 2 there, 3 now\)"):
        trial_log.finished(run, options("tune.trials=3", "run.seed=1"))
    storage.write_json(run.file(trial_log.RESULTS), {"rows": []})
    assert trial_log.finished(run, options()) == {"rows": []}
    storage.write_json(run.file(trial_log.RESULTS), {"something": "else"})
    with pytest.raises(UserError, match="holds no results of a sweep"):
        trial_log.finished(run, options())


def test_finished_refuses_pretraining_run(run: RunDir) -> None:
    given = config.load(config.PretrainConfig, None, ["data.index=/d"])
    storage.write_bytes(run.file(CONFIG), config.to_yaml(given).encode())
    with pytest.raises(UserError, match="is a run of pretraining: choose another"):
        trial_log.finished(run, options())


def facts(data: str = "f", ecg: str = "e") -> dict[str, Any]:
    encoders = {"ecg": {"sha256": ecg}, "eeg": {"sha256": "g"}}
    return {"indexes": [{"url": "/d", "fingerprint": data}], "encoders": encoders}


@pytest.mark.parametrize(
    ("now", "named"),
    [
        (facts(data="x"), "tune.data"),
        (facts(ecg="x"), "tune.encoders.ecg"),
        (facts("x", "x"), "tune.data and tune.encoders.ecg"),
    ],
)
def test_changed_inputs_at_same_url_are_refused(run: RunDir, now: dict[str, Any], named: str) -> None:
    trial_log.refuse_other_inputs(run, facts())
    storage.write_json(run.file(trial_log.DATA), facts())
    trial_log.refuse_other_inputs(run, facts())
    with pytest.raises(UserError, match=f"what {named}.* leads to has changed"):
        trial_log.refuse_other_inputs(run, now)


def test_table_formats_results(run: RunDir) -> None:
    row = {"name": "fused", "accuracy": 0.71, "balanced_accuracy": 0.6, "macro_f1": 0.59, "auc": 0.8125, "pr_auc": None}
    bound = {**row, "name": "bound_ecg", "auc_ci": None, "auc": None}
    results = {
        "task": "labels", "protocol": "holdout", "windows": 48, "people": 6, "simulated": True, "notes": ["mind this"],
        "rows": [{**row, "auc_ci": [0.7, 0.9]}, bound],
    }  # fmt: skip
    lines = trial_log.table(results)
    assert lines[0] == "SIMULATED signals: labels, holdout: 48 windows of 6 held-out people"
    assert lines[1].split() == ["accuracy", "balanced", "macro", "F1", "ROC-AUC", "95%", "interval", "PR-AUC"]
    assert lines[2].split() == ["fused", "0.710", "0.600", "0.590", "0.812", "0.700", "to", "0.900", "-"]
    assert lines[3].split() == ["bound_ecg", "0.710", "0.600", "0.590", "-", "-", "-"]
    assert len({len(line) for line in lines[1:4]}) == 1
    assert "the best that the simulator's hidden state allows" in lines[4]
    assert lines[5] == "note: mind this"
    leaky = trial_log.table({**results, "protocol": "leaky_window", "simulated": False})
    assert leaky[0].startswith("LEAKY SPLIT") and leaky[1].endswith("48 windows of 6 people")
    assert all(line.split()[1] == "LEAKY" for line in leaky[3:5])
    rows = [results["rows"][0], {**row, "name": "fused_untrained_only", "auc_ci": [0.7, 0.9]}]
    lines = trial_log.table({**results, "protocol": "leaky_window", "rows": rows})
    assert len({len(line) for line in lines[2:5]}) == 1, "columns stay where they are under a long name"
    gain = {"row": "fused", "minus": "eeg", "auc": -0.0123, "ci": [-0.05, 0.0207], "p": 0.0432}
    none = {"row": "fused", "minus": "ecg", "auc": 0.1, "ci": None, "p": None}
    lines = trial_log.table({**results, "differences": [gain, none]})
    assert lines[4] == "fused - eeg: -0.012 (-0.050 to +0.021), p = 0.043" and len(lines) == 7
    leaky = trial_log.table({**results, "protocol": "leaky_window", "differences": [gain]})
    assert any(line.startswith("LEAKY fused - eeg") for line in leaky)
    paper = {"source": "arXiv 1", "metric": "auc", "value": 0.8479, "unknown": "the split"}
    assert "arXiv 1 reports auc 0.8479; unknown: the split" in trial_log.table({**results, "published": paper})
    real = trial_log.table({**results, "simulated": False, "rows": results["rows"][:1], "notes": []})
    assert real[0].startswith("labels, holdout")
    assert len(real) == 3
