"""A small sweep directory for the tests of the report: synthetic predictions, and results computed from them.

The scores are counted pair by pair and cell by cell, by other means than the report's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

# Distance of the class means in units of the noise: the area under the ROC curve is Phi(d / sqrt(2)).
STRENGTH = {"majority": 0.0, "untrained": 0.5, "handmade": 0.9, "ecg": 0.6, "eeg": 1.1, "fused": 1.5}
# Rows that are there where they were asked for.
ASKED = {"fused_ecg_only": 0.55, "fused_eeg_only": 1.0, "noise_ecg": 1.05, "noise_eeg": 0.5}
BOUNDS = {"bound_ecg": 0.9, "bound_eeg": 1.6, "bound_fused": 2.1}
MODALITIES = {
    "ecg": ["ecg"], "eeg": ["eeg"], "majority": [], "bound_ecg": ["ecg"], "bound_eeg": ["eeg"],
    "fused_ecg_only": ["ecg"], "fused_eeg_only": ["eeg"], "noise_ecg": ["eeg"], "noise_eeg": ["ecg"],
}  # fmt: skip
SEARCHED = ("fused", "ecg", "eeg", "untrained")


def auc_of(label: np.ndarray, score: np.ndarray) -> float | None:
    """Share of pairs in the right order, ties half; None where a class is missing."""
    above, below = score[label == 1], score[label == 0]
    if not above.size or not below.size:
        return None
    return float(np.mean((above[:, None] > below[None]) + 0.5 * (above[:, None] == below[None])))


def scores_of(label: np.ndarray, probability: np.ndarray) -> dict[str, float | None]:
    """The metrics of a row; the areas are means over classes, each against the rest."""
    k = probability.shape[1]
    guess = probability.argmax(axis=1)
    there = [c for c in range(k) if (label == c).any()]
    recalls = [float((guess[label == c] == c).mean()) for c in there]
    f1 = []
    for c in there:
        hit = int(((guess == c) & (label == c)).sum())
        f1.append(2 * hit / max(int((guess == c).sum() + (label == c).sum()), 1))
    curved = [1] if k == 2 else range(k)
    areas = [auc_of((label == c).astype(int), probability[:, c]) for c in curved]
    known = [area for area in areas if area is not None]
    precisions = [average_precision(label == c, probability[:, c]) for c in curved if (label == c).any()]
    return {
        "accuracy": float((guess == label).mean()),
        "balanced_accuracy": float(np.mean(recalls)),
        "macro_f1": float(np.mean(f1)),
        "auc": float(np.mean(known)) if known else None,
        "pr_auc": float(np.mean(precisions)) if precisions else None,
    }


def average_precision(label: np.ndarray, score: np.ndarray) -> float:
    """Mean over the positive windows of the precision among the windows scored at least as high."""
    positive = score[label]
    return float(np.mean([(positive >= cut).sum() / (score >= cut).sum() for cut in positive]))


def predictions_of(
    people: int = 12,
    windows: int = 24,
    classes: Iterable[str] = ("rest", "task"),
    folds: int = 4,
    seed: int = 0,
    bounds: bool = False,
    asked: bool = False,
) -> dict[str, np.ndarray]:
    """Tensors of predictions.safetensors; in each person all classes, in each fold whole people."""
    rng = np.random.default_rng(seed)
    k, n = len(list(classes)), people * windows
    names = np.sort(rng.integers(1, 2**63, people, dtype=np.uint64))
    owner = np.repeat(np.arange(people), windows)
    label = np.tile(np.arange(windows) % k, people)
    tensors = {
        "fold": (owner % folds).astype(np.int64),
        "person": names[owner],
        "recording": (owner * k + label).astype(np.int64),
        "label": label.astype(np.int64),
        "key": np.frombuffer(b"".join(f"w{i:06d}\0".encode() for i in range(n)), np.uint8).reshape(n, 8).copy(),
    }
    target = np.eye(k)[label]
    for row, strength in {**STRENGTH, **(ASKED if asked else {}), **(BOUNDS if bounds else {})}.items():
        # People differ in how well they can be read.
        own = np.clip(rng.normal(1.0, 0.35, people), 0.1, None)[owner, None] if row != "majority" else 0.0
        noise = rng.normal(size=(n, k)) if row != "majority" else np.zeros((n, k))
        logit = strength * own * target + noise / math.sqrt(2) * (1.0 if k == 2 else 1.4)
        if row == "majority":
            logit[:, 0] += 0.1
        odds = np.exp(logit)
        tensors[f"probability.{row}"] = (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
    return tensors


def predictions_file(tensors: dict[str, np.ndarray], classes: Iterable[str], folds: int) -> bytes:
    """The tensors as ``predictions.safetensors``."""
    meta = {"classes": json.dumps(list(classes)), "folds": json.dumps([str(fold) for fold in range(folds)])}
    return bytes(save(tensors, metadata=meta))


def configs_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Configurations as a sweep draws them."""
    rng = np.random.default_rng((seed, 7))
    return [
        {
            "pooling": ["mean", "mean_std", "channels_mean", "channels_mean_std"][int(rng.integers(4))],
            "depth": int(rng.integers(3)),
            "width": int([32, 64, 128][int(rng.integers(3))]),
            "dropout": float([0.0, 0.2, 0.5][int(rng.integers(3))]),
            "label_smoothing": float([0.0, 0.1][int(rng.integers(2))]),
            "lr": float(10 ** rng.uniform(-3.5, -1.5)),
            "weight_decay": float(10 ** rng.uniform(-4, 0)),
        }
        for _ in range(count)
    ]


def occlusion_of(people: int = 12) -> dict[str, Any]:
    """What heads lean on: most on Cz and on the third second."""

    def entry(lost: float, signal: str, **more: Any) -> dict[str, Any]:
        ci = [round(lost - 0.02, 6), round(lost + 0.015, 6)] if people > 1 else None
        return {"signal": signal, **more, "auc_drop": lost, "ci": ci, "prob_shift": abs(lost) / 2}

    channels = {"ecg": ["I", "II"], "eeg": ["Fp1", "Fp2", "Cz"]}
    return {
        "windows": 288, "people": people, "auc": 0.812,
        "signals": [entry(0.041, "ecg"), entry(0.213, "eeg")],
        "channels": [
            entry(0.131 if name == "Cz" else 0.004 * i - 0.003, signal, channel=name)
            for signal, names in channels.items() for i, name in enumerate(names)
        ],
        "patches": [
            entry(0.077 if signal == "eeg" and i == 2 else -0.002, signal, start_s=float(i), seconds=1.0)
            for signal in channels for i in range(5)
        ],
    }  # fmt: skip


def plane_file(tensors: dict[str, np.ndarray], seed: int = 0) -> bytes:
    """embedding.safetensors: people apart, labels not."""
    rng = np.random.default_rng((seed, 17))
    found: dict[str, np.ndarray] = {}
    _, owner = np.unique(tensors["person"], return_inverse=True)
    for signal in ("ecg", "eeg"):
        centre = rng.normal(scale=20, size=(int(owner.max()) + 1, 2))
        found[f"{signal}.place"] = (centre[owner] + rng.normal(size=(len(owner), 2))).astype(np.float32)
        found |= {f"{signal}.person": tensors["person"], f"{signal}.label": tensors["label"]}
    return bytes(save(found))


def trial_lines(count: int = 20, rows: Iterable[str] = SEARCHED, seed: int = 0) -> list[dict[str, Any]]:
    """Trials: better with hidden layers and a middling learning rate; most of the poor ones stopped early."""
    rng = np.random.default_rng((seed, 11))
    lines = []
    for row in rows:
        roof = {"fused": 0.84, "ecg": 0.66, "eeg": 0.77, "untrained": 0.63}[row]
        for number, config in enumerate(configs_of(count, seed)):
            good = roof - 0.03 * (math.log10(config["lr"]) + 2.4) ** 2 + 0.008 * config["depth"]
            good += float(rng.normal(0, 0.012)) - (0.03 if config["pooling"] == "mean" else 0.0)
            stopped = good < roof - 0.02
            epochs = int(rng.integers(4, 12)) if stopped else 40
            history = [[e, good - 0.3 * math.exp(-e / 4) + float(rng.normal(0, 0.006))] for e in range(1, epochs + 1)]
            best = max(value for _, value in history)
            lines.append(
                {
                    "trial": f"{row}-{number:03d}",
                    "row": row,
                    "config": config,
                    "val_auc": best,
                    "epochs": epochs,
                    "stopped": stopped,
                    "seconds": 0.4 * epochs,
                    "history": history,
                }
            )
    return lines


def results_of(
    tensors: dict[str, np.ndarray],
    classes: Iterable[str],
    simulated: bool = False,
    protocol: str = "grouped_kfold",
    trials: int = 20,
    permuted: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """results.json of these predictions."""
    label, fold, person = tensors["label"], tensors["fold"], tensors["person"]
    named, folds = list(classes), sorted(set(fold.tolist()))
    tried = sorted(trial_lines(trials, seed=seed), key=lambda line: -line["val_auc"])
    best = {name: [line["config"] for line in tried if line["row"] == name][:4] for name in SEARCHED}
    rows = []
    for key in sorted(
        (key for key in tensors if key.startswith("probability.")),
        key=[f"probability.{name}" for name in (*STRENGTH, *ASKED, *BOUNDS)].index,
    ):
        name, probability = key.removeprefix("probability."), tensors[key].astype(np.float64)
        whole = scores_of(label, probability)
        parts = []
        for number in folds:
            mine = fold == number
            parts.append(
                {"fold": str(number), "people": len(set(person[mine].tolist())), "windows": int(mine.sum())}
                | scores_of(label[mine], probability[mine])
                | {"config": best[name][number**2 % len(best[name])] if name in SEARCHED else None}
                | {"epoch": 5 + number if name in SEARCHED else None}
            )
        spread = {}
        for score in whole:
            values = [part[score] for part in parts if part[score] is not None]
            spread[score] = float(np.std(values, ddof=1)) if len(values) > 1 else None
        table = np.zeros((len(named), len(named)), int)
        np.add.at(table, (label, probability.argmax(axis=1)), 1)
        auc = whole["auc"]
        ends = None if auc is None else [max(auc - 0.05, 0.0), min(auc + 0.04, 1.0)]
        row = {"name": name, "modalities": MODALITIES.get(name, ["ecg", "eeg"])} | whole
        rows.append(row | {"auc_ci": ends, "per_fold": parts, "spread": spread, "confusion": table.tolist()})
    results = {
        "task": "labels",
        "label": "arousal",
        "classes": named,
        "protocol": protocol,
        "windows": int(label.size),
        "people": len(set(person.tolist())),
        "folds": [{"fold": str(fold)} for fold in folds],
        "simulated": simulated,
        "encoders": {
            "ecg": {"url": "s3://key:secret@bucket/ecg-encoder", "sha256": "ab" * 32, "simulated": simulated},
            "eeg": {"url": "s3://bucket/eeg-encoder", "sha256": "cd" * 32, "simulated": simulated},
        },
        "selection": {"rule": "for each row and fold the best AUC on that fold's validation people"},
        "rows": rows,
        "notes": ["One person has windows of one class only."],
        "occlusion": occlusion_of(),
        "embedding": {
            "neighbours": 10,
            **{
                signal: {"windows": 288, "people": 12, "person": own, "person_chance": 0.08, "label": 0.55,
                         "label_chance": 0.5}
                for signal, own in (("ecg", 0.41), ("eeg", 0.83))
            },
        },
    }  # fmt: skip
    if permuted:
        values = 0.5 + 0.03 * np.random.default_rng((seed, 13)).normal(size=permuted)
        results["permuted"] = {"n": permuted, "auc": values.tolist(), "p": 1 / (permuted + 1)}
    return results


def sweep_config(name: str = "fusion") -> str:
    """A resolved configuration."""
    return f"""run:
  name: {json.dumps(name)}
  dir: runs
  seed: 0
tune:
  data: s3://someone:secret@bucket/paired
  task: labels
  label: arousal
  protocol: grouped_kfold
  folds: 4
  trials: 20
  scheduler: asha
"""


def paired_data(simulated: bool = False) -> dict[str, Any]:
    """The paired shard set's description."""
    signals = {"ecg": ["I", "II"], "eeg": ["Fp1", "Fp2", "Cz"]}
    channels = [name for names in signals.values() for name in names]
    index: dict[str, Any] = {"url": "s3://someone:secret@bucket/paired/index.json", "fingerprint": "ab34" * 16}
    index |= {"splits": {"train": 288}, "people": 12, "rate": 200, "channels": channels, "simulated": simulated}
    return {"indexes": [index | {"signals": signals, "sources": ["simulate"]}], "encoders": {}}


def write_sweep(
    folder: Path,
    people: int = 12,
    windows: int = 24,
    classes: Iterable[str] = ("rest", "task"),
    folds: int = 4,
    simulated: bool = False,
    tries: int = 20,
    permuted: int = 0,
    protocol: str = "grouped_kfold",
    seed: int = 0,
    **changes: bytes | None,
) -> Path:
    """A whole sweep in ``folder``; ``changes`` give a file other bytes or, with None, leave it out."""
    named = list(classes)
    tensors = predictions_of(people, windows, named, folds, seed, bounds=simulated)
    results = results_of(tensors, named, simulated, protocol, tries, permuted, seed)
    files: dict[str, bytes | None] = {
        "config.yaml": sweep_config().encode(),
        "results.json": json.dumps(results).encode(),
        "predictions.safetensors": predictions_file(tensors, named, folds),
        "embedding.safetensors": plane_file(tensors, seed),
        "trials.jsonl": "".join(json.dumps(line) + "\n" for line in trial_lines(tries, seed=seed)).encode(),
        "data.json": json.dumps(paired_data(simulated)).encode(),
    }
    names = {name.split(".")[0]: name for name in files}
    files |= {names[stem]: content for stem, content in changes.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if content is not None:
            (folder / name).write_bytes(content)
    return folder
