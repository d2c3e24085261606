"""One part of a conversion: names that give nobody away, facts, rejects, and the job's digest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from physio_dist.config import ShardConfig
from physio_dist.data.convert.channels import spec_of
from physio_dist.data.convert.converter import plan_job
from physio_dist.data.convert.parts import PART_RECORDS, Job, make_part, part_of, record_keys, spooled, without_person
from physio_dist.data.format.index import KEY_PATTERN
from physio_dist.data.format.people import pseudonym
from physio_dist.errors import UserError
from physio_dist.storage import StorageError

names = st.lists(st.text(min_size=1, max_size=90), min_size=1, max_size=20, unique=True)


@given(names)
def test_keys_are_unique_and_in_the_characters_that_keys_may_hold(records: list[str]) -> None:
    keys = record_keys(records)
    assert len(set(keys)) == len(records)
    assert all(KEY_PATTERN.fullmatch(key) and len(key) <= 60 for key in keys)


def test_keys_leave_folders_out_and_tell_alike_endings_apart() -> None:
    keys = record_keys(["John Doe/s1", "x/r 2", "y/r_2", "plain"])
    assert keys[0] == "s1"
    assert keys[3] == "plain"
    assert keys[1].startswith("r_2-")
    assert keys[2].startswith("r_2-")
    assert record_keys(["plain", "other"])[0] == "plain"


@pytest.mark.parametrize(
    ("name", "person", "left"),
    [
        ("Subject00_1", "Subject00", "{}_1"),
        ("p10000032", "10000032", "{}"),
        ("10000032_x", "p10000032", "{}_x"),
        ("00001_hr", "1", "00001_hr"),
        ("visit-7-b", "7", "visit-{}-b"),
        ("s40689238", "p10000032", "s40689238"),
        ("anything", "p", "anything"),
        ("a.c", "a.c", "{}"),
        ("abc", "a.c", "abc"),
        ("r1", None, "r1"),
    ],
)
def test_a_persons_id_in_a_records_name_becomes_the_pseudonym(name: str, person: str | None, left: str) -> None:
    assert without_person(name, "src", person) == left.format(f"{pseudonym('src', person or ''):016x}")


@given(st.from_regex(r"[A-Za-z0-9_-]{1,60}", fullmatch=True), st.from_regex(r"[A-Za-z0-9]{1,8}", fullmatch=True))
def test_names_stay_short_whatever_is_hidden_in_them(name: str, person: str) -> None:
    assert len(without_person(name, "src", person)) <= 70


def job_of(folder: Path, **options: object) -> Job:
    return plan_job("wfdb", str(folder), ShardConfig(**options))  # type: ignore[arg-type]


def test_make_part_spools_samples_facts_and_rejects(tmp_path: Path, write_wfdb: Callable[..., None]) -> None:
    folder = tmp_path / "in"
    write_wfdb(folder, "good", 0, comments=("Age: 50", "Name: Ann Smith"))
    write_wfdb(folder, "few", 1, leads=("I", "II", "V1"))
    job = job_of(folder)
    read, facts = make_part(job.part(0), str(tmp_path / "part"), return_facts=True)
    assert read == 2
    assert facts is not None
    assert spooled(str(tmp_path / "part")) == facts
    part = part_of(facts)
    assert part.records == 2
    assert [reject["record"] for reject in part.rejects] == ["few"]
    assert part.rejects[0]["reason"].startswith("lead V2, V3, ")
    (window,) = part.windows
    assert (window.key, window.record, window.start_s, window.usable) == ("good-00000", "good", 0.0, True)
    assert window.labels["age"] == 50
    assert window.person == pseudonym("in", "record good")
    with safe_open(tmp_path / "part", "numpy") as file:
        assert file.get_tensor("ecg").shape == (1, 12, 2000)
        assert file.get_tensor("valid.ecg").all()
    assert b"Smith" not in (tmp_path / "part").read_bytes()


def test_spooled_returns_none_for_damaged_or_missing_part(tmp_path: Path, write_wfdb: Callable[..., None]) -> None:
    write_wfdb(tmp_path / "in", "good", 0)
    where = tmp_path / "part"
    assert spooled(str(where)) is None
    job = job_of(tmp_path / "in").part(0)
    _, facts = make_part(job, str(where), return_facts=True)
    whole = where.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    for damaged in (*(whole[:n] for n in (0, 5, 8, 200, head, len(whole) - 1)), whole + b"1", b"\xff" * 900):
        where.write_bytes(damaged)
        assert spooled(str(where)) is None
        assert make_part(job, str(where), resume=True, return_facts=True) == (1, facts)
        assert where.read_bytes() == whole
    where.write_bytes(whole[:-1] + b"?")
    assert make_part(job, str(where), resume=True, return_facts=True) == (0, facts)
    assert make_part(job, str(where), resume=True) == (0, None)


def test_parts_cover_all_records_and_carry_only_their_own(tmp_path: Path) -> None:
    records = tuple(f"r{i}" for i in range(2 * PART_RECORDS + 3))
    job = Job(
        "wfdb", str(tmp_path), "src", spec_of(ShardConfig()), records, records,
        {record: {"x": 1} for record in records}, {"r0": "ann", "r40": "bob"},
    )  # fmt: skip
    parts = [job.part(number) for number in range(job.parts())]
    assert [len(part.records) for part in parts] == [PART_RECORDS, PART_RECORDS, 3]
    assert sum((part.records for part in parts), ()) == records
    assert [set(part.labels) for part in parts] == [set(part.records) for part in parts]
    assert [part.people for part in parts] == [{"r0": "ann"}, {"r40": "bob"}, {}]


def test_the_digest_tells_content_and_options_but_not_the_place(
    tmp_path: Path, write_wfdb: Callable[..., None]
) -> None:
    for place in ("a", "b"):
        write_wfdb(tmp_path / place / "in", "r1", 0)
    job = job_of(tmp_path / "a" / "in")
    assert job.digest() == job_of(tmp_path / "b" / "in").digest()
    assert job.digest() != job_of(tmp_path / "a" / "in", leads="I,II").digest()
    assert job.digest() != job_of(tmp_path / "a" / "in", source="other").digest()
    assert job.digest() != replace(job, labels={"r1": {"x": 1}}).digest()


def test_simulations_with_other_seeds_or_lengths_are_other_jobs() -> None:
    digests = {
        plan_job("simulate", source, ShardConfig()).digest()
        for source in ("people=3,windows=2,seed=1", "people=3,windows=2,seed=2", "people=3,windows=3,seed=1")
    }
    assert len(digests) == 3


def test_make_part_rejects_record_whose_reader_crashes(tmp_path: Path, write_wfdb: Callable[..., None]) -> None:
    for i, name in enumerate(("a", "b")):
        write_wfdb(tmp_path / "in", name, i)
    header = tmp_path / "in" / "a.hea"
    header.write_text(header.read_text().replace("a.dat", "Zacharias" * 40))
    part = part_of(make_part(job_of(tmp_path / "in").part(0), str(tmp_path / "part"), return_facts=True)[1] or "")
    assert part.rejects == [{"record": "a", "reason": "cannot be read (OSError)"}]
    assert [window.record for window in part.windows] == ["b"]


def test_make_part_raises_on_unwritable_spool(tmp_path: Path, write_wfdb: Callable[..., None]) -> None:
    write_wfdb(tmp_path / "in", "good", 0)
    with pytest.raises(StorageError, match="cannot write /proc/nowhere/part"):
        make_part(job_of(tmp_path / "in").part(0), "/proc/nowhere/part")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"leads": "I,VI"}, "leads: unknown lead 'VI': did you mean"),
        ({"leads": "I,I"}, "each only once"),
        ({"leads": "i,AVR"}, None),
    ],
)
def test_leads_are_named_by_people(options: dict[str, str], told: str | None) -> None:
    if told is None:
        assert spec_of(ShardConfig(**options)).leads == ("I", "aVR")  # type: ignore[arg-type]
        return
    with pytest.raises(UserError) as caught:
        spec_of(ShardConfig(**options))  # type: ignore[arg-type]
    assert told in str(caught.value)
