"""Training of heads beside concatenation, of heads that do with one modality, and what no head may learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load as load_tensors
from torch.nn.functional import cross_entropy

from physio_dist.config.search import HEADS
from physio_dist.errors import UserError
from physio_dist.evaluation.controls import permuted_label_aucs, with_noise
from physio_dist.evaluation.head_training import Heads, Job
from physio_dist.evaluation.trained_heads import train_selected
from physio_dist.evaluation.trials import (
    SEARCHED,
    Choice,
    EncoderRole,
    InputKey,
    ReductionKey,
    Study,
    TrialRecord,
    reductions_of,
    train,
)
from physio_dist.models.fusion.heads import build_head, input_kind
from physio_dist.stats.scores import auc, calibration_error, fit_temperature
from tests.evaluation.study_samples import CONFIG, changed, conclude_study, features_of, job_of, study_of, table_of

pytestmark = pytest.mark.integration

N = 90
RNG = np.random.default_rng(3)
LABEL = RNG.integers(0, 2, N)
VECTORS = {"ecg": features_of(LABEL, 1.0, 3, 1), "eeg": features_of(LABEL, 1.5, 5, 2)}
TOKENS = {
    name: (x[:, None, :] + RNG.standard_normal((N, many, x.shape[1]))).astype(np.float32)
    for many, (name, x) in zip((4, 2), VECTORS.items(), strict=True)
}
# ECG missing in ten windows, EEG in ten others, both in three.
SHOWN = {"ecg": np.ones((N, 1), dtype=bool), "eeg": np.ones((N, 1), dtype=bool)}
SHOWN["ecg"][10:20] = SHOWN["eeg"][30:40] = SHOWN["ecg"][50:53] = SHOWN["eeg"][50:53] = False


def config(kind: str, **more: Any) -> dict[str, Any]:
    return {**CONFIG, "head": kind, "dropout": 0.0, **more}


def trained(some: Sequence[Job], how: dict[str, Any], epochs: int = 3) -> Heads:
    heads = Heads(some, 2, how)
    for _ in range(epochs):
        heads.epoch()
    return heads


@pytest.mark.parametrize("inputs", [VECTORS, TOKENS], ids=["vectors", "tokens"])
@pytest.mark.parametrize("kind", HEADS)
def test_heads_trained_together_equal_heads_trained_alone(kind: str, inputs: dict[str, np.ndarray]) -> None:
    """With dropout of both sorts, missing modalities and unequal numbers of rows."""
    how = config(kind, dropout=0.3, modality_dropout=0.5, class_weight="balanced", depth=2)
    ranges = (np.arange(0, 80), np.arange(25, 88, 2))
    jobs = [job_of(inputs, LABEL, mine, f"0/{i}", available=SHOWN) for i, mine in enumerate(ranges)]
    valid = [np.arange(0, 60), np.arange(45, 90)]
    together = trained(jobs, how).probability(valid)
    for i, job in enumerate(jobs):
        (alone,) = trained([job], how).probability([valid[i]])
        np.testing.assert_allclose(together[i], alone, atol=1e-4)


@pytest.mark.parametrize("weight", ["none", "balanced"])
@pytest.mark.parametrize("kind", HEADS)
def test_head_training_is_adamw_on_cross_entropy(kind: str, weight: str) -> None:
    """Steps on all rows, done again with torch alone; a late head is a head for each modality."""
    mine = np.r_[np.flatnonzero(LABEL == 0)[:35], np.flatnonzero(LABEL == 1)[:12]]
    how = config(kind, weight_decay=0.3, class_weight=weight)
    job = job_of(TOKENS, LABEL, mine, "x", available=SHOWN)
    heads = Heads([job], 2, how)
    model = heads.head(0)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, 0.01)
    x = {name: torch.from_numpy(values[mine]) for name, values in TOKENS.items()}
    there = {name: torch.from_numpy(mask[mine]) for name, mask in SHOWN.items()}
    label = torch.from_numpy(LABEL[mine])
    share = torch.tensor([47 / 70, 47 / 24]) if weight == "balanced" else None
    seen = {name: mask[:, 0] for name, mask in there.items()}
    either = seen["ecg"] | seen["eeg"]
    for _ in range(3):
        heads.epoch()
        optimizer.zero_grad()
        if kind == "late":
            mask = model.token_mask(there, len(mine))
            logits, _ = model.branch_logits(model.concatenate(x, mask), None, mask)
            loss = sum(
                cross_entropy(logits[seen[name], i], label[seen[name]], share) for i, name in enumerate(("ecg", "eeg"))
            )
        else:
            loss = cross_entropy(model(x, there)[either], label[either], share)
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
    wanted = model(x, there).softmax(1).detach().numpy()
    np.testing.assert_allclose(heads.probability([mine])[0], wanted, atol=2e-5)


def test_late_head_equals_heads_of_its_modalities() -> None:
    how, rows = config("late"), np.arange(70)
    late = trained([job_of(VECTORS, LABEL, rows, "x", available=SHOWN)], how)
    everything = np.arange(N)
    both, ecg, eeg = (late.probability([everything], only)[0] for only in (None, "ecg", "eeg"))
    whole = SHOWN["ecg"][:, 0] & SHOWN["eeg"][:, 0]
    np.testing.assert_allclose(both[whole], ((ecg + eeg) / 2)[whole], atol=1e-6)
    np.testing.assert_allclose(both[10:20], eeg[10:20], atol=1e-6)
    np.testing.assert_allclose(both[30:40], ecg[30:40], atol=1e-6)
    assert np.abs(ecg - eeg)[whole].max() > 0.1


@pytest.mark.parametrize("kind", HEADS)
def test_missing_windows_and_modalities_do_not_affect_training(kind: str) -> None:
    rows, how = np.arange(80), config(kind, modality_dropout=0.3)
    spoilt, label = {name: x.copy() for name, x in VECTORS.items()}, LABEL.copy()
    for name, x in spoilt.items():
        x[~SHOWN[name][:, 0]] = np.nan
    label[50:53] = 1 - label[50:53]

    def said(inputs: dict[str, np.ndarray], label: np.ndarray) -> np.ndarray:
        encoders = {EncoderRole(name, pretrained): ("a",) for name in inputs for pretrained in (True, False)}
        fold = study_of(table_of(), *(np.zeros((144, 1), np.float32),) * 2).folds[0]
        fold = replace(fold, inner=((rows, np.arange(80, 90)),))
        keyed = {InputKey(name, "a", "mean"): x for name, x in inputs.items()}
        found = reductions_of(keyed, encoders, [fold], 64, SHOWN)
        reductions = {name: found[ReductionKey(InputKey(name, "a", "mean"), fold.name, 0)] for name in inputs}
        return trained([Job(inputs, reductions, label, rows, "x", SHOWN)], how).probability([np.arange(N)])[0]

    found = said(VECTORS, LABEL)
    assert np.isfinite(found).all() and np.array_equal(found, said(spoilt, label))
    only = {"ecg": VECTORS["ecg"]}
    label[10:20] = 1 - label[10:20]
    assert np.array_equal(said(only, LABEL), said({"ecg": spoilt["ecg"]}, label))


def test_modality_dropout_keeps_one_modality_at_requested_rate() -> None:
    job = job_of(TOKENS, LABEL, np.arange(80), "x", available=SHOWN)
    heads = Heads([job] * 2, 2, config("gated", modality_dropout=0.4))
    rows = [np.tile(np.arange(60, 90), 100), np.arange(0, 60)]
    _, before = heads._gather(rows)
    after = heads._drop_modalities(rows, before)
    assert not (after & ~before).any()
    ecg, eeg = (heads._shape.present(after)[0, :, i] for i in (0, 1))
    assert (ecg | eeg).all()
    for alone in (ecg & ~eeg, eeg & ~ecg):
        assert float(alone.float().mean()) == pytest.approx(0.2, abs=0.03)
    # All tokens of it or none; a window with one modality keeps it, one without any has none.
    assert torch.equal(after[0].sum(1), 4 * ecg + 2 * eeg)
    single = torch.from_numpy((SHOWN["ecg"] ^ SHOWN["eeg"])[:60, 0])
    assert torch.equal(after[1, :60][single], before[1, :60][single])
    assert not torch.equal(after[1, :60], before[1, :60])


def test_saved_head_returns_same_probabilities() -> None:
    rows = np.arange(60)
    jobs = [job_of(TOKENS, LABEL, rows, "x", available=SHOWN), job_of(TOKENS, LABEL, rows[::2], "y")]
    heads = trained(jobs, config("gated"))
    heads.calibrate([np.arange(60, 90)] * 2)
    kept = heads.head(1)
    again = build_head(json.loads(json.dumps(kept.to_dict())))
    again.load_state_dict(kept.state_dict())
    x = {name: torch.from_numpy(values) for name, values in TOKENS.items()}
    with torch.no_grad():
        found = again.eval()(x).softmax(1).numpy()
    np.testing.assert_allclose(found, heads.probability([np.arange(N)] * 2)[1], atol=1e-5)
    assert float(kept.get_buffer("temperature")) != 1.0


def test_temperature_calibrates_overconfident_logits() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((20_000, 3)) * 1.5
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    label = (shares.cumsum(1) < rng.random((20_000, 1))).sum(1)
    for factor in (0.3, 1.0, 4.0):
        assert fit_temperature(label, factor * logits) == pytest.approx(factor, rel=0.05)
    bold = np.exp(4 * logits) / np.exp(4 * logits).sum(1, keepdims=True)
    assert calibration_error(label, shares) < 0.02 < 0.1 < calibration_error(label, bold)  # type: ignore[operator]
    assert fit_temperature(label[:0], logits[:0]) == 1.0
    # All right, and so the bolder the better, but not without end.
    assert 0.05 <= fit_temperature(np.zeros(3, dtype=np.int64), np.array([[9.0, 0.0]] * 3)) < 0.5


def test_calibration_error_matches_direct_computation() -> None:
    probability = np.array([[0.9, 0.1], [0.92, 0.08], [0.3, 0.7], [0.45, 0.55]])
    label = np.array([0, 1, 1, 1])
    # Two windows near 0.91, half of them right; one at 0.7 and one at 0.55, both right.
    wanted = (2 * (0.91 - 0.5) + 0.3 + 0.45) / 4
    assert calibration_error(label, probability) == pytest.approx(wanted)
    assert calibration_error(label[:0], probability[:0]) is None


TABLE = table_of(people=12, recordings=2, windows=8)


def simulated(kind: str, strengths: tuple[float, float] = (1.5, 1.5), **search: Any) -> tuple[Study, dict[str, Any]]:
    """Two modalities that tell the class independently, ECG as vectors and EEG too; or as the tokens that it reads."""
    ecg, eeg = (features_of(TABLE.label, s, 3, i) for i, s in enumerate(strengths))
    study = study_of(TABLE, ecg, eeg, epochs=12)
    if kind == "cross_attention":
        rng = np.random.default_rng(9)
        inputs = {
            key._replace(pooling="attention"):
                (x[:, None, :] + 0.3 * rng.standard_normal((len(x), 4, x.shape[1]))).astype(np.float32)
            for key, x in study.inputs.items()
        }  # fmt: skip
        study = changed(study, inputs=inputs)
    for name, value in search.items():
        setattr(study.options.search, name, value)
    return study, config(kind, dropout=0.2, lr=0.02)


def area(study: Study, parts: Sequence[np.ndarray]) -> float:
    rows = np.concatenate([fold.test for fold in study.folds])
    found = auc(study.table.label[rows], np.concatenate(list(parts)))
    assert found is not None
    return found


@pytest.mark.parametrize("kind", HEADS)
def test_fused_head_with_one_modality_matches_single_head(kind: str) -> None:
    study, how = simulated(kind)
    choices = [Choice({**how, "modality_dropout": 0.5}, 12, 0.5)] * 3
    fused = train_selected(study, "fused", choices, ("ecg", "eeg"))
    both = area(study, fused.probability)
    for signal in ("ecg", "eeg"):
        single = area(study, train_selected(study, signal, choices).probability)
        assert both > single + 0.03 and both > 0.9
        assert area(study, fused.ablated[signal]) == pytest.approx(single, abs=0.05)


@pytest.mark.parametrize("kind", HEADS)
def test_noise_modality_gains_nothing(kind: str) -> None:
    study, how = simulated(kind)
    choices = [Choice(how, 12, 0.5)] * 3
    single = area(study, train_selected(study, "eeg", choices).probability)
    other = with_noise(study, "ecg")
    noise, fused = (area(study, train_selected(each, "fused", choices).probability) for each in (other, study))
    assert noise < single + 0.02 < fused
    key = next(key for key in study.inputs if key.encoder == ("ecg", "ecg-a"))
    assert abs(np.corrcoef(other.inputs[key].reshape(len(TABLE.label), -1)[:, 0], TABLE.label)[0, 1]) < 0.2
    assert all(other.inputs[key] is x for key, x in study.inputs.items() if key.signal == "eeg")


@pytest.mark.parametrize("kind", HEADS)
def test_permuted_labels_are_at_chance(kind: str) -> None:
    study, how = simulated(kind)
    areas = permuted_label_aucs(study, [Choice({**how, "modality_dropout": 0.3}, 6, 0.5)] * 3, 10)
    assert len(set(areas)) == 10 and 0.4 < np.mean(areas) < 0.6


def test_study_rows_of_missing_modalities_noise_and_calibration() -> None:
    """ECG missing in some windows; heads of two kinds to choose from; twice the same bytes."""
    study, how = simulated("late", modality_dropout=[0.0, 0.5], head=["late", "gated"])
    valid = np.ones((len(TABLE.label), 2), dtype=bool)
    valid[::7] = False
    valid[3, 1] = False
    study = changed(study, valid={"ecg": valid})
    study.options.tune.calibrate = study.options.tune.noise_control = True
    study.options.tune.max_epochs = 8
    configs = [{**how, "modality_dropout": 0.5}, {**how, "head": "gated", "modality_dropout": 0.5}]
    records = [
        TrialRecord(f"{row}-{i}", row, one, list(train(study, row, one)))
        for row in SEARCHED for i, one in enumerate(configs)
    ]  # fmt: skip
    found = conclude_study(study, records, lambda _: None)
    rows = {row["name"]: row for row in found.results["rows"]}
    assert list(rows)[5:] == ["fused", "fused_ecg_only", "fused_eeg_only", "noise_ecg", "noise_eeg"]
    assert [rows[name]["modalities"] for name in list(rows)[6:]] == [["ecg"], ["eeg"], ["eeg"], ["ecg"]]
    assert set(load_tensors(found.predictions)) >= {f"probability.{name}" for name in rows}
    assert all(0 <= row["ece"] <= 1 for row in rows.values())
    assert [name for name, row in rows.items() if "ece_before" in row] == ["untrained", "ecg", "eeg", "fused"]
    assert rows["fused"]["auc"] > rows["fused_eeg_only"]["auc"] > 0.7
    assert rows["noise_ecg"]["auc"] < rows["eeg"]["auc"] + 0.03
    # Windows without ECG: the row of ECG tells nothing about them, all are alike within a fold.
    tensors = load_tensors(found.predictions)
    for number in range(3):
        mine = (tensors["fold"] == number) & ~valid.any(1)
        assert mine.sum() > 1 and np.ptp(tensors["probability.ecg"][mine, 0]) < 1e-6
        np.testing.assert_allclose(
            tensors["probability.fused"][mine], tensors["probability.fused_eeg_only"][mine], atol=1e-6
        )
    again = conclude_study(study, records[::-1], lambda _: None)
    assert json.dumps(again.results) == json.dumps(found.results) and again.predictions == found.predictions


def test_temperatures_come_from_validation_people_and_keep_ranking() -> None:
    study, how = simulated("concat")
    study.options.tune.calibrate = True
    choices = [Choice({**how, "lr": 0.05}, 12, 0.5)]
    study = replace(study, folds=(replace(study.folds[0], inner=study.folds[0].inner[:1]),))
    heads = train_selected(study, "fused", choices)
    assert heads.uncalibrated is not None
    before, after = (
        np.log(p[:, 1] / p[:, 0]).astype(np.float64) for p in (heads.uncalibrated[0], heads.probability[0])
    )
    ratio = before / after
    assert np.ptp(ratio) < 1e-2 and abs(ratio[0] - 1) > 0.02
    label = TABLE.label.copy()
    label[study.folds[0].test] = 1 - label[study.folds[0].test]
    other = replace(study, table=replace(TABLE, label=label))
    assert np.array_equal(train_selected(other, "fused", choices).probability[0], heads.probability[0])


@pytest.mark.parametrize("kind", HEADS)
def test_saved_heads_give_probabilities_of_study(kind: str) -> None:
    study, how = simulated(kind)
    study.options.tune.calibrate = True
    choices = [Choice(how, 3, 0.5)] * 3
    trained_once = train_selected(study, "fused", choices)
    wanted = trained_once.probability
    for number, (fold, (heads,)) in enumerate(zip(study.folds, trained_once.heads, strict=True)):
        keys = study.keys_of("fused", input_kind({**how, "pooling": "mean"}), number)
        x = {signal: torch.from_numpy(study.inputs[key][fold.test]) for signal, key in keys.items()}
        with torch.no_grad():
            found = torch.stack([head(x).softmax(1) for head in heads]).mean(0)
        np.testing.assert_allclose(found.numpy(), wanted[number], atol=1e-5)


def test_study_raises_on_modality_without_training_rows() -> None:
    study, _ = simulated("concat")
    valid = np.zeros((len(TABLE.label), 2), dtype=bool)
    valid[study.folds[0].test] = True
    with pytest.raises(UserError, match=r"fold 0: the EEG is missing in all windows of the people"):
        changed(study, valid={"eeg": valid})
