"""What heads lean on, where one electrode and one moment alone carry the label; and features on a plane."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_tensors

from physio_dist.data.format.index import open_set
from physio_dist.evaluation.analysis import embedding, occlusion
from physio_dist.evaluation.clips import BaselinePeriod
from physio_dist.evaluation.label_table import load_label_table
from physio_dist.evaluation.pooling import pool_features
from physio_dist.evaluation.trained_heads import train_selected
from physio_dist.evaluation.trials import SEARCHED, Choice, EncoderKey, InputKey, Study, TrialRecord, train
from physio_dist.models.fusion.heads import input_kind
from physio_dist.models.fusion.pooling import make_tokens
from tests.evaluation.study_samples import (
    CONFIG,
    changed,
    conclude_study,
    facts_of,
    opened,
    publish_set,
    study_of,
    waves,
    write_features,
)

pytestmark = pytest.mark.integration

EEG = ("Fz", "Cz", "Pz", "Oz")
TELLS, WHEN = 2, 1


def quiet(_: str) -> None:
    pass


def made(folder: Path, configs: list[dict[str, Any]], strength: float = 3.0, people: int = 9) -> Study:
    """Frozen features that are noise around a level of each channel's own; the label is in one electrode, at one
    patch of three. In some windows another electrode is not valid, in some that one, in some the ECG is missing."""
    rng = np.random.default_rng(0)
    facts = facts_of(people=people, recordings=2, windows=6)
    n = len(facts)
    valid = {"ecg": np.ones((n, 2), bool), "eeg": np.ones((n, 4), bool)}
    valid["eeg"][::7, 0] = valid["eeg"][3::11, TELLS] = valid["ecg"][5::13] = False
    waveforms = {"ecg": (waves(n), ("I", "II"), 1.0), "eeg": (waves(n, 4), EEG, 0.1)}
    url = str(folder / "set")
    shards = publish_set(url, facts, waveforms, valid=valid)
    table = load_label_table(opened(url), "eegmat", None)
    values = {name: rng.standard_normal((n, flags.shape[1], 3, 5)) for name, flags in valid.items()}
    for name, x in values.items():
        x += rng.standard_normal((1, x.shape[1], 1, 5))
        x[~valid[name]] = 0
    values["eeg"][:, TELLS, WHEN, 3] += strength * table.label * valid["eeg"][:, TELLS]
    kinds = {input_kind(config) for config in configs}
    inputs, features = {}, {}
    for name, x in values.items():
        features[EncoderKey(name, f"{name}-a")] = write_features(str(folder / name), x, valid[name], table.keys, name)
        for kind in kinds:
            own = make_tokens(x.astype(np.float32), valid[name], kind)[0].numpy()
            inputs |= {InputKey(name, f"{name}-a", kind): own, InputKey(name, f"{name}-u", kind): rng.permutation(own)}
    blank = np.zeros((n, 1), np.float32)
    study = study_of(table, blank, blank, epochs=12)
    study.options.tune.data, study.options.tune.task = shards.url, "eegmat"
    study = changed(study, inputs=inputs, valid=valid)
    return replace(study, features=features)


def top(entries: list[Any], signal: str = "eeg") -> list[Any]:
    return sorted((one for one in entries if one.signal == signal), key=lambda one: -one.auc_drop)


@pytest.mark.parametrize(
    ("pooling", "head"),
    [
        ("mean", "concat"), ("channels_mean_std", "concat"), ("mean_std", "late"), ("attention", "gated"),
        ("channels_attention", "concat"), ("channels_mean", "cross_attention"),
    ],
)  # fmt: skip
def test_the_electrode_and_the_patch_that_carry_the_label_come_out_on_top(
    tmp_path: Path, pooling: str, head: str
) -> None:
    config = {**CONFIG, "pooling": pooling, "head": head, "dropout": 0.0, "depth": 0, "lr": 0.03}
    study = made(tmp_path, [config], 12.0)
    choices = [Choice(config, 12, 0.9)] * len(study.folds)
    trained = train_selected(study, "fused", choices)
    found = occlusion.occlusion(study, trained, open_set(study.options.tune.data))
    assert (found.windows, found.people) == (108, 9)
    assert [(one.signal, one.channel) for one in found.channels] == [
        ("ecg", "I"), ("ecg", "II"), *(("eeg", name) for name in EEG)
    ]  # fmt: skip
    assert [(one.start_s, one.seconds) for one in found.patches[3:]] == [(0, 1), (1, 1), (2, 1)]
    assert found.auc > 0.75
    best, second = top(found.channels)[:2]
    assert best.channel == EEG[TELLS] and best.auc_drop > 0.15 and best.ci[0] > 0
    assert best.auc_drop > 4 * abs(second.auc_drop) and best.prob_shift > 2 * second.prob_shift
    assert best.auc_drop > 4 * max(abs(one.auc_drop) for one in top(found.channels, "ecg"))
    best, second = top(found.patches)[:2]
    assert best.start_s == WHEN and best.auc_drop > 0.1
    assert best.auc_drop > 3 * abs(second.auc_drop)
    assert [one.signal for one in found.signals] == ["ecg", "eeg"]
    # Noise does no good: without it a late head is the better for it.
    assert found.signals[1].auc_drop > 0.15 and found.signals[0].auc_drop < 0.04


def test_withheld_as_it_is_defined(tmp_path: Path) -> None:
    """Against features that are changed and pooled anew."""
    study = made(tmp_path, [{"pooling": kind} for kind in ("mean", "channels_mean_std", "attention")])
    rows, others = np.arange(20), np.arange(20, 100)
    one = occlusion._OpenedFeatures(study, EncoderKey("eeg", "eeg-a"), np.arange(108))
    values, valid = np.array(one.features.values), one.features.valid
    mean = np.stack([values[others, c].mean(axis=1)[valid[others, c]].mean(axis=0) for c in range(4)])
    np.testing.assert_allclose(one.means(others, "mean"), mean, rtol=1e-4)
    for channel in range(4):
        other = values.copy()
        other[:, channel] = np.where(valid[:, channel, None, None], mean[channel], 0)
        for kind in ("mean", "attention"):
            wanted = make_tokens(other[rows], valid[rows], kind)[0].numpy()
            given = study.inputs[InputKey("eeg", "eeg-a", kind)][rows]
            found = one.without_channel(given, rows, kind, one.means(others, kind), channel)
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
        given = study.inputs[InputKey("eeg", "eeg-a", "channels_mean_std")][rows]
        means = one.means(others, "channels_mean_std")
        found = one.without_channel(given, rows, "channels_mean_std", means, channel).reshape(20, 4, 10)
        there = valid[rows, channel]
        np.testing.assert_allclose(found[there, channel], np.broadcast_to(means[channel], (there.sum(), 10)))
        assert not found[~there, channel].any()
        assert np.array_equal(np.delete(found, channel, 1), np.delete(given.reshape(20, 4, 10), channel, 1))
    given = study.inputs[InputKey("eeg", "eeg-a", "channels_mean_std")][rows]
    for patch, found in enumerate(one.without_patches(given, rows, "channels_mean_std")):
        wanted = make_tokens(np.delete(values[rows], patch, 2), valid[rows], "channels_mean_std")[0].numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_the_rest_before_a_clip_stays_subtracted(tmp_path: Path) -> None:
    study = made(tmp_path, [{"pooling": kind} for kind in ("mean", "attention")])
    rest = BaselinePeriod(np.arange(100, 108), np.arange(8) // 2, np.arange(100) % 4)
    table = study.table
    some = np.arange(0, 100, 2)
    study = replace(study, table=replace(table, baseline=rest, sample=table.sample[:100], keys=table.keys[:100]))
    one = occlusion._OpenedFeatures(study, EncoderKey("ecg", "ecg-a"), some)
    there = one.valid(some).all(axis=1)
    mine = rest.select(some)
    wanted = pool_features(one.features, some, "mean", mine)
    np.testing.assert_allclose(one.by_channel(some, "mean").mean(axis=1)[there], wanted[there], rtol=1e-3, atol=1e-4)
    given = pool_features(one.features, some, "attention", mine)
    means = one.means(some, "attention")
    # With both channels withheld nothing is left but their means, whatever the window and its rest.
    twice = one.without_channel(one.without_channel(given, some, "attention", means, 0), some, "attention", means, 1)
    spread = np.abs(twice[there].mean(axis=1) - means.mean(axis=0)).max()
    assert spread < 1e-3 < np.abs(given[there].mean(axis=1) - means.mean(axis=0)).max()


def test_a_study_tells_it_and_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = [{**CONFIG, "pooling": kind, "depth": 0} for kind in ("mean", "channels_mean_std")]
    study = made(tmp_path, configs)
    records = [
        TrialRecord(f"{row}-{i}", row, config, list(train(study, row, config)))
        for row in SEARCHED for i, config in enumerate(configs)
    ]  # fmt: skip
    first = conclude_study(study, records, quiet)
    results = json.loads(json.dumps(first.results, allow_nan=False))
    fused = next(row for row in results["rows"] if row["name"] == "fused")
    assert results["occlusion"]["auc"] == pytest.approx(fused["auc"], abs=1e-4)
    areas = {row["name"]: row["auc"] for row in results["rows"]}
    told = {(one["row"], one["minus"]): one for one in results["differences"]}
    assert list(told) == [("fused", name) for name in ("untrained", "handmade", "ecg", "eeg")]
    for (row, minus), one in told.items():
        assert one["auc"] == pytest.approx(areas[row] - areas[minus], abs=2e-6)
        assert one["ci"][0] <= one["auc"] <= one["ci"][1] and 0 < one["p"] <= 1
    assert told["fused", "untrained"]["p"] < 0.1
    tensors = load_tensors(first.embedding)
    assert tensors["eeg.place"].shape == (108, 2) and tensors["ecg.place"].shape[0] == 108 - 8
    assert np.array_equal(tensors["eeg.label"], study.table.label)
    assert np.array_equal(tensors["eeg.person"], study.table.person)
    assert results["embedding"]["ecg"]["windows"] == 100 and results["embedding"]["ecg"]["people"] == 9
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - threads if threads in (1, 2) else 1)
    again = conclude_study(study, records, quiet)
    torch.set_num_threads(threads)
    assert json.dumps(again.results) == json.dumps(first.results) and again.embedding == first.embedding
    monkeypatch.setattr(occlusion, "_MAX_WINDOWS", 60)
    monkeypatch.setattr(embedding, "_MOST_WINDOWS", 50)
    fewer = conclude_study(study, records, quiet)
    assert fewer.results["occlusion"]["windows"] == 60 and fewer.results["embedding"]["eeg"]["windows"] == 50


def test_neighbours_tell_people_from_labels() -> None:
    rng = np.random.default_rng(0)
    person = np.repeat(np.arange(10, dtype=np.uint64), 20)
    label = np.tile(np.arange(20) // 10, 10)
    x = rng.standard_normal((200, 4))
    nothing = embedding.neighbours(x, person, label)
    assert nothing["person"] == pytest.approx(nothing["person_chance"], abs=0.03)
    assert nothing["person_chance"] == pytest.approx(19 / 199, abs=1e-6)
    assert nothing["label_chance"] == 0.5 and nothing["label"] == pytest.approx(0.5, abs=0.05)
    people = embedding.neighbours(x + 30 * rng.standard_normal((10, 4))[person.astype(int)], person, label)
    assert people["person"] > 0.95 and people["label"] == pytest.approx(0.5, abs=0.1)
    # A recording of somebody has one label: it lies together, and says nothing of anybody else's.
    level = 30 * rng.standard_normal((20, 4))[2 * person.astype(int) + label]
    recordings = embedding.neighbours(x + level, person, label)
    assert recordings["person"] > 0.88 and recordings["label"] == pytest.approx(0.5, abs=0.2)
    labels = embedding.neighbours(x + 30.0 * label[:, None], person, label)
    assert labels["label"] == 1.0 and labels["person"] < 0.3
    alone = embedding.neighbours(x[:20], person[:20], label[:20])
    assert alone["person"] == 1.0 and math.isnan(alone["label"]) and math.isnan(alone["label_chance"])


def test_a_channel_that_is_missing_puts_nobody_together() -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    valid = np.array([[True, True], [True, False], [True, True]])
    assert embedding._filled(values, valid).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    valid[2, 1] = False
    assert embedding._filled(values, valid)[1:, 2:].tolist() == [[2, 3], [2, 3]]
