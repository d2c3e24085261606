"""From a finished study to a classifier in a folder, and from raw recordings to the study's own probabilities."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import edfio
import numpy as np
import pytest
import torch
import wfdb
from scipy.signal import resample_poly

from physio_dist import config, storage
from physio_dist.config import TuneConfig, parse_encoders
from physio_dist.data.convert import converter
from physio_dist.data.format.index import open_set
from physio_dist.data.format.sample_table import key_table
from physio_dist.errors import DataError, UserError
from physio_dist.evaluation.serving import classifier_files
from physio_dist.evaluation.serving.classifier import FusionClassifier
from physio_dist.evaluation.trained_heads import train_selected
from physio_dist.evaluation.trials import Study, TrialRecord, select, train
from physio_dist.signals.montage import EEG_19
from physio_dist.signals.readers import read_file, reader
from tests.conftest import S3
from tests.evaluation.study_samples import CONFIG, paired, prepare_study
from tests.evaluation.test_study import export, facts_of, quiet

pytestmark = pytest.mark.integration

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
RATE = 250
LEADS = ("I", "II", "V1")
HEADS = {
    "plain": {**CONFIG, "pooling": "channels_mean_std"},
    "gated": {**CONFIG, "pooling": "attention", "head": "gated", "modality_dropout": 0.3},
    "crossed": {**CONFIG, "pooling": "channels_attention", "head": "cross_attention", "modality_dropout": 0.3},
}  # fmt: skip


def write_edf(path: Path, signals: dict[str, tuple[np.ndarray, tuple[str, ...]]], rate: int = RATE) -> None:
    """Signals in microvolts at 200 Hz as an EDF at another rate."""
    channels = []
    for data, names in signals.values():
        x = resample_poly(data.astype(np.float64), rate, 200, axis=1)
        channels += [
            edfio.EdfSignal(row, rate, label=name, physical_dimension="uV", physical_range=(-5000.0, 5000.0))
            for row, name in zip(np.clip(x, -5000, 5000), names, strict=True)
        ]
    edfio.Edf(channels).write(path)


def signals_of(record: str, source: str = "people=6,windows=3,trials=2,seed=5") -> dict[str, Any]:
    recording = reader("simulate").read(source, record)
    ecg, eeg = recording.signals["ecg"], recording.signals["eeg"]
    rows = [ecg.channels.index(name) for name in LEADS]
    return {"ecg": (ecg.data[rows], LEADS), "eeg": (eeg.data, eeg.channels)}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve EDF files of six simulated people."""
    folder = tmp_path_factory.mktemp("raw")
    table = ["file,subject,task"]
    for i, record in enumerate(reader("simulate").records("people=6,windows=3,trials=2,seed=5")):
        write_edf(folder / f"r{i:02d}.edf", signals_of(record))
        table.append(f"r{i:02d}.edf,p{i // 2},{('rest', 'arithmetic')[i % 2]}")
    (folder / "recordings.csv").write_text("\n".join([*table, ""]))
    return folder


def convert(raw: Path, out: Path, *words: str) -> str:
    given = config.load(config.ShardConfig, None, ["workers=1", "signals=ecg,eeg", *words])
    converter.convert("edf", str(raw), str(out), given)
    return str(out)


def prepared(folder: Path, data: str, eeg: str = "", **more: Any) -> Study:
    options = TuneConfig()
    options.tune.data, options.tune.task, options.tune.calibrate = data, "eegmat", True
    encoders = {"ecg": export(str(folder / "ecg"), "ecg", 1), "eeg": eeg or export(str(folder / "eeg"), "eeg", 2)}
    options.tune.encoders = parse_encoders("tune.encoders", encoders)
    options.tune.folds, options.tune.val_folds, options.tune.max_epochs = 3, 2, 3
    options.search.pooling = ["channels_mean_std", "attention", "channels_attention"]
    options.search.head, options.search.modality_dropout = ["concat", "gated", "cross_attention"], [0.0, 0.3]
    for name, value in more.items():
        setattr(options.tune, name, value)
    return prepare_study(options, str(folder / "features"), quiet)


@pytest.fixture(scope="module")
def study(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Its folds have EEG encoders of their own, two of them the same."""
    folder = tmp_path_factory.mktemp("study")
    for name, seed in (("0", 2), ("1", 3), ("2", 2)):
        export(str(folder / f"eeg-{name}"), "eeg", seed)
    data = convert(raw, folder / "set", "leads=I,II,V1", "min_leads=2", "unusable=keep", "eeg.high=45")
    return prepared(folder, data, eeg=f"{folder}/eeg-{{fold}}")


Tensors = dict[str, np.ndarray]


def records_of(study: Study, config: dict[str, Any]) -> list[TrialRecord]:
    return [TrialRecord("fused-000", "fused", config, list(train(study, "fused", config)))]


def heard(study: Study, records: list[TrialRecord]) -> Tensors:
    """What ``predictions.safetensors`` has of the fused row, without the other rows."""
    heads = train_selected(study, "fused", select(study, "fused", records), ("ecg", "eeg"))
    rows = np.concatenate([fold.test for fold in study.folds])
    order = np.argsort(rows, kind="stable")
    rows_of = {"fused": heads.probability} | {f"fused_{name}_only": parts for name, parts in heads.ablated.items()}
    return {
        "key": key_table([study.table.keys[i] for i in rows[order]]),
        "fold": np.repeat(np.arange(len(study.folds)), [len(fold.test) for fold in study.folds])[order],
        **{f"probability.{row}": np.concatenate(parts)[order] for row, parts in rows_of.items()},
    }


def save(study: Study, records: list[TrialRecord], url: str, say: Callable[[str], None]) -> None:
    fused = train_selected(study, "fused", select(study, "fused", records))
    classifier_files.save_classifier(study, records, fused, open_set(study.options.tune.data), url, say)


@pytest.fixture(scope="module")
def made(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensors]]:
    """Of each kind of head a sweep's directory with a classifier, and what the study says of its test windows."""
    found = {}
    for name, chosen in HEADS.items():
        folder, records = tmp_path_factory.mktemp(name), records_of(study, chosen)
        save(study, records, str(folder / "classifier"), quiet)
        found[name] = (folder, heard(study, records))
    return found


@pytest.fixture(scope="module")
def run(made: dict[str, tuple[Path, Tensors]]) -> Path:
    return made["gated"][0]


def same_as_tested(run: Path, tensors: Tensors, file_of: Callable[[str], Path]) -> int:
    """Hold every test window's probabilities against those that the raw file gets; how many there were."""
    keys = [row.tobytes().rstrip(b"\0").decode() for row in tensors["key"]]
    seen = 0
    for fold in np.unique(tensors["fold"]):
        model = FusionClassifier.load(str(run), fold=int(fold))
        mine = np.flatnonzero(tensors["fold"] == fold)
        for record in sorted({keys[i].rsplit("-", 1)[0] for i in mine}):
            rows = [i for i in mine if keys[i].rsplit("-", 1)[0] == record]
            found = model.predict_recording(read_file(str(file_of(record))))
            windows = [int(keys[i].rsplit("-", 1)[1]) for i in rows]
            np.testing.assert_allclose(found.start_s, 10.0 * np.arange(len(found.start_s)))
            np.testing.assert_allclose(found.probability[windows], tensors["probability.fused"][rows], atol=1e-5)
            seen += len(rows)
    return seen


@pytest.mark.parametrize("name", list(HEADS))
def test_a_raw_file_gets_what_the_fold_said_of_its_test_windows(
    made: dict[str, tuple[Path, Tensors]], study: Study, raw: Path, name: str
) -> None:
    run, tensors = made[name]
    assert np.ptp(tensors["probability.fused"][:, 0]) > 0.01
    assert same_as_tested(run, tensors, lambda record: raw / f"{record}.edf") == len(study.table.label)
    # Other heads say something else.
    one = read_file(str(raw / "r00.edf"))
    said = [FusionClassifier.load(str(run), fold).predict_recording(one).probability for fold in (0, 1, None)]
    assert all(np.abs(said[i] - said[j]).max() > 1e-4 for i, j in ((0, 1), (0, 2), (1, 2)))


def test_an_ensemble_of_configurations_is_kept_whole(study: Study, raw: Path, tmp_path: Path) -> None:
    several = replace(study, options=deepcopy(study.options))
    several.options.tune.ensemble_size = 3
    records = [TrialRecord(name, "fused", how, list(train(study, "fused", how))) for name, how in HEADS.items()]
    save(several, records, str(tmp_path / "classifier"), quiet)
    tensors = heard(several, records)
    assert same_as_tested(tmp_path, tensors, lambda record: raw / f"{record}.edf") == len(study.table.label)
    assert np.abs(tensors["probability.fused"] - heard(study, records)["probability.fused"]).max() > 0.01
    about = json.loads((tmp_path / "classifier" / "config.json").read_text())
    assert about["format"] == 2
    for name in ("0", "everybody"):
        model, told = FusionClassifier.load(str(tmp_path), name), about["ensembles"][name]
        assert len(model.heads) == 6 and len(told["others"]) == 2
        assert [told["config"], *(one["config"] for one in told["others"])] == list(model.configs[::2])
        # `plain` has not learnt to do with one signal.
        assert not model.takes_one


def test_so_it_is_on_real_recordings(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    table = ["file,subject,task"]
    for number in range(3):
        for part, task in (("1", "rest"), ("2", "arithmetic")):
            # Where a name has the person's in it, keys do not.
            name = f"r{number}_{part}.edf"
            shutil.copyfile(data_dir / "eegmat" / f"Subject{number:02d}_{part}.edf", tmp_path / "raw" / name)
            table.append(f"{name},Subject{number:02d},{task}")
    (tmp_path / "raw" / "recordings.csv").write_text("\n".join([*table, ""]))
    study = prepared(tmp_path, convert(tmp_path / "raw", tmp_path / "set", "leads=ECG"), protocol="loso")
    records = records_of(study, HEADS["crossed"])
    tensors = heard(study, records)
    save(study, records, str(tmp_path / "run"), quiet)
    seen = same_as_tested(tmp_path / "run", tensors, lambda record: tmp_path / "raw" / f"{record}.edf")
    assert seen == len(study.table.label) > 60


def test_everybodys_heads_are_chosen_by_all_folds_and_trained_on_all(study: Study, run: Path) -> None:
    def record(row: str, lr: float, *areas: float) -> TrialRecord:
        history = [{"epoch": i + 1, "val_auc": area} for i, area in enumerate(areas)]
        return TrialRecord(f"{row}-{lr}", row, {**CONFIG, "lr": lr}, history)

    records = [record("fused", 0.1, 0.6, 0.7), record("fused", 0.2, 0.5, float("nan"), 0.7), record("ecg", 0.3, 0.9)]
    choice = classifier_files.best_over_folds(records)
    assert (choice.config["lr"], choice.epoch, choice.val_auc) == (0.1, 2, 0.7)
    with pytest.raises(UserError, match="no trial of the row 'fused'"):
        classifier_files.best_over_folds(records[2:])
    about = json.loads((run / "classifier" / "config.json").read_text())
    assert list(about["ensembles"]) == ["0", "1", "2", "everybody"]
    everybody = about["ensembles"]["everybody"]
    assert everybody["heads"] == 2 and "rule" in everybody
    assert everybody["encoders"] == about["ensembles"]["0"]["encoders"] != about["ensembles"]["1"]["encoders"]
    model = FusionClassifier.load(str(run))
    assert model.name == "everybody" and model.takes_one and model.classes == ("rest", "arithmetic")
    temperatures = [float(head.get_buffer("temperature")) for head in model.heads]
    assert temperatures != [1.0, 1.0]
    # Each person's windows shape the statistics of a head at least: nobody is left out of both.
    means = {str(head.get_buffer("mean_ecg").tolist()) for head in model.heads}
    assert len(means) == 2


def test_a_folder_of_tensors_json_and_a_card(run: Path) -> None:
    files = {path.relative_to(run / "classifier").as_posix() for path in (run / "classifier").rglob("*.*")}
    about = json.loads((run / "classifier" / "config.json").read_text())
    assert files == {"config.json", *about["files"]}
    assert {Path(name).suffix for name in files} == {".json", ".safetensors", ".md"}
    assert {name.split("/")[0][:4] for name in files if "/" in name} == {"ecg", "eeg-"}
    # Two EEG encoders for three folds.
    assert sum(name.startswith("eeg-") and name.endswith(".safetensors") for name in files) == 2
    assert about["window"]["leads"] == list(LEADS) and about["window"]["eeg_band"] == [0.3, 45.0]
    card = (run / "classifier" / "README.md").read_text()
    assert "Not a medical device" in card and "I II V1" in card and "SIMULATED" not in card


def test_a_leaky_split_is_told_in_use_too(cli: Cli, study: Study, run: Path, raw: Path, tmp_path: Path) -> None:
    leaky = replace(study, options=deepcopy(study.options))
    leaky.options.tune.protocol = "leaky_window"
    save(leaky, records_of(leaky, HEADS["plain"]), str(tmp_path / "classifier"), quiet)
    assert "LEAKY SPLIT" in (tmp_path / "classifier" / "README.md").read_text()
    done = cli("predict", tmp_path, raw / "r00.edf")
    assert done.returncode == 0 and "r00.edf: LEAKY SPLIT: the sweep's figures" in done.stderr
    model = FusionClassifier.load(str(run))
    assert not model.leaky and "LEAKY" not in " ".join(model.predict_recording(read_file(str(raw / "r00.edf"))).notes)


def test_arrays_in_probabilities_out(run: Path, raw: Path) -> None:
    model = FusionClassifier.load(f"{run}/classifier", fold=1)
    recording = read_file(str(raw / "r03.edf"))
    wanted = model.predict_recording(recording)
    assert wanted.probability.shape == (3, 2) and wanted.probability.dtype == np.float32
    np.testing.assert_allclose(wanted.probability.sum(axis=1), 1, atol=1e-6)
    ecg, eeg = recording.signals["ecg"], recording.signals["eeg"]
    order = np.random.default_rng(0).permutation(len(eeg.channels))
    found = model.predict({
        "ecg": (ecg.data.astype(np.float64) / 1000, ecg.channels, ecg.rate, "mV"),
        "eeg": (eeg.data[order], [eeg.channels[i] for i in order], eeg.rate),
    })  # fmt: skip
    np.testing.assert_allclose(found.probability, wanted.probability, atol=1e-4)
    assert found.valid["eeg"].shape == (3, 19) and found.channels["eeg"] == EEG_19
    for bad, words in (
        ({"ecg": (ecg.data[0], ["I"], 250.0)}, "do not fit 1 channel names"),
        ({"ecg": (ecg.data, ecg.channels, 0)}, "rate of 0"),
        ({"ecg": (ecg.data, ecg.channels, 250.0, "T")}, "the unit 'T' is none of"),
        ({"emg": (ecg.data, ecg.channels, 250.0)}, "emg is none of ecg, eeg"),
        ({}, "no ECG and no EEG: this classifier takes ECG I II V1; EEG Fp1"),
        ({"ecg": (ecg.data[:, :500], ecg.channels, 250.0)}, "2 s long, shorter than a window of 10 s"),
        ({"ecg": (ecg.data, ecg.channels, 60.0)}, "sampled at 60 Hz"),
        ({"ecg": (ecg.data[[0, 0, 1]], ["I", "I", "II"], 250.0)}, "two channels are lead I"),
    ):
        with pytest.raises(UserError, match=words):
            model.predict(bad)


def test_one_signal_alone(made: dict[str, tuple[Path, Tensors]], raw: Path) -> None:
    """As in the study's row with the other signal withheld; refused where heads have not learnt it."""
    run, tensors = made["gated"]
    model = FusionClassifier.load(str(run), fold=0)
    keys = [row.tobytes().rstrip(b"\0").decode() for row in tensors["key"]]
    record = next(keys[i] for i in range(len(keys)) if tensors["fold"][i] == 0).rsplit("-", 1)[0]
    rows = [i for i, key in enumerate(keys) if key.startswith(f"{record}-")]
    recording = read_file(str(raw / f"{record}.edf"))
    for one, other in (("ecg", "eeg"), ("eeg", "ecg")):
        signal_ = recording.signals[one]
        found = model.predict({one: (signal_.data, signal_.channels, signal_.rate)})
        np.testing.assert_allclose(found.probability, tensors[f"probability.fused_{one}_only"][rows], atol=1e-5)
        assert f"there is no {other.upper()}: the heads answer from the {one.upper()} alone" in found.notes
        assert not found.valid[other].any() and found.valid[one].any()
    with pytest.raises(UserError, match=r"no EEG: this classifier takes ECG I II V1; EEG .* have not learnt"):
        FusionClassifier.load(str(made["plain"][0])).predict({"ecg": (recording.signals["ecg"].data, LEADS, 250.0)})


def test_the_command(cli: Cli, run: Path, raw: Path, tmp_path: Path) -> None:
    done = cli("predict", run, raw / "r03.edf", "--fold", 1)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert list(rows[0]) == ["start_s", "p_rest", "p_arithmetic", "predicted", "valid_ecg", "valid_eeg", "usable"]
    assert [row["start_s"] for row in rows] == ["0", "10", "20"]
    wanted = FusionClassifier.load(str(run), fold=1).predict_recording(read_file(str(raw / "r03.edf")))
    shown = np.array([[float(row["p_rest"]), float(row["p_arithmetic"])] for row in rows])
    np.testing.assert_allclose(shown, wanted.probability, atol=1e-6)
    assert [row["predicted"] for row in rows] == [wanted.classes[i] for i in wanted.probability.argmax(axis=1)]
    assert rows[0]["valid_ecg"].split() == [n for n, v in zip(LEADS, wanted.valid["ecg"][0], strict=True) if v]
    assert "the EEG is sampled at 250 Hz: resampled to 200 Hz" in done.stderr
    out = tmp_path / "out.csv"
    again = cli("predict", run / "classifier", raw / "r03.edf", "--fold=1", "--out", out)
    assert again.returncode == 0 and again.stdout == f"{out}\n" and out.read_text() == done.stdout
    whole = cli("predict", run, raw / "r03.edf")
    assert whole.returncode == 0 and whole.stdout != done.stdout


def test_another_rate_and_another_format(cli: Cli, run: Path, raw: Path, tmp_path: Path) -> None:
    record = reader("simulate").records("people=6,windows=3,trials=2,seed=5")[3]
    write_edf(tmp_path / "fast.EDF", signals_of(record), rate=500)
    model = FusionClassifier.load(str(run))
    slow, fast = (model.predict_recording(read_file(str(f))) for f in (raw / "r03.edf", tmp_path / "fast.EDF"))
    assert "the ECG is sampled at 500 Hz: resampled to 200 Hz" in fast.notes
    np.testing.assert_allclose(fast.probability, slow.probability, atol=0.02)
    # WFDB has the ECG alone, at the set's own rate: nothing is resampled.
    data, names = signals_of(record)["ecg"]
    wfdb.wrsamp(
        "w", fs=200, units=["mV"] * 3, sig_name=list(names), p_signal=data.T.astype(np.float64) / 1000,
        fmt=["16"] * 3, write_dir=str(tmp_path),
    )  # fmt: skip
    done = cli("predict", run, tmp_path / "w.hea")
    assert done.returncode == 0 and done.stdout.count("\n") == 4, done.stderr
    assert "there is no EEG" in done.stderr and "resampled" not in done.stderr
    one, *others = (read_file(str(tmp_path / name)).signals["ecg"].data for name in ("w.hea", "w.dat", "w"))
    assert all(np.array_equal(one, other, equal_nan=True) for other in others)


def test_classifier_load_names_window_options_of_another_version(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run / "classifier", tmp_path / "copy"))
    about = json.loads((folder / "config.json").read_text())
    about["window"]["exchanged"] = about["window"].pop("swapped_leads")
    (folder / "config.json").write_text(json.dumps({**about, "sha256": classifier_files.hash_of(about)}))
    with pytest.raises(UserError, match="describes windows by exchanged, which this version"):
        FusionClassifier.load(str(folder))


def test_recordings_that_will_not_do(cli: Cli, run: Path, raw: Path, tmp_path: Path) -> None:
    record = reader("simulate").records("people=6,windows=3,trials=2,seed=5")[3]
    signals = signals_of(record)
    ecg, eeg = signals["ecg"], signals["eeg"]
    fewer = {"ecg": (ecg[0][:1], ("I",)), "eeg": eeg}
    write_edf(tmp_path / "fewer.edf", fewer)
    write_edf(tmp_path / "holes.edf", {"ecg": ecg, "eeg": (eeg[0][2:], eeg[1][2:])})
    (tmp_path / "cut.edf").write_bytes((raw / "r03.edf").read_bytes()[:-100])
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match="the EEG lacks Fp1, Fp2: this classifier takes"):
        FusionClassifier.load(str(run)).predict_recording(read_file(str(tmp_path / "holes.edf")))
    for name, words in (
        ("fewer.edf", "the ECG lacks II, V1: this classifier takes ECG I II V1; EEG Fp1"),
        ("cut.edf", "it is truncated"),
        ("notes.txt", "it is no EDF file (*.edf), and no WFDB header (*.hea) is beside it"),
        ("none.edf", "the file is missing"),
        ("none", "no such file"),
    ):
        done = cli("predict", run, tmp_path / name)
        assert done.returncode == 2 and words in done.stderr and done.stdout == "", done.stderr
        assert done.stderr.count("\n") == 1 and str(tmp_path / name) in done.stderr
    for rest, words in (("0:10", "was trained without subtracting any"), ("0:x", "neither a file nor START:END")):
        done = cli("predict", run, raw / "r03.edf", "--rest", rest)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr
    with pytest.raises(UserError, match="copy it there first"):
        read_file("s3://bucket/a.edf")


def test_a_damaged_folder_is_told(cli: Cli, run: Path, raw: Path, tmp_path: Path) -> None:
    about = json.loads((run / "classifier" / "config.json").read_text())
    eeg = f"{about['ensembles']['0']['encoders']['eeg']}/encoder.safetensors"

    def copy() -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return Path(shutil.copytree(run / "classifier", tmp_path / "copy"))

    for name in ("heads-0.safetensors", eeg, "ecg/config.json"):
        (copy() / name).unlink()
        with pytest.raises(DataError, match=f"{name} is in config.json but not there"):
            FusionClassifier.load(str(tmp_path / "copy"), fold=0)
        data = bytearray((copy() / name).read_bytes())
        data[-10] ^= 1
        (tmp_path / "copy" / name).write_bytes(bytes(data))
        with pytest.raises(DataError, match=f"{name} disagrees with config.json"):
            FusionClassifier.load(str(tmp_path / "copy"), fold=0)
    done = cli("predict", tmp_path / "copy", raw / "r00.edf", "--fold", "0")
    assert done.returncode == 3 and "ecg/config.json disagrees with" in done.stderr
    config_file = copy() / "config.json"
    config_file.write_text(config_file.read_text().replace('"rate": 200', '"rate": 201'))
    with pytest.raises(DataError, match=r"config\.json was altered"):
        FusionClassifier.load(str(tmp_path / "copy"))
    (copy() / "config.json").unlink()
    for url, words in (
        (tmp_path / "copy", "it is not whole, config.json is missing"),
        (tmp_path / "nothing", "holds no classifier; give the folder of a finished sweep"),
        (run / "classifier" / "ecg", "is not a classifier's"),
    ):
        with pytest.raises(UserError, match=words):
            FusionClassifier.load(str(url))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text("{}")
    with pytest.raises(UserError, match="a sweep without a classifier"):
        FusionClassifier.load(str(tmp_path / "old"))
    with pytest.raises(UserError, match="has no fold '7'"):
        FusionClassifier.load(str(run), fold=7)


@pytest.mark.integration
def test_ctrl_c_leaves_nothing_behind(run: Path, raw: Path, tmp_path: Path) -> None:
    words = ["predict", str(run), str(raw / "r00.edf"), "--out", str(tmp_path / "out.csv")]
    # The command interrupts itself once the model is there.
    code = (
        "import os, signal, sys\n"
        "from physio_dist import cli\n"
        "from physio_dist.evaluation.serving import classifier\n"
        "classifier.windows_of = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.argv = ['physio-dist', *{words!r}]\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 75 and "Traceback" not in done.stderr and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_bucket_holds_one_too(study: Study, raw: Path, s3_here: S3) -> None:
    records = records_of(study, HEADS["plain"])
    url = storage.join(s3_here.bucket, "run", "classifier")
    storage.write_bytes(storage.join(url, "stale.safetensors"), b"of an earlier attempt")
    said: list[str] = []
    save(study, records, url, said.append)
    assert "stale.safetensors" not in storage.names(url) and url in said[-1]
    found = FusionClassifier.load(storage.join(s3_here.bucket, "run"), 2).predict_recording(
        read_file(str(raw / "r00.edf"))
    )
    assert np.isfinite(found.probability).all()


def test_a_checkpoint_becomes_an_export(raw: Path, study: Study, tmp_path: Path, data_dir: Path) -> None:
    """An encoder that came as a CBraMod checkpoint lies in the folder as our own files, and says the same."""
    data = study.options.tune.data
    other = prepared(tmp_path, data, eeg=str(data_dir / "cbramod-reference" / "two_layers.pth"))
    records = records_of(other, HEADS["plain"])
    save(other, records, str(tmp_path / "run" / "classifier"), quiet)
    tensors = heard(other, records)
    assert (tmp_path / "run" / "classifier" / "eeg" / "encoder.safetensors").is_file()
    assert same_as_tested(tmp_path / "run", tensors, lambda record: raw / f"{record}.edf") == len(other.table.label)


def test_what_cannot_be_told_from_raw_files_keeps_no_classifier(study: Study, tmp_path: Path) -> None:
    paired(str(tmp_path / "set"), facts_of(people=6, recordings=2, windows=2))
    torch.manual_seed(0)
    other = prepared(tmp_path, str(tmp_path / "set"))
    said: list[str] = []
    save(other, records_of(other, HEADS["plain"]), str(tmp_path / "classifier"), said.append)
    assert said == ["no classifier is kept: the shard set does not tell how raw recordings become its windows"]
    assert not (tmp_path / "classifier").exists()
