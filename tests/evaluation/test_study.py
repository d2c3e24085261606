"""A study from a shard set and encoders to its results."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_tensors

from physio_dist import storage
from physio_dist.config import TuneConfig, parse_encoders
from physio_dist.data.format import index
from physio_dist.data.format.sample_table import SampleTable
from physio_dist.data.loading.cache import ShardCache
from physio_dist.errors import UserError
from physio_dist.evaluation.features import open_features
from physio_dist.evaluation.handcrafted import paired_features
from physio_dist.evaluation.label_table import load_label_table
from physio_dist.evaluation.results import oracle_rows, permutation_control
from physio_dist.evaluation.trials import SEARCHED, EncoderRole, InputKey, Study, TrialRecord, train
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, preset
from physio_dist.models.export import save_encoder
from physio_dist.models.fusion.pooling import pool
from physio_dist.stats.scores import METRICS, auc, score
from tests.evaluation.study_samples import (
    CONFIG,
    conclude_study,
    facts_of,
    features_of,
    opened,
    paired,
    prepare_study,
    study_of,
    table_of,
)

pytestmark = pytest.mark.integration

TABLE = table_of(people=9, recordings=2, windows=5)


def quiet(_: str) -> None:
    pass


def small(**more: Any) -> Study:
    study = study_of(TABLE, features_of(TABLE.label, 0.8, 3, 1), features_of(TABLE.label, 1.2, 3, 2), epochs=8, **more)
    study.options.tune.permutations = 3
    return study


def records_of(study: Study) -> list[TrialRecord]:
    configs = [CONFIG, {**CONFIG, "depth": 0, "lr": 0.03}, {**CONFIG, "width": 16}]
    return [
        TrialRecord(f"{row}-{i}", row, config, list(train(study, row, config)))
        for row in SEARCHED for i, config in enumerate(configs)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def study() -> Study:
    return small()


@pytest.fixture(scope="module")
def records(study: Study) -> list[TrialRecord]:
    return records_of(study)


def test_results_are_what_the_contract_says(study: Study, records: list[TrialRecord]) -> None:
    said: list[str] = []
    outcome = conclude_study(study, records, said.append)
    results = json.loads(json.dumps(outcome.results, allow_nan=False))
    assert said
    top = {name: results[name] for name in ("task", "protocol", "label", "classes", "simulated", "windows", "people")}
    assert top == {
        "task": "labels", "protocol": "grouped_kfold", "label": "task", "classes": ["class0", "class1"],
        "simulated": False, "windows": 90, "people": 9,
    }  # fmt: skip
    assert [(one["fold"], one["people"], one["windows"]) for one in results["folds"]] == [(f, 3, 30) for f in "012"]
    assert results["notes"] == ["A note."] and results["selection"]["metric"] == "auc"
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["majority", "untrained", "handmade", "ecg", "eeg", "fused"]
    assert [len(row["modalities"]) for row in rows.values()] == [0, 2, 2, 1, 1, 2]
    for row in rows.values():
        assert {*METRICS, "auc_ci", "per_fold", "spread", "confusion"} <= set(row)
        assert row["auc_ci"][0] <= row["auc"] <= row["auc_ci"][1]
        assert [fold["fold"] for fold in row["per_fold"]] == ["0", "1", "2"]
        assert all(fold["people"] == 3 and fold["windows"] == 30 for fold in row["per_fold"])
        for name in METRICS:
            each = [fold[name] for fold in row["per_fold"]]
            assert row["spread"][name] == pytest.approx(np.std(each, ddof=1), abs=1e-5)
        assert np.sum(row["confusion"], axis=1).tolist() == [45, 45]
        assert np.trace(row["confusion"]) / 90 == pytest.approx(row["accuracy"], abs=1e-6)
    for name in SEARCHED:
        for fold in rows[name]["per_fold"]:
            assert fold["config"] in [record.config for record in records] and 1 <= fold["epoch"] <= 8
    assert all(fold["config"]["C"] > 0 and fold["epoch"] is None for fold in rows["handmade"]["per_fold"])
    assert all(fold["config"] is fold["epoch"] is None for fold in rows["majority"]["per_fold"])
    assert rows["majority"]["auc"] == 0.5
    assert rows["fused"]["auc"] > 0.7 > 0.65 > rows["untrained"]["auc"]
    assert results["permuted"]["n"] == 3 and results["permuted"]["p"] == 0.25


def test_predictions_give_the_same_figures(study: Study, records: list[TrialRecord]) -> None:
    outcome = conclude_study(study, records, quiet)
    tensors = load_tensors(outcome.predictions)
    length = int.from_bytes(outcome.predictions[:8], "little")
    about = json.loads(outcome.predictions[8 : 8 + length])["__metadata__"]
    assert json.loads(about["classes"]) == ["class0", "class1"] and json.loads(about["folds"]) == ["0", "1", "2"]
    keys = [row.tobytes().rstrip(b"\0").decode() for row in tensors["key"]]
    assert keys == TABLE.keys
    for name, wanted in (("person", TABLE.person), ("recording", TABLE.recording), ("label", TABLE.label)):
        assert np.array_equal(tensors[name], wanted) and tensors[name].dtype == wanted.dtype
    assert all((tensors["fold"][fold.test] == i).all() for i, fold in enumerate(study.folds))
    for row in outcome.results["rows"]:
        probability = tensors[f"probability.{row['name']}"]
        assert probability.shape == (90, 2) and probability.dtype == np.float32
        np.testing.assert_allclose(probability.sum(axis=1), 1, atol=1e-5)
        for name, value in score(TABLE.label, probability).items():
            assert row[name] == pytest.approx(value, abs=1e-4)
        for i, fold in enumerate(row["per_fold"]):
            mine = tensors["fold"] == i
            assert fold["auc"] == pytest.approx(auc(TABLE.label[mine], probability[mine]), abs=1e-4)


def test_the_same_bytes_whatever_the_order_of_trials(study: Study, records: list[TrialRecord]) -> None:
    first = conclude_study(study, records, quiet)
    shuffled = [TrialRecord(f"other-{i}", r.row, r.config, r.history) for i, r in enumerate(records)]
    random.Random(1).shuffle(shuffled)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads if threads in (1, 2) else 1)
    again = conclude_study(study, shuffled, quiet)
    torch.set_num_threads(threads)
    assert json.dumps(again.results) == json.dumps(first.results)
    assert again.predictions == first.predictions


def test_test_people_decide_nothing(study: Study, records: list[TrialRecord]) -> None:
    """With the labels of one fold's test people turned over all that was selected for that fold stays."""
    label = TABLE.label.copy()
    label[study.folds[0].test] = 1 - label[study.folds[0].test]
    turned = Study(**{**vars(study), "table": type(TABLE)(**{**vars(TABLE), "label": label})})
    before, after = (conclude_study(one, records, quiet).results["rows"] for one in (study, turned))
    for a, b in zip(before, after, strict=True):
        assert (a["per_fold"][0]["config"], a["per_fold"][0]["epoch"]) == (
            b["per_fold"][0]["config"], b["per_fold"][0]["epoch"],
        )  # fmt: skip
        if a["auc"] != 0.5:
            assert a["per_fold"][0]["auc"] == pytest.approx(1 - b["per_fold"][0]["auc"], abs=1e-5)


def test_a_fold_with_one_class_has_no_auc_and_the_file_stays_json() -> None:
    label = np.where(TABLE.person == TABLE.person.min(), 0, TABLE.label)
    table = type(TABLE)(**{**vars(TABLE), "label": label})
    made = study_of(table, features_of(label, 1.0, 3, 1), features_of(label, 1.0, 3, 2), folds=9)
    history = [{"epoch": 1, "val_auc": 0.6, **{f"fold_{i}": 0.6 for i in range(9)}}]
    results = conclude_study(made, [TrialRecord(row, row, CONFIG, history) for row in SEARCHED], quiet).results
    json.dumps(results, allow_nan=False)
    lonely = [i for i, fold in enumerate(made.folds) if table.person[fold.test][0] == TABLE.person.min()]
    for row in results["rows"]:
        for i, fold in enumerate(row["per_fold"]):
            assert (fold["auc"] is None) == (i in lonely) and (fold["macro_f1"] is None) == (i in lonely)
            assert fold["accuracy"] is not None
        assert row["spread"]["auc"] is not None and row["auc"] is not None
    assert "permuted" not in results


def test_one_fold_has_no_spread() -> None:
    base = study_of(TABLE, features_of(TABLE.label, 1.0, 3, 1), features_of(TABLE.label, 1.0, 3, 2))
    only = Study(**{**vars(base), "folds": base.folds[:1]})
    history = [{"epoch": 1, "val_auc": 0.6, "fold_0": 0.6}]
    results = conclude_study(only, [TrialRecord(row, row, CONFIG, history) for row in SEARCHED], quiet).results
    assert results["windows"] == len(base.folds[0].test) and results["people"] == 3
    assert all(set(row["spread"].values()) == {None} for row in results["rows"])


def test_bounds_are_bayes_rule_on_the_hidden_drives() -> None:
    rng = np.random.default_rng(0)
    table = table_of(people=400, recordings=2, windows=5)
    shifts = {"ecg": 1.0, "eeg": 2.0}
    latent = {name: shift * table.label + rng.standard_normal(len(table.label)) for name, shift in shifts.items()}
    made = study_of(table, np.zeros((4000, 1), np.float32), np.zeros((4000, 1), np.float32))
    rows = oracle_rows(type(table)(**{**vars(table), "simulated_drive": latent}), made.folds)
    assert [row.name for row in rows] == ["bound_ecg", "bound_eeg", "bound_fused"]
    tested = np.concatenate([fold.test for fold in made.folds])
    # Normal classes d apart have an area of Phi(d / sqrt 2); both drives together are sqrt(1 + 4) apart.
    for row, area, hits in zip(rows, (0.7602, 0.9214, 0.9431), (0.6915, 0.8413, 0.8682), strict=True):
        probability = np.concatenate(list(row.probability))
        assert auc(table.label[tested], probability) == pytest.approx(area, abs=0.012)
        assert (probability.argmax(1) == table.label[tested]).mean() == pytest.approx(hits, abs=0.015)
    sure = np.concatenate(list(rows[2].probability))[:, 1]
    for low, high in ((0.1, 0.3), (0.4, 0.6), (0.7, 0.9)):
        mine = (sure > low) & (sure < high)
        assert table.label[tested][mine].mean() == pytest.approx(sure[mine].mean(), abs=0.08)
    assert oracle_rows(table, made.folds) == []


def test_bounds_know_how_frequent_the_classes_are() -> None:
    """Drives that say nothing: the best guess is always the more frequent class, with its share as probability."""
    table = table_of(people=30, recordings=4, windows=5)
    label = (table.recording % 4 == 0).astype(np.int64)
    latent = {name: np.random.default_rng(i).standard_normal(600) for i, name in enumerate(("ecg", "eeg"))}
    made = study_of(table, np.zeros((600, 1), np.float32), np.zeros((600, 1), np.float32))
    for row in oracle_rows(type(table)(**{**vars(table), "simulated_drive": latent, "label": label}), made.folds):
        assert np.concatenate(list(row.probability))[:, 1] == pytest.approx(0.25, abs=0.2)


def test_p_counts_the_observed_labels_among_the_permutations() -> None:
    part = permutation_control(0.7, [0.5, 0.7, 0.6, 0.8])
    assert (part.n, part.auc, part.p, part.mean) == (4, [0.5, 0.7, 0.6, 0.8], 0.6, 0.65)
    assert permutation_control(0.9, [0.5] * 19).p == 0.05
    assert math.isnan(permutation_control(math.nan, [0.5]).p) and math.isnan(permutation_control(0.5, []).p)


def export(url: str, signal: str, seed: int = 0, people: list[str] | None = None, **more: Any) -> str:
    torch.manual_seed(seed)
    about = {"signal": signal, "rate": 200.0, "unit_uv": 100.0, "channels": ["X"], "simulated": False, **more}
    for name, data in save_encoder(CrissCrossEncoder(preset("tiny")).eval(), about).items():
        storage.write_bytes(storage.join(url, name), data)
    if people is not None:
        storage.write_json(storage.join(url, "people.json"), people)
    return url


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of six people, one window of them without the label; an encoder of each kind, one knows two people."""
    folder = tmp_path_factory.mktemp("made")
    facts = facts_of(people=6, recordings=2, windows=2)
    facts[5]["labels"] = {}
    valid = np.ones((24, 2), dtype=bool)
    valid[3, 1] = False
    paired(str(folder / "set"), facts, valid={"ecg": valid})
    table = load_label_table(opened(str(folder / "set")), "eegmat", None)
    known = [f"{person:016x}" for person in np.unique(table.person)[:2].tolist()]
    export(str(folder / "ecg"), "ecg", 1)
    export(str(folder / "eeg"), "eeg", 2, people=[], simulated=True)
    export(str(folder / "eeg2"), "eeg", 3, people=[f"{7:016x}"])
    export(str(folder / "knows"), "ecg", 4, people=[*known, f"{9:016x}"])
    return folder


def options_of(folder: Path, **more: Any) -> TuneConfig:
    options = TuneConfig()
    options.tune.data, options.tune.task = str(folder / "set"), "eegmat"
    set_encoders(options, ecg=str(folder / "ecg"), eeg=str(folder / "eeg"))
    options.tune.folds, options.tune.val_folds, options.tune.max_epochs = 3, 2, 2
    for name, value in more.items():
        if name in ("ecg", "eeg"):
            set_encoders(options, **{name: value})
        else:
            setattr(options.tune, name, value)
    return options


def set_encoders(options: TuneConfig, **encoders: Any) -> None:
    options.tune.encoders = {**options.tune.encoders, **parse_encoders("tune.encoders", encoders)}


def test_a_study_is_prepared_from_a_set_and_encoders(made: Path) -> None:
    said: list[str] = []
    study = prepare_study(options_of(made), str(made / "features"), said.append)
    folders = storage.names(str(made / "features"))
    assert len(folders) == 4 and [name[:4] for name in sorted(folders)] == ["ecg-", "ecg-", "eeg-", "eeg-"]
    assert len(study.table.label) == 23 and len(study.folds) == 3
    assert set(study.encoders) == {EncoderRole(s, pretrained) for s in ("ecg", "eeg") for pretrained in (True, False)}
    assert len({shas[0] for shas in study.encoders.values()}) == 4
    assert all(len(shas) == 3 and len(set(shas)) == 1 for shas in study.encoders.values())
    assert len(study.inputs) == 16
    rows = study.table.sample
    for (signal, sha, kind), x in study.inputs.items():
        (folder,) = [one for one in folders if one.startswith(f"{signal}-{sha[:16]}-")]
        features = open_features(str(made / "features" / folder))
        assert x.dtype == np.float32
        wanted = pool(features.values[rows], features.valid[rows], kind).numpy()
        np.testing.assert_allclose(x, wanted, rtol=1e-5, atol=1e-6)
    measured = paired_features(opened(str(made / "set")), quiet)
    assert study.handcrafted["eeg"].shape == (23, 10) and study.handcrafted["ecg"].shape == (23, 4)
    assert all(np.array_equal(study.handcrafted[name], x[rows], equal_nan=True) for name, x in measured.items())
    notes = " ".join(study.notes)
    assert "1 of 24 windows do not have the label" in notes and "ECG encoder has no list" in notes
    assert "EEG encoder has no list" not in notes and "EEG encoder was pretrained on simulated" in notes
    assert "grouped_kfold" in notes and "SIMULATED" not in notes
    assert study.about["ecg"]["people"] is None and study.about["eeg"]["people"] == 0
    assert (
        study.about["eeg"]["sha256"] == study.encoders[EncoderRole("eeg")][0]
        and study.about["eeg"]["simulated"] is True
    )
    # Again: nothing is computed, all is the same.
    stamps = {path: path.stat().st_mtime_ns for path in (made / "features").rglob("*.safetensors")}
    again = prepare_study(options_of(made), str(made / "features"), quiet)
    assert {path: path.stat().st_mtime_ns for path in (made / "features").rglob("*.safetensors")} == stamps
    assert all(np.array_equal(again.inputs[name], x) for name, x in study.inputs.items())
    for row in SEARCHED:
        for kind in ("mean", "channels_mean_std"):
            assert len(list(train(study, row, {**CONFIG, "pooling": kind}))) == 2


def test_prepare_opens_index_and_sample_table_once_and_hashes_each_shard_once(
    tmp_path: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = paired(str(tmp_path / "set"), facts_of(people=6, recordings=2, windows=2))
    assert len(shards.shards) == 5
    counts: Counter[str] = Counter()

    def count(owner: Any, name: str, label: Callable[[Any], str | None]) -> None:
        function = getattr(owner, name)

        def counted(*arguments: Any, **more: Any) -> Any:
            returned = function(*arguments, **more)
            if (key := label(returned)) is not None:
                counts[key] += 1
            return returned

        monkeypatch.setattr(owner, name, counted)

    hashes = {shard.sha256: shard.url for shard in shards.shards}
    count(index, "_open", lambda _: "index")
    count(SampleTable, "from_bytes", lambda _: "sample table")
    count(ShardCache, "__init__", lambda _: "cache")
    count(hashlib, "file_digest", lambda digest: hashes.get(digest.hexdigest()))
    prepare_study(options_of(made, data=shards.url), str(tmp_path / "features"), quiet)
    assert counts == {"index": 1, "sample table": 1, "cache": 1, **dict.fromkeys(hashes.values(), 1)}


def test_windows_without_a_modality_are_part_of_a_study(tmp_path: Path, made: Path) -> None:
    facts = facts_of(people=6, recordings=2, windows=2)
    valid = np.ones((24, 2), dtype=bool)
    valid[[0, 7, 9]] = False
    valid[4, 1] = False
    paired(str(tmp_path / "set"), facts, valid={"eeg": valid})
    options = options_of(made, data=str(tmp_path / "set"))
    options.search.head, options.search.pooling = ["concat", "cross_attention"], ["mean_std", "channels_attention"]
    options.search.modality_dropout = [0.5]
    study = prepare_study(options, str(tmp_path / "features"), quiet)
    assert list(study.valid) == ["eeg"] and np.array_equal(study.valid["eeg"], valid)
    kinds = {key.pooling: x.shape[1:] for key, x in study.inputs.items() if key.signal == "eeg"}
    assert kinds == {"mean_std": (160,), "channels_attention": (2, 80), "attention": (2, 80)}
    assert any("The EEG is missing in 3 of 24 windows" in note for note in study.notes)
    assert all(np.isfinite(x).all() for x in study.inputs.values())
    config = {**CONFIG, "modality_dropout": 0.5, "head": "cross_attention", "pooling": "mean_std"}
    records = [TrialRecord(row, row, config, list(train(study, row, config))) for row in SEARCHED]
    outcome = conclude_study(study, records, quiet)
    assert [row["name"] for row in outcome.results["rows"]][5:] == ["fused", "fused_ecg_only", "fused_eeg_only"]
    tensors = load_tensors(outcome.predictions)
    assert all(np.isfinite(values).all() for name, values in tensors.items() if name.startswith("probability"))


def test_a_modality_that_is_missing_in_all_windows_is_told(tmp_path: Path, made: Path) -> None:
    facts = facts_of(people=6, recordings=2, windows=2)
    paired(str(tmp_path / "set"), facts, valid={"ecg": np.zeros((24, 2), dtype=bool)})
    with pytest.raises(UserError, match=r"the ECG is missing in all 24 labelled windows"):
        prepare_study(options_of(made, data=str(tmp_path / "set")), str(tmp_path / "features"), quiet)
    assert not storage.names(str(tmp_path / "features"))


def test_a_folder_a_fold(made: Path) -> None:
    given = {0: str(made / "eeg"), "1": str(made / "eeg2"), 2: str(made / "eeg")}
    options = options_of(made, eeg=given)
    options.search.pooling = ["mean"]
    study = prepare_study(options, str(made / "features"), quiet)
    eeg = study.encoders[EncoderRole("eeg")]
    assert eeg[0] == eeg[2] != eeg[1] and len(set(study.encoders[EncoderRole("eeg", False)])) == 1
    assert len(study.inputs) == 5
    by_fold = study.about["eeg"]["by_fold"]
    assert [by_fold[name]["url"][-4:] for name in "012"] == ["/eeg", "eeg2", "/eeg"]
    assert [by_fold[name]["people"] for name in "012"] == [0, 1, 0]
    assert study.keys_of("eeg", "mean", 1) == {"eeg": InputKey("eeg", eeg[1], "mean")}
    for name, of in given.items():
        (made / f"fold-{name}").symlink_to(of)
    set_encoders(options, eeg=str(made / "fold-{fold}"))
    assert prepare_study(options, str(made / "features"), quiet).encoders == study.encoders
    set_encoders(options, eeg=str(made / "flod-{fold}"))
    with pytest.raises(UserError, match=r"/flod-0"):
        prepare_study(options, str(made / "features"), quiet)


def test_an_encoder_that_knows_test_people_is_refused_in_their_fold_only(made: Path) -> None:
    with pytest.raises(UserError, match=r"pretrained on [12] of the 2 test people of fold"):
        prepare_study(options_of(made, ecg=str(made / "knows")), str(made / "features"), quiet)
    study = prepare_study(options_of(made), str(made / "features"), quiet)
    known = {int(one, 16) for one in storage.read_json(str(made / "knows" / "people.json"))}
    knows = {fold.name: bool(known & set(study.table.person[fold.test].tolist())) for fold in study.folds}
    assert True in knows.values() and False in knows.values()
    clean = {name: str(made / ("ecg" if knows[name] else "knows")) for name in knows}
    assert prepare_study(options_of(made, ecg=clean), str(made / "features"), quiet)


def test_dreamers_windows_lose_the_rest_before_their_clip(made: Path, tmp_path: Path) -> None:
    facts = [
        {
            "person": f"p{person}", "record": f"p{person}-{clip}-{phase}", "source": "built",
            "labels": {"clip": clip, "phase": phase, **({"arousal": 1 + (person + 2 * clip) % 5} if n else {})},
        }
        for person in range(6) for clip in range(4) for phase, n in (("baseline", 0), ("stimulus", 1))
        for _ in range(n + 1)
    ]  # fmt: skip
    paired(str(tmp_path / "set"), facts)
    options = options_of(tmp_path, task="dreamer", label="arousal", neutral="drop", protocol="leaky_window")
    set_encoders(options, ecg=str(made / "ecg"), eeg=str(made / "eeg"))
    options.search.pooling = ["mean"]
    said: list[str] = []
    as_they_are = prepare_study(options, str(tmp_path / "features"), said.append)
    assert any(line.startswith("LEAKY SPLIT") for line in said)
    options.tune.baseline = "subtract"
    study = prepare_study(options, str(tmp_path / "features"), quiet)
    assert [study.table.keys[i] for i in range(3)] == [as_they_are.table.keys[i] for i in range(3)]
    rest = study.table.baseline
    assert rest is not None
    assert len(study.table.label) == 48 - sum(one["labels"].get("arousal") == 3 for one in facts) < 48
    for key, x in study.inputs.items():
        signal, sha, _ = key
        (folder,) = [f for f in storage.names(str(tmp_path / "features")) if f.startswith(f"{signal}-{sha[:16]}-")]
        features = open_features(str(tmp_path / "features" / folder))
        own = [rest.sample[rest.period == before][0] for before in rest.before]
        still = pool(features.values[own], features.valid[own], "mean").numpy()
        np.testing.assert_allclose(x, as_they_are.inputs[key] - still, rtol=1e-4, atol=1e-5)
    records = [TrialRecord(row, row, {**CONFIG, "depth": 0}, list(train(study, row, CONFIG))) for row in SEARCHED]
    results = conclude_study(study, records, quiet).results
    assert results["leaky"] is True and results["published"]["value"] == 0.8479
    notes = " ".join(results["notes"])
    for words in ("LEAKY SPLIT", "tune.neutral=drop: arousal is high above 3", "tune.baseline=subtract"):
        assert words in notes
    options.tune.protocol, options.tune.clip = "clip_disjoint", "film"
    with pytest.raises(UserError, match=r"tune\.clip=film"):
        prepare_study(options, str(tmp_path / "features"), quiet)


def test_labels_that_are_constant_over_people_cannot_be_permuted(made: Path, tmp_path: Path) -> None:
    facts = [{"person": f"p{i // 2}", "record": str(i), "labels": {"x": i // 2 % 2}} for i in range(16)]
    paired(str(tmp_path / "set"), facts)
    options = options_of(tmp_path, task="labels", label="x", permutations=3, ecg=str(made / "ecg"))
    set_encoders(options, eeg=str(made / "eeg"))
    with pytest.raises(UserError, match="nobody has recordings of two classes"):
        prepare_study(options, str(tmp_path / "features"), quiet)


def test_an_encoder_of_other_corpora_is_noted(made: Path, tmp_path: Path) -> None:
    for name, sources in (("same", ["built", "more"]), ("other", ["elsewhere"])):
        url = export(str(tmp_path / name), "ecg", people=["00000000000000ff"], sources=sources)
        notes = prepare_study(options_of(made, ecg=url), str(made / "features"), quiet).notes
        told = [note for note in notes if "people are compared by corpus and id" in note]
        assert len(told) == (name == "other")
    assert "pretrained on elsewhere, this set is built" in told[0]


def test_what_does_not_go_together_is_told(made: Path, tmp_path: Path) -> None:
    wide = str(tmp_path / "wide")
    torch.manual_seed(0)
    about = {"signal": "eeg", "rate": 200.0, "unit_uv": 100.0, "channels": ["X"], "simulated": False}
    for name, data in save_encoder(CrissCrossEncoder(preset("base")).eval(), about).items():
        storage.write_bytes(storage.join(wide, name), data)
    eeg = str(made / "eeg")
    slow = export(str(tmp_path / "slow"), "eeg", rate=100.0)
    for more, words in (
        ({"eeg": {0: eeg, 1: eeg}}, ["tune.encoders.eeg has none for fold 2", "0, 1, 2"]),
        ({"eeg": {0: eeg, 1: eeg, 2: eeg, 3: eeg}}, ["unknown folds 3"]),
        ({"eeg": {0: eeg, 1: eeg, 2: wide}}, ["another number of features"]),
        ({"eeg": slow}, ["100 Hz"]),
        ({"ecg": eeg}, ["eeg", "ecg was asked for"]),
        ({"folds": 7}, ["tune.folds=7", "6 people"]),
        ({"label": "tusk"}, ["tusk", "'task'"]),
        ({"protocol": "holdout"}, ["test split"]),
    ):
        with pytest.raises(UserError) as caught:
            prepare_study(options_of(made, **more), str(tmp_path / "features"), quiet)
        assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not storage.names(str(tmp_path / "features"))
