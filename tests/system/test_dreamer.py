"""A file in DREAMER's layout through the commands that would reproduce the paper's table, and what is refused of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load
from scipy.io import savemat

from physio_dist.data.format.index import open_set
from physio_dist.data.format.people import pseudonym
from physio_dist.errors import UserError
from physio_dist.evaluation.serving.classifier import FusionClassifier
from physio_dist.signals.readers import reader
from tests.signals.readers.dreamer_samples import people_of, write_v5, write_v73
from tests.system.clusters import Cluster
from tests.system.launching import ROOT, physio
from tests.system.test_tune import Place, Sweep, exported

pytestmark = pytest.mark.xdist_group("ray")

CONFIG = "configs/tune/dreamer.yaml"
PEOPLE, CLIPS = 5, 18
# As docs/guides/fusion.md has it.
WORDS = ("signals=ecg,eeg", "leads=found", "eeg.channels=found", "source=dreamer")
FEW = (
    "tune.label=arousal", "tune.trials=2", "tune.max_epochs=2", "tune.permutations=2", "tune.scheduler=fifo",
    "tune.val_folds=2", "search.components=[16]", "search.pooling=[channels_mean]",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """One window of each clip and each rest, by the command; encoders that have learnt nothing."""
    folder = tmp_path_factory.mktemp("dreamer")
    raw = write_v73(folder / "DREAMER.mat", people_of(PEOPLE, CLIPS, seconds=10.5, rest=10.5))
    done = physio("shard", "dreamer", str(raw), "--out", str(folder / "set"), *WORDS)
    assert done.returncode == 0, done.stderr
    assert f"{2 * PEOPLE * CLIPS} windows of {PEOPLE} people" in done.stdout
    channels = {name: list(info.channels) for name, info in open_set(str(folder / "set")).signals.items()}
    ecg, eeg = (exported(folder / name, name, channels[name], [7]) for name in ("ecg", "eeg"))
    return Place(folder, raw, str(folder / "set"), ecg, eeg)


@pytest.fixture(scope="module")
def swept(place: Place, ray_nodes: Cluster) -> Sweep:
    run = Sweep(place, place.folder, "arousal", dict(ray_nodes.env), FEW, configuration=CONFIG)
    assert run() == 0, run.said()
    return run


def test_dreamer_sweep_table_shows_published_result(swept: Sweep) -> None:
    results = swept.results()
    assert (results["task"], results["protocol"], results["label"]) == ("dreamer", "loso", "arousal")
    assert (results["windows"], results["people"], len(results["folds"])) == (PEOPLE * CLIPS, PEOPLE, PEOPLE)
    assert results["classes"] == ["low", "high"] and results["permuted"]["n"] == 2
    assert results["published"]["value"] == 0.8479
    notes = " ".join(results["notes"])
    assert "tune.neutral=low" in notes and "tune.baseline=subtract" in notes
    said = swept.said()
    assert f"dreamer, loso: {PEOPLE * CLIPS} windows of {PEOPLE} held-out people" in said
    assert "arXiv 2512.15250 reports auc 0.8479; unknown:" in said
    done = physio("report", str(swept.path))
    assert done.returncode == 0, done.stderr
    page = (swept.path / "report.html").read_text()
    assert "arXiv 2512.15250" in page and "0.848" in page


def test_classifier_subtracts_baseline_like_sweep(swept: Sweep) -> None:
    dreamer, raw = reader("dreamer"), str(swept.place.raw)
    tensors = load((swept.path / "predictions.safetensors").read_bytes())
    keys = [row.tobytes().rstrip(b"\0").decode() for row in tensors["key"]]
    for fold in (0, 3):
        model = FusionClassifier.load(str(swept.path), fold=fold)
        for row in np.flatnonzero(tensors["fold"] == fold)[::6]:
            # A key has the person's pseudonym in place of the name.
            (record,) = [
                one for one in dreamer.records(raw)
                if keys[row].startswith(f"{pseudonym('dreamer', one[:3]):016x}{one[3:]}")
            ]  # fmt: skip
            clip, rest = (
                {
                    name: (one.data, one.channels, one.rate)
                    for name, one in dreamer.read(raw, record.replace("stimulus", phase)).signals.items()
                }
                for phase in ("stimulus", "baseline")
            )
            found = model.predict(clip, rest).probability
            np.testing.assert_allclose(found, tensors["probability.fused"][row][None], atol=1e-5)
    with pytest.raises(UserError, match="give a rest of the same person"):
        model.predict(clip)
    with pytest.raises(UserError, match="the rest has no whole window of 10 s"):
        model.predict(clip, (0.0, 9.0))
    # All that is left of a window when it is subtracted from itself is nothing, whatever it held.
    nothing = model.predict(clip, (0.0, 10.0)).probability
    np.testing.assert_allclose(nothing, model.predict(rest, (0.0, 10.0)).probability, atol=1e-5)


def refused(words: list[str], status: int = 2) -> str:
    """Message of a command that ends with this status."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=240)
    told = [line for line in (done.stdout + done.stderr).splitlines() if f"(exit status {status})" in line]
    assert done.returncode == status and len(told) == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return told[0]


def no_dreamer(folder: Path) -> Path:
    savemat(folder / "DREAMER.mat", {"ECG": np.zeros((3, 4))})
    return folder / "DREAMER.mat"


def beyond_the_scale(folder: Path) -> Path:
    people = people_of(2, CLIPS, seconds=0.2, rest=0.2)
    people[1]["ScoreArousal"][6] = 6
    return write_v5(folder / "DREAMER.mat", people)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (no_dreamer, ["not DREAMER.mat"]),
        (beyond_the_scale, ["person 2, clip 7", "ScoreArousal is 6", "1 to 5"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_foreign_mat_file_is_refused(make: Callable[[Path], Path], words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "set"
    told = refused(["-m", "physio_dist.cli", "shard", "dreamer", str(make(tmp_path)), "--out", str(out), *WORDS])
    assert all(word in told for word in [str(tmp_path / "DREAMER.mat"), *words]), told
    assert not out.exists()


def no_eeg(place: Place, folder: Path) -> list[str]:
    """Electrodes that are on nobody's head."""
    people = people_of(PEOPLE, CLIPS, seconds=10.5, rest=0.5)
    for person in people:
        for cell in person["EEG"]["stimuli"]:
            cell[:] = 4200.0
    raw = write_v5(folder / "DREAMER.mat", people, compressed=False)
    done = physio("shard", "dreamer", str(raw), "--out", str(folder / "flat"), *WORDS, "unusable=keep")
    assert done.returncode == 0, done.stderr
    return [f"tune.data={folder / 'flat'}", "tune.baseline=none"]


def few_people(place: Place, folder: Path) -> list[str]:
    return ["tune.protocol=grouped_kfold", "tune.folds=9"]


def lonely_class(place: Place, folder: Path) -> list[str]:
    """Everybody is of another age."""
    return ["tune.task=labels", "tune.label=age", "tune.baseline=none"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_eeg, ["the EEG is missing in all 90 labelled windows"]),
        (few_people, ["tune.folds=9", "5 people"]),
        (lonely_class, ["too few people"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_invalid_dreamer_sweep_is_refused(
    place: Place, change: Callable[[Place, Path], list[str]], words: list[str], tmp_path: Path
) -> None:
    given = place.words(*FEW, *change(place, tmp_path), f"run.dir={tmp_path / 'runs'}")
    told = refused(["-m", "physio_dist.tune", "--config", str(ROOT / CONFIG), *given])
    assert all(word in told for word in words), told
    assert not (tmp_path / "runs").exists()


def test_features_of_another_encoder_are_refused(swept: Sweep, tmp_path: Path) -> None:
    index = sorted((swept.place.folder / "features").glob("ecg-*/index.json"))[0]
    before = index.read_text()
    index.write_text(json.dumps({**json.loads(before), "encoder_sha256": "0" * 64}))
    try:
        words = swept.place.words(*FEW, f"run.dir={tmp_path / 'runs'}")
        told = refused(["-m", "physio_dist.tune", "--config", str(ROOT / CONFIG), *words])
    finally:
        index.write_text(before)
    assert str(index.parent) in told and "encoder" in told
