"""DREAMER's own file, in both versions of MATLAB's format."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physio_dist.data.format.index import open_set
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.errors import UserError
from physio_dist.evaluation.label_table import load_label_table
from physio_dist.signals.readers import reader
from physio_dist.signals.recording import RecordError
from physio_dist.signals.windows import WindowSpec, windows_of
from tests.evaluation.study_samples import opened
from tests.signals.readers.dreamer_samples import ELECTRODES, WRITERS, people_of, write_v5, write_v73

People = list[dict[str, Any]]
SPEC = WindowSpec(seconds=2, leads=("ECG", "ECG2"), eeg_channels=ELECTRODES, signals=("ecg", "eeg"))


@pytest.fixture(scope="module")
def people() -> People:
    return people_of(people=3, clips=18, seconds=4.5, rest=2.5)


@pytest.fixture(scope="module", params=["v5", "v5 not compressed", "v73"])
def file(request: pytest.FixtureRequest, people: People, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dreamer") / "DREAMER.mat"
    if request.param == "v73":
        return write_v73(path, people)
    return write_v5(path, people, compressed=request.param == "v5")


def test_every_clip_and_every_rest_is_a_recording(file: Path, people: People) -> None:
    dreamer = reader("dreamer")
    records = dreamer.records(str(file))
    assert len(records) == 3 * 18 * 2 and records[:2] == ["s01-c01-baseline", "s01-c01-stimulus"]
    assert dreamer.records(str(file.parent)) == records
    for record in [*records[::7], "s03-c18-stimulus", "s01-c02-baseline"]:
        who, clip, phase = int(record[1:3]) - 1, int(record[5:7]) - 1, record[8:]
        read, wanted = dreamer.read(str(file), record), people[who]
        part = "stimuli" if phase == "stimulus" else "baseline"
        for signal, rate, channels in (("EEG", 128.0, ELECTRODES), ("ECG", 256.0, ("ECG", "ECG2"))):
            found = read.signals[signal.lower()]
            assert (found.rate, found.channels) == (rate, channels)
            assert np.array_equal(found.data, wanted[signal][part][clip].T.astype(np.float32))
        assert read.person == f"s{who + 1:02d}"
        labels = {"clip": clip + 1, "phase": phase, "age": 20 + who, "sex": "MFM"[who]}
        if phase == "stimulus":
            labels |= {
                name: int(wanted[f"Score{name.title()}"][clip, 0]) for name in ("valence", "arousal", "dominance")
            }
        assert read.labels == labels


def test_both_signals_come_to_one_rate_and_the_offset_goes(file: Path) -> None:
    windows = windows_of(reader("dreamer").read(str(file), "s02-c05-stimulus"), SPEC)
    assert len(windows) == 2
    for window in windows:
        assert window.usable and window.data["eeg"].shape == (14, 400) and window.data["ecg"].shape == (2, 400)
        # 0.1 uV a bit: noise of 30 uV, of which the band leaves most, and nothing of the 4,200.
        assert np.abs(window.data["eeg"].mean(axis=1)).max() < 300 and 100 < window.data["eeg"].std() < 300


@pytest.mark.parametrize("record", ["s04-c01-stimulus", "s01-c19-stimulus", "s01-c00-baseline", "s01-c01", "../s01"])
def test_unknown_records_are_refused(file: Path, record: str) -> None:
    with pytest.raises(RecordError):
        reader("dreamer").read(str(file), record)


BAD: dict[str, tuple[Callable[[People], Any], list[str]]] = {
    "a rating of 6": (lambda p: p[1]["ScoreArousal"].put(6, 6), ["person 2, clip 7", "ScoreArousal is 6", "1 to 5"]),
    "a rating of 0": (lambda p: p[0]["ScoreValence"].put(0, 0), ["person 1, clip 1", "ScoreValence is 0"]),
    "half a rating": (lambda p: p[2]["ScoreDominance"].put(17, 2.5), ["person 3, clip 18", "is 2.5"]),
    "no rating": (lambda p: p[1]["ScoreValence"].put(3, np.nan), ["person 2, clip 4", "ScoreValence is nan"]),
    "no scores": (lambda p: p[1].pop("ScoreValence"), ["person 2", "ScoreValence is missing"]),
    "a score short": (
        lambda p: p[2].update(ScoreValence=p[2]["ScoreValence"][:-1]),
        ["person 3", "ScoreValence 17", "EEG.stimuli 18"],
    ),
    "no ECG": (lambda p: p[1].pop("ECG"), ["person 2", "ECG.baseline is missing"]),
    "no baseline": (lambda p: p[0]["EEG"].pop("baseline"), ["person 1", "EEG.baseline is missing"]),
    "a clip short": (lambda p: p[1]["ECG"]["stimuli"].pop(), ["person 2", "ECG.stimuli 17"]),
    "a clip short of everything": (
        lambda p: [one.pop() for s in ("EEG", "ECG") for one in p[1][s].values()]
        + [p[1].update({name: p[1][name][:-1]}) for name in ("ScoreValence", "ScoreArousal", "ScoreDominance")],
        ["person 2", "17 clips where person 1 has 18"],
    ),
    "an empty clip": (
        lambda p: p[2]["EEG"]["stimuli"].__setitem__(4, np.zeros((0, 0))), ["person 3, clip 5", "EEG.stimuli is empty"],
    ),
    "text": (lambda p: p[0]["ECG"]["stimuli"].__setitem__(0, "none"), ["person 1, clip 1", "holds no numbers"]),
    "the other way round": (
        lambda p: p[0]["EEG"]["baseline"].__setitem__(1, p[0]["EEG"]["baseline"][1].T),
        ["person 1, clip 2", "EEG.baseline is 14 x 27", "time x 14"],
    ),
    "nobody": (lambda p: p.clear(), ["Data is missing or empty"]),
}  # fmt: skip


@pytest.mark.parametrize("version", WRITERS)
@pytest.mark.parametrize("case", BAD)
def test_what_is_not_dreamers_is_told_with_person_and_clip(case: str, version: str, tmp_path: Path) -> None:
    change, words = BAD[case]
    people = people_of(people=3, clips=18, seconds=0.2, rest=0.2)
    change(people)
    path = WRITERS[version](tmp_path / "DREAMER.mat", people)
    with pytest.raises(UserError) as caught:
        reader("dreamer").records(str(path))
    for word in (str(path), *words):
        assert word in str(caught.value)


@pytest.mark.parametrize("version", WRITERS)
def test_other_rates_and_electrodes_are_refused(version: str, tmp_path: Path) -> None:
    people = people_of(people=1, clips=2, seconds=2, rest=2)
    for facts, word in (
        ({"EEG_SamplingRate": 256.0}, "EEG_SamplingRate is [256.0]"), ({"ECG_SamplingRate": 128.0}, "ECG_SamplingRate"),
        ({"EEG_Electrodes": [*ELECTRODES[1:], "AF3"]}, "EEG_Electrodes are not"),
    ):  # fmt: skip
        path = WRITERS[version](tmp_path / "DREAMER.mat", people, **facts)
        with pytest.raises(UserError) as caught:
            reader("dreamer").records(str(path))
        assert word in str(caught.value)


def test_other_files_are_refused(
    data_dir: Path, tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    whole = write_v5(tmp_path / "whole.mat", people_of(people=2, clips=2, seconds=2, rest=2), compressed=True)
    raw = whole.read_bytes()
    (tmp_path / "cut.mat").write_bytes(raw[: len(raw) * 3 // 4])
    middle = len(raw) // 2
    (tmp_path / "spoilt.mat").write_bytes(raw[:middle] + bytes(500) + raw[middle + 500 :])
    (tmp_path / "head.mat").write_bytes(raw[:60])
    (tmp_path / "text.mat").write_text("no MATLAB at all" * 20)
    other = data_dir / "code15-sample" / "exams_part_sample.hdf5"
    for path, words in (
        (tmp_path / "cut.mat", ["after person 1", "ends in the middle"]),
        (tmp_path / "spoilt.mat", ["not DREAMER.mat"]),
        (tmp_path / "head.mat", ["no MATLAB file"]), (tmp_path / "text.mat", ["no MATLAB file"]),
        (data_dir / "cpsc2018" / "A1980.mat", ["no struct DREAMER, only ECG"]), (other, ["no struct DREAMER"]),
        (tmp_path / "missing.mat", ["no such file"]), (data_dir / "cpsc2018", ["DREAMER.mat: no such file"]),
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            reader("dreamer").records(str(path))
        assert all(word in str(caught.value) for word in words), str(caught.value)
    done = cli("shard", "dreamer", tmp_path / "cut.mat", "--out", tmp_path / "out", "signals=ecg,eeg")
    assert done.returncode == 2 and "after person 1" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.integration
def test_one_person_at_a_time_is_in_memory(tmp_path: Path) -> None:
    """Six people of 12 MB each, read twice, of whom one and its copy are held."""
    people = people_of(people=6, clips=2, seconds=200, rest=120)
    path = write_v5(tmp_path / "DREAMER.mat", people, compressed=False)
    size = path.stat().st_size
    assert size > 60e6
    code = (
        "import resource, sys; from physio_dist.signals.readers import reader; r = reader('dreamer');"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "[r.read(sys.argv[1], x) for x in r.records(sys.argv[1])];"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 0.6 * size


def test_a_whole_file_becomes_a_set_of_windows_with_ratings(
    tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    """The full 23 people and 18 clips, with clips of a second."""
    people = people_of(people=23, clips=18, seconds=1.1, rest=1.1, seed=1)
    path, out = write_v5(tmp_path / "DREAMER.mat", people), tmp_path / "set"
    done = cli(
        "shard", "dreamer", path, "--out", out, "signals=ecg,eeg", "leads=found", "eeg.channels=found",
        "source=dreamer", "window.seconds=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = open_set(str(out))
    assert made.people == 23 and made.nsamples == 23 * 18 * 2 and made.signals["ecg"].channels == ("ECG", "ECG2")
    assert sorted(made.signals["eeg"].channels) == sorted(ELECTRODES) and made.rate == 200.0
    keys = read_sample_table(made).keys(np.arange(made.nsamples))
    assert sum("-c07-baseline-" in key for key in keys) == 23 and not any("s07" in key for key in keys)
    arousal = np.stack([one["ScoreArousal"].ravel() for one in people])
    for neutral, high in (("high", arousal >= 3), ("low", arousal > 3), ("drop", arousal > 3)):
        table = load_label_table(opened(made.url), "dreamer", "arousal", neutral=neutral, clip="clip")
        assert table.classes == ("low", "high") and table.clip is not None and len(set(table.clip.tolist())) == 18
        assert len(table.label) == (int((arousal != 3).sum()) if neutral == "drop" else 414)
        assert int(table.label.sum()) == int(high.sum())
        assert any(f"tune.neutral={neutral}" in note for note in table.notes)
