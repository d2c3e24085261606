"""Small paired shard sets, tables and studies with a signal that is known."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from safetensors.numpy import save as save_safetensors

from physio_dist import storage
from physio_dist.config import CacheOptions, TuneConfig
from physio_dist.data.format import tar
from physio_dist.data.format.index import SPLITS, ShardInfo, ShardSet, SignalInfo, fingerprint_of, open_set
from physio_dist.data.format.people import pseudonym
from physio_dist.data.format.sample_table import SampleTable, key_table, publish
from physio_dist.data.handle import ShardSetHandle, open_handle
from physio_dist.evaluation.features import FORMAT, INDEX, KIND
from physio_dist.evaluation.head_training import Job
from physio_dist.evaluation.label_table import LabelTable
from physio_dist.evaluation.results import Outcome
from physio_dist.evaluation.splits import folds_of
from physio_dist.evaluation.study import conclude, prepare
from physio_dist.evaluation.trials import EncoderRole, InputKey, Study, TrialRecord, reductions_of
from physio_dist.models.fusion.reduction import fit_reduction

CONFIG: dict[str, Any] = {
    "pooling": "mean", "components": 64, "depth": 1, "width": 8, "dropout": 0.2, "label_smoothing": 0.0, "lr": 0.01,
    "weight_decay": 0.01,
}  # fmt: skip


def opened(url: str) -> ShardSetHandle:
    """A shard set, with a cache at the default place."""
    return open_handle(url, CacheOptions())


def prepare_study(options: TuneConfig, features_url: str, say: Callable[[str], None]) -> Study:
    """Prepare a study of the shard set that its options name."""
    return prepare(options, open_handle(options.tune.data, options.data), features_url, say)


def conclude_study(study: Study, records: Sequence[TrialRecord], say: Callable[[str], None]) -> Outcome:
    """Conclude a study, with its shard set where it has frozen features of one."""
    return conclude(study, records, say, opened(study.options.tune.data) if study.features else None)


def waves(n: int, channels: int = 2, length: int = 400, seed: int = 0) -> np.ndarray:
    """int16 ``[n, channel, time]``."""
    return np.random.default_rng(seed).integers(-900, 900, (n, channels, length)).astype(np.int16)


def publish_set(
    url: str,
    facts: Sequence[dict[str, Any]],
    signals: dict[str, tuple[np.ndarray, tuple[str, ...], float]],
    split: Sequence[int] | None = None,
    valid: dict[str, np.ndarray] | None = None,
    simulated: bool = False,
    shard: int = 5,
) -> ShardSet:
    """Publish windows at 200 Hz: ``signals`` are values, channel names, microvolts a bit; people from ``facts``."""
    n, infos, places = len(facts), [], []
    keys = [f"k-{i:04d}" for i in range(n)]
    for number, start in enumerate(range(0, n, shard)):
        rows = range(start, min(start + shard, n))
        samples = [tar.Sample(keys[i], {name: v[0][i] for name, v in signals.items()}, dict(facts[i])) for i in rows]
        file = io.BytesIO()
        places += tar.write(samples, file)
        data, name = file.getvalue(), f"paired-{number:06d}.tar"
        storage.write_bytes(storage.join(url, name), data)
        infos.append(ShardInfo(name, len(rows), len(data), hashlib.sha256(data).hexdigest()))
    codes = np.array(split if split is not None else [0] * n, dtype=np.uint8)
    people = np.array([pseudonym("built", str(one.get("person"))) for one in facts], dtype=np.uint64)
    sample_table = SampleTable(
        offset={name: np.array([place[name][0] for place in places], dtype=np.int64) for name in signals},
        check={name: np.array([place[name][1] for place in places], dtype=np.uint32) for name in signals},
        valid={name: (valid or {}).get(name, np.ones((n, len(v[1])), dtype=bool)) for name, v in signals.items()},
        split=codes, person=people, waveform=np.zeros(n, dtype=np.uint64), key=key_table(keys),
    )  # fmt: skip
    about = {name: SignalInfo(v[1], v[0].shape[2], v[2]) for name, v in signals.items()}
    digest = hashlib.sha256(sample_table.to_bytes()).hexdigest()
    publish(
        ShardSet(
            url=url, shards=tuple(infos), signals=about, rate=200.0,
            splits={name: int((codes == code).sum()) for code, name in enumerate(SPLITS)},
            people=len(np.unique(people)), simulated=simulated, sources=("built",), sample_table_sha256=digest,
            fingerprint=fingerprint_of(infos, about, 200.0, digest), made_by={},
        ),
        sample_table,
    )  # fmt: skip
    return open_set(url)


def facts_of(people: int = 6, recordings: int = 2, windows: int = 3) -> list[dict[str, Any]]:
    """Of each person the first recording is at rest, the others are arithmetic."""
    return [
        {
            "person": f"p{person}", "record": f"p{person}_{recording}", "source": "built",
            "labels": {"task": "rest" if recording == 0 else "arithmetic"},
        }
        for person in range(people) for recording in range(recordings) for _ in range(windows)
    ]  # fmt: skip


def paired(url: str, facts: Sequence[dict[str, Any]], **more: Any) -> ShardSet:
    """The same with noise as ECG (leads I, II) and EEG (C3, C4), two patches long."""
    n = len(facts)
    signals = {"ecg": (waves(n, seed=1), ("I", "II"), 1.0), "eeg": (waves(n, seed=2), ("C3", "C4"), 0.1)}
    return publish_set(url, facts, signals, **more)


def table_of(people: int = 12, recordings: int = 2, windows: int = 6, classes: int = 2, seed: int = 0) -> LabelTable:
    """Recording r of everybody has class r modulo ``classes``; pseudonyms are in no order."""
    rng = np.random.default_rng(seed)
    n = people * recordings * windows
    names = rng.permutation(np.arange(1, people + 1, dtype=np.uint64) * np.uint64(2**58))
    recording = np.repeat(np.arange(people * recordings), windows)
    return LabelTable(
        keys=[f"k-{i:04d}" for i in range(n)],
        sample=np.arange(n),
        person=np.repeat(names, recordings * windows),
        recording=recording,
        label=(recording % recordings) % classes,
        classes=tuple(f"class{i}" for i in range(classes)),
        split=np.zeros(n, dtype=np.uint8),
        simulated=False,
    )


def features_of(label: np.ndarray, strength: float, d: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Noise whose first feature tells the class ``strength`` standard deviations apart."""
    x = np.random.default_rng(seed).standard_normal((len(label), d))
    x[:, 0] += strength * label
    return (scale * x + 3.0 * scale).astype(np.float32)


def job_of(inputs: Mapping[str, np.ndarray], label: np.ndarray, rows: np.ndarray, purpose: str, **more: Any) -> Job:
    """A head to train whose inputs are reduced by its own rows."""
    reductions = {name: fit_reduction(x[rows].reshape(-1, x.shape[-1]), 64) for name, x in inputs.items()}
    return Job(inputs, reductions, label, rows, purpose, **more)


def study_of(
    table: LabelTable, ecg: np.ndarray, eeg: np.ndarray, folds: int = 3, val_folds: int = 2, epochs: int = 6
) -> Study:
    """A study whose pooled features are given; untrained ones are noise."""
    options = TuneConfig()
    options.tune.folds, options.tune.val_folds, options.tune.max_epochs = folds, val_folds, epochs
    options.tune.task, options.tune.label, options.tune.protocol = "labels", "task", "grouped_kfold"
    made = tuple(folds_of(table, "grouped_kfold", folds, val_folds, 0))
    noise = {name: features_of(table.label, 0.0, 3, 90 + i) for i, name in enumerate(("ecg", "eeg"))}
    encoders = {
        **{EncoderRole(name): (f"{name}-a",) * len(made) for name in ("ecg", "eeg")},
        **{EncoderRole(name, False): (f"{name}-u",) * len(made) for name in ("ecg", "eeg")},
    }
    inputs = {
        InputKey("ecg", "ecg-a", "mean"): ecg, InputKey("eeg", "eeg-a", "mean"): eeg,
        InputKey("ecg", "ecg-u", "mean"): noise["ecg"], InputKey("eeg", "eeg-u", "mean"): noise["eeg"],
    }  # fmt: skip
    return Study(
        options=options, table=table, folds=made, encoders=encoders, inputs=inputs,
        handcrafted={"ecg": ecg.astype(np.float64), "eeg": eeg.astype(np.float64)},
        reductions=reductions_of(inputs, encoders, made, 64),
        about={"ecg": {}, "eeg": {}},
        notes=("A note.",),
    )  # fmt: skip


def changed(study: Study, **fields: Any) -> Study:
    """The study with other fields, and what follows from them."""
    other = replace(study, **fields)
    return replace(other, reductions=reductions_of(other.inputs, other.encoders, other.folds, 64, other.valid))


def with_label(study: Study, label: np.ndarray) -> Study:
    """The same study with other labels."""
    return replace(study, table=replace(study.table, label=label))


def write_features(url: str, values: np.ndarray, valid: np.ndarray, keys: Sequence[str], signal: str) -> str:
    """Frozen features ``[n, channel, patch, d]`` as ``physio-dist embed`` leaves them, by an encoder called so."""
    content = save_safetensors({"values": values.astype(np.float32), "valid": valid})
    name = "features-00000.safetensors"
    storage.write_bytes(storage.join(url, name), content)
    file = {"file": name, "windows": len(values), "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    about = {
        "format": FORMAT, "kind": KIND, "encoder_sha256": f"{signal}-a", "encoder": {}, "fingerprint": "made",
        "signal": signal, "shape": list(values.shape[1:]), "windows": len(values), "files": [file], "keys": list(keys),
    }  # fmt: skip
    storage.write_json(storage.join(url, INDEX), about)
    return url
