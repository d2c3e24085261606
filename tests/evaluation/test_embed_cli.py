"""``physio-dist embed``, as a person calls it, on real recordings of both signals."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from physio_dist.evaluation.features import open_features
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, preset
from physio_dist.models.export import save_encoder
from physio_dist.signals.montage import EEG_19

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def place(cli: Cli, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with paired shards of a recording, and an encoder for each signal."""
    folder = tmp_path_factory.mktemp("embed")
    (folder / "raw").mkdir()
    shutil.copyfile(data_dir / "eegmat" / "Subject00_2.edf", folder / "raw" / "Subject00_2.edf")
    done = cli("shard", "edf", folder / "raw", "--out", folder / "set", "signals=ecg,eeg", "leads=ECG", "workers=1")
    assert done.returncode == 0, done.stderr
    for signal, channels in (("ecg", ["ECG"]), ("eeg", list(EEG_19))):
        torch.manual_seed(0)
        about = {"signal": signal, "channels": channels, "rate": 200.0, "unit_uv": 100.0, "simulated": False}
        (folder / signal).mkdir()
        for name, data in save_encoder(CrissCrossEncoder(preset("tiny")), about).items():
            (folder / signal / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(("signal", "channels"), [("ecg", 1), ("eeg", 19)])
def test_both_signals_of_a_paired_set_are_embedded(cli: Cli, place: Path, signal: str, channels: int) -> None:
    words = ("embed", "--encoder", place / signal, "--data", place / "set", "--out", place / f"f-{signal}")
    done = cli(*words)
    assert done.returncode == 0, done.stderr
    n = len(json.loads((place / f"f-{signal}" / "index.json").read_text())["keys"])
    assert done.stdout == f"features [{channels}, 10, 80] of {n} {signal} windows -> {place}/f-{signal}\n"
    assert f"embedding {signal}: {n} of {n} windows" in done.stderr
    opened = open_features(str(place / f"f-{signal}"))
    assert opened.values.shape == (n, channels, 10, 80)
    assert n > 5
    # Real signals of a plausible size give features that differ from window to window.
    assert (np.asarray(opened.values).std(axis=0) > 1e-4).all()
    again = cli(*words, "--signal", signal)
    assert again.returncode == 0
    assert again.stdout == f"features of {n} windows are there already: {place}/f-{signal}\n"
    assert again.stderr == ""


def test_a_published_checkpoint_embeds_eeg(cli: Cli, place: Path, data_dir: Path) -> None:
    weights = data_dir / "cbramod-reference" / "two_layers.pth"
    done = cli("embed", "--encoder", weights, "--data", place / "set", "--out", place / "published")
    assert done.returncode == 0, done.stderr
    assert "features [19, 10, 200] of" in done.stdout


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data", "{}/set", "--out", "{}/x"], "the following arguments are required: --encoder"),
        (["--encoder", "{}/ecg", "--out", "{}/x"], "the following arguments are required: --data"),
        (["--encoder", "{}/ecg", "--data", "{}/set"], "the following arguments are required: --out"),
        (["--encodr", "{}/ecg"], "there is no option '--encodr' here: did you mean '--encoder'?"),
        (["--encoder", "{}/ecg", "--data", "{}/set", "--out", "{}/x", "a=b"], "unknown option 'a' (command line)"),
        (["--encoder", "{}/ecg", "--data", "{}/set", "--out", "{}/x", "--signal", "emg"], "invalid choice: 'emg'"),
        (["--encoder", "{}/ecg", "--data", "{}/set", "--out", "{}/x", "--signal", "eeg"], "eeg was asked for"),
        (["--encoder", "{}/none", "--data", "{}/set", "--out", "{}/x"], "`physio-dist export RUN OUT`"),
        (["--encoder", "{}/ecg", "--data", "{}/none", "--out", "{}/x"], "none holds no index.json"),
        (["--encoder", "{}/ecg", "--data", "{}/set", "--out", "{}/set"], "choose another folder"),
    ],
)
def test_mistakes_are_told_in_one_line(cli: Cli, place: Path, words: list[str], told: str) -> None:
    done = cli("embed", *(word.format(place) for word in words))
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not (place / "x").exists()
