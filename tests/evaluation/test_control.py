"""Labels permuted by recording within people: chance under every protocol, and not under the one that leaks."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from physio_dist.config.task import PROTOCOLS
from physio_dist.evaluation.controls import permuted_label_aucs
from physio_dist.evaluation.handcrafted import paired_features
from physio_dist.evaluation.label_table import LabelTable, load_label_table
from physio_dist.evaluation.results import permutation_control
from physio_dist.evaluation.splits import folds_of
from physio_dist.evaluation.trials import Choice, Study
from tests.evaluation.study_samples import CONFIG, changed, opened, study_of, table_of

pytestmark = pytest.mark.integration

REPEATS = 20


def permuted_under(study: Study, protocol: str, folds: int) -> tuple[float, float]:
    """Mean AUC of the permuted labels, and the p value that it is above chance."""
    made = tuple(folds_of(study.table, protocol, folds, 2, 0))
    names = {name: (hashes[0],) * len(made) for name, hashes in study.encoders.items()}
    study = changed(study, folds=made, encoders=names)
    config = {**CONFIG, "width": 64, "dropout": 0.0, "lr": 0.02}
    areas = permuted_label_aucs(study, [Choice(config, 12, 0.5)] * len(made), REPEATS)
    part = permutation_control(0.7, areas)
    assert part.n == REPEATS and part.mean == pytest.approx(np.mean(areas), abs=1e-5)
    return part.mean, part.p_leak


def watched() -> tuple[LabelTable, np.ndarray]:
    """People who see the same clips, and features by which people and recordings are told apart."""
    people, clips, windows = 10, 12, 4
    table, rng = table_of(people, clips, windows), np.random.default_rng(3)
    # Everybody rates half of the clips high.
    label = np.concatenate([rng.permutation(np.arange(clips) % 2) for _ in range(people)])
    table = replace(table, label=label[table.recording], clip=table.recording % clips)
    of_recording = rng.standard_normal((people * clips, 12))
    of_person = rng.standard_normal((people, 12))
    x = of_person[table.recording // clips] + of_recording[table.recording] + 0.5 * rng.standard_normal((480, 12))
    return table, x.astype(np.float32)


@pytest.mark.parametrize("protocol", [name for name in PROTOCOLS if name != "holdout"])
def test_only_the_leaky_protocol_tells_permuted_labels_apart(protocol: str) -> None:
    table, x = watched()
    mean, leak = permuted_under(study_of(table, x[:, :6], x[:, 6:]), protocol, 3)
    if protocol == "leaky_window":
        assert mean > 0.7 and leak < 1e-6
    else:
        assert 0.4 < mean < 0.54 and leak > 0.01


def test_on_real_people(
    data_dir: Path, tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:  # fmt: skip
    """36 people at rest and calculating, hand-made features."""
    done = cli("shard", "edf", data_dir / "eegmat", "--out", tmp_path / "set", "signals=ecg,eeg", "leads=ECG")
    assert done.returncode == 0, done.stderr
    table = load_label_table(opened(str(tmp_path / "set")), "eegmat", None)
    measured = paired_features(opened(str(tmp_path / "set")), lambda _: None)
    ecg, eeg = (np.nan_to_num(measured[name][table.sample]).astype(np.float32) for name in ("ecg", "eeg"))
    study = study_of(table, ecg, eeg)
    whole, leak = permuted_under(study, "grouped_kfold", 4)
    assert 0.46 < whole < 0.54 and leak > 0.01
    mixed, leak = permuted_under(study, "leaky_window", 4)
    assert mixed > 0.85 and leak < 1e-6
