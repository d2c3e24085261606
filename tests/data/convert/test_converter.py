"""Whole conversions of small folders of recordings: what is in the shards, and what never is."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physio_dist import config
from physio_dist.data.convert.converter import Summary, convert, report_summary
from physio_dist.data.format.index import open_set
from physio_dist.data.format.people import pseudonym
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.data.handle import open_dataset
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.verify import verify
from physio_dist.errors import UserError

pytestmark = pytest.mark.integration


def made(reader: str, source: Path | str, out: Path, *options: str) -> Summary:
    given = config.load(config.ShardConfig, None, ["workers=1", *options])
    return convert(reader, str(source), str(out), given)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def facts_of(out: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as file:
            for info in file:
                if info.name.endswith(".json"):
                    member = file.extractfile(info)
                    assert member is not None
                    found[info.name.removesuffix(".json")] = json.loads(member.read())
    return found


def rejects_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def test_convert_gives_equal_bytes_for_any_workers_and_input_folder(
    tmp_path: Path, write_wfdb: Callable[..., None]
) -> None:
    for place in ("here", "else/where"):
        for i in range(40):
            write_wfdb(tmp_path / place / "in", f"r{i:02d}", i % 5, flat=("V6",) if i % 7 == 0 else ())
            (tmp_path / place / "in" / f"r{i:02d}.hea").open("a").write(f"# Age: {i}\n")
        # The same five waveforms over and over are repeats: take the lowest bits for a mark of their own.
        for i in range(5, 40):
            where = tmp_path / place / "in" / f"r{i:02d}.dat"
            wave = np.frombuffer(where.read_bytes(), "<i2").copy()
            wave[12 * i :: 12 * 500] += 7
            where.write_bytes(wave.tobytes())
            header = where.with_suffix(".hea")
            lines = header.read_text().splitlines()
            for lead in range(12):
                words = lines[1 + lead].split()
                words[5], words[6] = str(wave[lead]), str(int(wave[lead::12].astype(int).sum()) % 65536)
                lines[1 + lead] = " ".join(words)
            header.write_text("\n".join([*lines, ""]))
    first = made("wfdb", tmp_path / "here" / "in", tmp_path / "a", "samples_per_shard=12", "workers=1")
    made("wfdb", tmp_path / "else" / "where" / "in", tmp_path / "b", "samples_per_shard=12", "workers=2")
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert sorted(content(tmp_path / "a")) == [
        *(f"ecg-{n:06d}.tar" for n in range(4)), "index.json", "rejects.jsonl", "samples.safetensors",
    ]  # fmt: skip
    assert [shard.nsamples for shard in first.shard_set.shards] == [12, 12, 12, 4]
    assert list(verify(str(tmp_path / "a"))) == []


def test_stock_readers_open_the_shards_and_agree_with_what_training_reads(tmp_path: Path) -> None:
    import webdataset
    import wids

    out = tmp_path / "out"
    made("simulate", "people=6,windows=3,seed=4", out, "unusable=keep", "samples_per_shard=7")
    shards, sample_table = open_set(str(out)), read_sample_table(open_set(str(out)))
    source = open_dataset([(str(out), 1.0)], "ecg", ShardCache(str(tmp_path / "cache"), 1e9))
    n = shards.nsamples
    ids = np.arange(n)
    batch = source.read_batch(0, ids * 0, ids, ids, n)
    urls = [str(out / shard.url) for shard in shards.shards]
    stock = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in stock] == sample_table.keys(ids)
    np.testing.assert_array_equal(np.stack([sample["ecg.npy"] for sample in stock]), batch.signal)
    listed = wids.ShardListDataset(str(out / "index.json"), keep=True)
    assert len(listed) == n
    for i in (0, 6, 7, n - 1):
        np.testing.assert_array_equal(listed[i][".ecg.npy"], batch.signal[i])
        assert listed[i][".json"] == stock[i]["json"]
    facts = stock[0]["json"]
    assert facts["simulated"] is True
    assert facts["valid"]["ecg"] == sample_table.valid["ecg"][0].tolist()
    assert facts["person"] == f"{int(sample_table.person[0]):016x}"
    assert {sample["json"]["source"] for sample in stock} == {"simulate"}
    starts = [sample["json"]["start_s"] for sample in stock[:3]]
    assert starts == [0.0, 10.0, 20.0]


def test_convert_again_changes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = made("simulate", "people=3,windows=1", out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = made("simulate", "people=3,windows=1", out)
    assert (first.already, again.already) == (False, True)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    said: list[str] = []
    report_summary(again, said.append)
    assert said[0].startswith("already there; the recordings were not looked at again")
    assert "SIMULATED" in said[1]


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("people=3,windows=1", ["unusable=keep"]),
        ("people=3,windows=1", ["split.val=0.3"]),
        ("people=3,windows=1", ["samples_per_shard=2"]),
        ("people=3,windows=1", ["leads=I,II"]),
        ("people=3,windows=1", ["source=other"]),
        ("people=3,windows=1,seed=1", []),
    ],
)
def test_convert_raises_on_set_of_other_data_or_options(tmp_path: Path, source: str, options: list[str]) -> None:
    out = tmp_path / "out"
    made("simulate", "people=3,windows=1", out)
    before = content(out)
    with pytest.raises(UserError, match="already holds a shard set made from other data or options"):
        made("simulate", source, out, *options)
    assert content(out) == before


def test_convert_raises_on_folder_with_foreign_tars(tmp_path: Path) -> None:
    (tmp_path / "holiday.tar").write_bytes(b"photographs")
    with pytest.raises(UserError, match="holds tar files of something else"):
        made("simulate", "people=3,windows=1", tmp_path)
    assert content(tmp_path) == {"holiday.tar": b"photographs"}


def test_labels_and_people_come_from_a_table(tmp_path: Path, write_wfdb: Callable[..., None]) -> None:
    records = [f"rec{i}" for i in range(12)]
    for i, record in enumerate(records):
        write_wfdb(tmp_path / "in", record, i, comments=("Age: 40",))
    rows = "".join(f"{record}.hea,PID-{i // 4},{i},{40 + i}\n" for i, record in enumerate(records))
    table = tmp_path / "t.csv"
    table.write_text(f"file,subject,grade,age\n{rows}")
    out = tmp_path / "out"
    summary = made(
        "wfdb", tmp_path / "in", out, f"labels={table}", "person=subject", "split.val=0.3", "split.test=0.3"
    )  # fmt: skip
    facts = facts_of(out)
    assert {key: fact["labels"]["grade"] for key, fact in facts.items()} == {f"rec{i}-00000": i for i in range(12)}
    assert facts["rec3-00000"]["labels"] == {"age": 43, "grade": 3}
    people = {key: fact["person"] for key, fact in facts.items()}
    assert len(set(people.values())) == summary.shard_set.people == 3
    assert people["rec4-00000"] == people["rec7-00000"] == f"{pseudonym('in', 'PID-1'):016x}"
    sample_table = read_sample_table(open_set(str(out)))
    for person in np.unique(sample_table.person):
        assert len(set(sample_table.split[sample_table.person == person].tolist())) == 1


def test_convert_splits_by_person(tmp_path: Path) -> None:
    made("simulate", "people=40,windows=2,seed=8", tmp_path, "split.val=0.3", "split.test=0.3", "unusable=keep")
    shards = open_set(str(tmp_path))
    sample_table = read_sample_table(shards)
    groups = [set(sample_table.person[sample_table.split == code].tolist()) for code in range(3)]
    assert all(groups)
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    assert shards.splits == {
        name: int((sample_table.split == code).sum()) for code, name in enumerate(("train", "val", "test"))
    }


def test_convert_writes_no_personal_data(tmp_path: Path, write_wfdb: Callable[..., None]) -> None:
    folder = tmp_path / "in"
    secret = ("Name: Zacharias Quixote", "Birth date: 31-12-1949", "Zacharias was here", "Age: 55", "DOB 19491231")
    write_wfdb(folder / "p1000" / "p10000777", "s4", 0, comments=secret)
    write_wfdb(folder / "p1000" / "p10000777", "s5", 1, leads=("I", "II"), comments=secret)
    write_wfdb(folder / "patient042", "s6", 2, comments=secret)
    write_wfdb(folder / "Quixote_Zacharias", "s7", 3, comments=secret)
    write_wfdb(folder, "MRN99881_a", 4, comments=secret)
    write_wfdb(folder, "MRN99881_b", 5, flat=("V1", "V2", "V3", "V4"), comments=secret)
    (folder / "MRN99881_c.hea").write_text("MRN99881_c Zacharias 500\n# Zacharias\n")
    (tmp_path / "t.csv").write_text("record,who\n" + "".join(f"MRN99881_{x},MRN99881\n" for x in "abc"))
    out = tmp_path / "out"
    done = made("wfdb", folder, out, f"labels={tmp_path / 't.csv'}", "person=who")
    assert done.shard_set.nsamples == 4
    assert len(rejects_of(out)) == 3
    said: list[str] = []
    report_summary(done, said.append)
    everything = b"".join(content(out).values()).lower() + "\n".join(said).lower().encode()
    for word in ("zacharias", "quixote", "1949", "31-12", "10000777", "patient042", "mrn99881", "was here"):
        assert word.encode() not in everything, word
    assert facts_of(out)["s4-00000"]["labels"]["age"] == 55


def test_convert_leaves_out_repeats_and_excluded_recordings(tmp_path: Path, write_wfdb: Callable[..., None]) -> None:
    for name, person in (("a", 0), ("b", 1), ("b2", 1)):
        write_wfdb(tmp_path / "one", name, person)
    for name, person in (("c", 1), ("d", 2)):
        write_wfdb(tmp_path / "two", name, person)
    first = made("wfdb", tmp_path / "one", tmp_path / "out1")
    assert sorted(facts_of(tmp_path / "out1")) == ["a-00000", "b-00000"]
    assert rejects_of(tmp_path / "out1") == [{"record": "b2", "reason": "repeat: the same waveform as record b"}]
    assert first.rejected == {"repeat": 1}
    made("wfdb", tmp_path / "two", tmp_path / "out2", f"exclude={tmp_path / 'out1'}")
    assert sorted(facts_of(tmp_path / "out2")) == ["d-00000"]
    assert rejects_of(tmp_path / "out2") == [
        {"record": "c", "reason": f"repeat: the same waveform as in {tmp_path / 'out1'}"}
    ]


def test_convert_raises_on_missing_excluded_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no index"):
        made("simulate", "people=2", tmp_path / "out", f"exclude={tmp_path / 'none'}")
    assert not (tmp_path / "out").exists()


def test_convert_drops_or_keeps_unusable_windows(tmp_path: Path, write_wfdb: Callable[..., None]) -> None:
    write_wfdb(tmp_path / "in", "good", 0)
    write_wfdb(tmp_path / "in", "poor", 1, flat=("V1", "V2", "V3", "V4"))
    dropped = made("wfdb", tmp_path / "in", tmp_path / "reject")
    assert sorted(facts_of(tmp_path / "reject")) == ["good-00000"]
    (reject,) = rejects_of(tmp_path / "reject")
    assert (reject["record"], reject["start_s"]) == ("poor", 0.0)
    assert reject["reason"].startswith("unusable: flat: V1, V2, V3, V4")
    assert dropped.rejected == {"unusable": 1}
    made("wfdb", tmp_path / "in", tmp_path / "label", "unusable=keep")
    facts = facts_of(tmp_path / "label")
    assert facts["good-00000"]["quality"] == {"fit": True, "reasons": []}
    assert facts["poor-00000"]["quality"]["fit"] is False
    assert facts["poor-00000"]["valid"]["ecg"] == [True] * 6 + [False] * 4 + [True] * 2
    assert rejects_of(tmp_path / "label") == []
    assert list(verify(str(tmp_path / "label"))) == []


def test_leads_are_chosen_ordered_and_masked_where_they_are_missing(
    tmp_path: Path, write_wfdb: Callable[..., None], heart: Callable[[int], np.ndarray]
) -> None:
    write_wfdb(tmp_path / "in", "whole", 0)
    write_wfdb(tmp_path / "in", "part", 1, leads=("V2", "II", "I"))
    only = made("wfdb", tmp_path / "in", tmp_path / "a", "leads=V5,II")
    assert only.shard_set.signals["ecg"].channels == ("V5", "II")
    assert [reject["record"] for reject in rejects_of(tmp_path / "a")] == ["part"]
    masked = made("wfdb", tmp_path / "in", tmp_path / "b", "leads=V5,II", "missing_channels=mask", "unusable=keep")
    assert masked.shard_set.nsamples == 2
    facts = facts_of(tmp_path / "b")
    assert facts["part-00000"]["valid"]["ecg"] == [False, True]
    assert facts["whole-00000"]["valid"]["ecg"] == [True, True]
    shards = open_set(str(tmp_path / "b"))
    source = open_dataset([(str(tmp_path / "b"), 1.0)], "ecg", ShardCache(str(tmp_path / "c"), 1e9))
    batch = source.read_batch(0, np.zeros(2, int), np.arange(2), np.arange(2), 2)
    row = read_sample_table(shards).keys(np.arange(2)).index("whole-00000")
    wave = heart(0)[[10, 1]].astype(float)
    for lead in (0, 1):
        assert np.corrcoef(batch.signal[row, lead, ::2], wave[lead, ::5])[0, 1] > 0.8
    assert not batch.signal[1 - row, 0].any()


def test_convert_raises_if_no_window_is_usable(tmp_path: Path, write_wfdb: Callable[..., None]) -> None:
    write_wfdb(tmp_path / "in", "few", 0, leads=("I", "II", "V1"))
    with pytest.raises(UserError, match=r"none of its 1 records .* first reasons: few: lead V2, V3"):
        made("wfdb", tmp_path / "in", tmp_path / "out")
    assert content(tmp_path / "out") == {}
    assert made("wfdb", tmp_path / "in", tmp_path / "out", "leads=I,V1").shard_set.nsamples == 1


def test_convert_raises_on_unfinished_conversion_with_other_options(tmp_path: Path) -> None:
    (tmp_path / "_writing.json").write_text('{"job": "of somebody else"}')
    with pytest.raises(UserError, match="holds an unfinished conversion of other data or with other options"):
        made("simulate", "people=2,windows=1", tmp_path)
    assert sorted(content(tmp_path)) == ["_writing.json"]


def test_convert_removes_leftovers_of_a_killed_run(tmp_path: Path) -> None:
    made("simulate", "people=2,windows=1", tmp_path)
    before = content(tmp_path)
    job = json.loads(before["index.json"])["physio_dist"]["made_by"]["job"]
    (tmp_path / "_writing.json").write_text(json.dumps({"job": job}))
    (tmp_path / ".index.json.123-456.tmp").write_text("{")
    assert made("simulate", "people=2,windows=1", tmp_path).already
    assert content(tmp_path) == before


def test_code15_real_exams_are_converted_with_their_labels_and_people(data_dir: Path, tmp_path: Path) -> None:
    import csv

    done = made("code15", data_dir / "code15-sample", tmp_path, "unusable=keep", "window.seconds=5")
    table = {row["exam_id"]: row for row in csv.DictReader((data_dir / "code15-sample" / "exams.csv").open())}
    facts = facts_of(tmp_path)
    assert {key.split("-")[0] for key in facts} | {reject["record"] for reject in rejects_of(tmp_path)} == set(table)
    for key, fact in facts.items():
        row = table[key.split("-")[0]]
        assert fact["labels"]["RBBB"] is (row["RBBB"].lower() in ("true", "1"))
        assert fact["person"] == f"{pseudonym('code15-sample', row['patient_id']):016x}"
    assert done.shard_set.people <= len({row["patient_id"] for row in table.values()})
    assert list(verify(str(tmp_path))) == []


def test_real_records_of_three_sources_are_converted(data_dir: Path, tmp_path: Path) -> None:
    done = made("wfdb", data_dir / "cinc2021", tmp_path, "unusable=keep", "samples_per_shard=20")
    facts = facts_of(tmp_path)
    assert done.shard_set.nsamples + len(rejects_of(tmp_path)) >= 50
    assert all(code.isdigit() for fact in facts.values() for code in fact["labels"]["dx"])
    assert {fact["source"] for fact in facts.values()} == {"cinc2021"}
    assert list(verify(str(tmp_path))) == []
