"""EEG and ECG of the same moment in one sample."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from physio_dist import config
from physio_dist.data.convert.channels import spec_of
from physio_dist.data.convert.converter import Summary, convert, plan_job
from physio_dist.data.convert.parts import make_part, part_of, spooled
from physio_dist.data.format.index import open_set
from physio_dist.data.format.people import pseudonym, split_of
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.data.handle import open_dataset
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.verify import verify
from physio_dist.errors import UserError
from physio_dist.signals.montage import EEG_19
from physio_dist.signals.readers import reader
from physio_dist.signals.simulators import eeg as simulator

Real = Callable[..., Path]
PAIRED = ("signals=ecg,eeg", "leads=ECG")


def made(source: Path | str, out: Path, *options: str, reader: str = "edf") -> Summary:
    given = config.load(config.ShardConfig, None, ["workers=1", *options])
    return convert(reader, str(source), str(out), given)


def rejects_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


@pytest.fixture
def some(data_dir: Path, tmp_path: Path) -> Path:
    """Three of eegmat's shorter recordings with their table."""
    folder = tmp_path / "eegmat"
    folder.mkdir()
    table = ["file,subject,task"]
    for person in ("Subject00", "Subject01", "Subject02"):
        shutil.copyfile(data_dir / "eegmat" / f"{person}_2.edf", folder / f"{person}_2.edf")
        table.append(f"{person}_2.edf,{person},arithmetic")
    (folder / "recordings.csv").write_text("\n".join([*table, ""]))
    return folder


def test_every_window_of_eegmat_is_a_fit_pair(data_dir: Path, tmp_path: Path) -> None:
    import webdataset
    import wids

    out = tmp_path / "out"
    done = made(data_dir / "eegmat", out, *PAIRED, "samples_per_shard=300")
    shards = done.shard_set
    assert (shards.nsamples, shards.people, done.records) == (853, 36, 72)
    assert rejects_of(out) == []
    assert [shard.url for shard in shards.shards] == [f"ecg-eeg-{n:06d}.tar" for n in range(3)]
    described = {name: (info.channels, info.samples, info.uv_per_bit) for name, info in shards.signals.items()}
    assert described == {"ecg": (("ECG",), 2000, 1.0), "eeg": (EEG_19, 2000, 0.1)}
    assert list(verify(str(out))) == []
    sample_table = read_sample_table(open_set(str(out)))
    assert sample_table.valid["ecg"].all()
    assert sample_table.valid["eeg"].all()
    assert (np.bincount(sample_table.split) > 0).all()
    for person in np.unique(sample_table.person):
        assert set(sample_table.split[sample_table.person == person]) == {split_of(int(person), 0.1, 0.1)}
    urls = [str(out / shard.url) for shard in shards.shards]
    stock = webdataset.WebDataset(urls, shardshuffle=False).decode()
    listed = wids.ShardListDataset(str(out / "index.json"), keep=True)
    sources = {
        name: open_dataset([(str(out), 1.0)], name, ShardCache(str(tmp_path / "c"), 1e9)) for name in shards.signals
    }
    tasks = set()
    for i, sample in enumerate(stock):
        if i % 50:
            continue
        at = np.array([i])
        for name, source in sources.items():
            ours = source.read_batch(0, at * 0, at, at, 1).signal[0]
            np.testing.assert_array_equal(sample[f"{name}.npy"], ours)
            np.testing.assert_array_equal(listed[i][f".{name}.npy"], ours)
        tasks.add(sample["json"]["labels"]["task"])
    assert tasks == {"rest", "arithmetic"}


def test_samples_are_those_of_the_recording_at_that_time(some: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shards = made(some, out, *PAIRED, "eeg.channels=O2,T3", "eeg.uv_per_bit=0.05").shard_set
    assert shards.signals["eeg"].channels == ("O2", "T7")
    assert shards.signals["eeg"].uv_per_bit == 0.05
    recording = reader("edf").read(str(some), "Subject01_2")
    ecg = recording.signals["ecg"].data[0]
    eeg = recording.signals["eeg"].data[[15, 6]]  # O2 and T3 in the file's order
    hidden = f"{pseudonym('eegmat', 'Subject01'):016x}"
    with tarfile.open(out / shards.shards[0].url) as file:
        for name, wave, step in (("ecg", ecg[None], 1.0), ("eeg", eeg, 0.05)):
            member = file.extractfile(f"{hidden}_2-00002.{name}.npy")
            assert member is not None
            stored = np.load(io.BytesIO(member.read())) * step
            # The file is band-limited already, so our own filter leaves its waves as they are.
            for mine, theirs in zip(stored, wave[:, 4000:6000], strict=True):
                assert np.corrcoef(mine, theirs)[0, 1] > 0.98
                assert mine.std() == pytest.approx(theirs.std(), rel=0.1)


def test_channels_can_be_taken_as_the_first_readable_record_has_them(some: Path, tmp_path: Path) -> None:
    named = made(some, tmp_path / "named", *PAIRED).shard_set
    (some / "Subject00_2.edf").write_bytes(b"no EDF")
    found = made(some, tmp_path / "found", "signals=ecg,eeg", "leads=found", "eeg.channels=found").shard_set
    assert (found.signals["ecg"].channels, found.signals["eeg"].channels) == (("ECG",), EEG_19)
    assert found.signals == named.signals
    for file in some.glob("*.edf"):
        file.write_bytes(b"no EDF")
    with pytest.raises(UserError, match=r"leads=found: no record of .* can be read"):
        made(some, tmp_path / "none", "signals=ecg,eeg", "leads=found")


@pytest.mark.parametrize(("signals", "prefix"), [("eeg", "eeg"), ("ecg", "ecg")])
def test_one_of_two_modalities_can_be_written_alone(some: Path, tmp_path: Path, signals: str, prefix: str) -> None:
    shards = made(some, tmp_path / "out", f"signals={signals}", "leads=ECG").shard_set
    assert set(shards.signals) == {signals}
    assert shards.shards[0].url == f"{prefix}-000000.tar"
    assert list(verify(str(tmp_path / "out"))) == []


def test_nothing_tells_a_person_also_where_a_file_is_faulty(some: Path, tmp_path: Path) -> None:
    path = some / "Subject00_2.edf"
    path.write_bytes(path.read_bytes()[:-1])
    patient = some / "Subject01_2.edf"
    data = bytearray(patient.read_bytes())
    data[8:31] = b"X F 02-MAY-1951 Haagse "
    patient.write_bytes(data)
    out = tmp_path / "out"
    assert made(some, out, *PAIRED, "source=corpus").shard_set.people == 2
    (reject,) = rejects_of(out)
    assert reject["record"] == f"{pseudonym('corpus', 'Subject00'):016x}_2"
    assert reject["reason"].endswith("it is truncated")
    for written in out.iterdir():
        content = written.read_bytes()
        assert not any(word in content for word in (b"Subject0", b"Haagse", b"1951"))


def test_records_without_one_of_the_modalities_are_left_out_with_a_reason(some: Path, tmp_path: Path) -> None:
    path = some / "Subject02_2.edf"
    data = bytearray(path.read_bytes())
    data[256 + 20 * 16 : 256 + 21 * 16] = b"Resp            "
    path.write_bytes(data)
    out = tmp_path / "out"
    assert made(some, out, *PAIRED).shard_set.people == 2
    (reject,) = rejects_of(out)
    assert reject["reason"].startswith("no ecg in the recording; it has eeg (EEG Fp1, EEG Fp2, ")
    with pytest.raises(UserError, match=r"lead I, II, .* is missing; the record has ECG ECG; leads=ECG takes"):
        made(some, tmp_path / "twelve")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["signals=ecg,emg"], "signals=ecg,emg has to be some of ecg, eeg"),
        (["signals="], "signals: name at least one of ecg, eeg"),
        (["eeg.channels=Fp1,Fp11"], "eeg.channels: unknown electrode 'Fp11': did you mean 'Fp1'"),
        (["eeg.channels=T3,T7"], "each electrode only once"),
        (["leads=ECG1x"], "leads: unknown lead 'ECG1x': did you mean 'ECG'"),
        (["eeg.low=80"], "eeg_band="),
        (["eeg.uv_per_bit=0"], "eeg_uv_per_bit=0"),
    ],
)
def test_senseless_options_are_refused(options: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        spec_of(config.load(config.ShardConfig, None, options))
    assert told in str(caught.value)


def test_simulated_pairs_have_one_lead_if_asked_and_say_the_state(tmp_path: Path) -> None:
    source, out = "people=12,trials=4,windows=2,seed=5", tmp_path / "out"
    shards = made(source, out, "signals=ecg,eeg", "leads=II", "unusable=keep", reader="simulate").shard_set
    assert (shards.nsamples, shards.people, shards.simulated) == (96, 12, True)
    described = {name: (info.channels, info.samples) for name, info in shards.signals.items()}
    assert described == {"ecg": (("II",), 2000), "eeg": (EEG_19, 2000)}
    assert list(verify(str(out))) == []
    sample_table = read_sample_table(open_set(str(out)))
    assert sample_table.valid["eeg"].all()
    records: dict[str, dict[str, Any]] = {}
    for shard in shards.shards:
        with tarfile.open(out / shard.url) as file:
            for info in file:
                if info.name.endswith(".json"):
                    member = file.extractfile(info)
                    assert member is not None
                    facts = json.loads(member.read())
                    assert records.setdefault(facts["record"], facts["labels"]) == facts["labels"]
    assert len(records) == 48
    simulate = reader("simulate")
    for record, labels in records.items():
        assert labels == simulate.read(source, record).labels
        assert {"arousal", "drive_ecg", "drive_eeg", "heart_rate"} < set(labels)
    assert sum(labels["arousal"] for labels in records.values()) == 24


def test_simulated_ecg_pays_for_no_eeg_and_is_the_same_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(name: str, *options: str) -> Path:
        given = config.load(config.ShardConfig, None, list(options))
        make_part(plan_job("simulate", "people=3,trials=2,windows=2,seed=1", given).part(0), str(tmp_path / name))
        return tmp_path / name

    def refuse(*_: object) -> None:
        raise AssertionError("EEG was made")

    paired = part("paired", "signals=ecg,eeg")
    monkeypatch.setattr(simulator, "scalp", refuse)
    alone = part("alone")
    before, after = load_file(paired), load_file(alone)
    assert set(before) == {"ecg", "eeg", "valid.ecg", "valid.eeg"}
    assert set(after) == {"ecg", "valid.ecg"}
    for name, tensor in after.items():
        assert before[name].tobytes() == tensor.tobytes()
    first, second = (part_of(spooled(str(path)) or "") for path in (paired, alone))
    assert len(second.windows) == 12
    assert len({window.person for window in second.windows}) == 3
    for a, b in zip(first.windows, second.windows, strict=True):
        assert (a.key, a.labels, a.waveform) == (b.key, b.labels, b.waveform)
    spoiled = part_of(spooled(str(part("again", "signals=ecg,eeg"))) or "")
    assert [reject["reason"] for reject in spoiled.rejects] == ["cannot be read (AssertionError)"] * 6
