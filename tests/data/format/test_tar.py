"""One shard: what is written can be read by everybody, and nothing dangerous is ever read."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from physio_dist.data.format import tar
from physio_dist.errors import DataError

SAMPLES = [
    tar.Sample(f"rec-{i}", {"ecg": np.arange(24, dtype=np.int16).reshape(2, 12) * i}, {"labels": {"n": i}})
    for i in range(3)
]


def written(samples: list[tar.Sample] = SAMPLES) -> tuple[bytes, list[tar.Places]]:
    file = io.BytesIO()
    places = tar.write(samples, file)
    return file.getvalue(), places


def npy(array: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def packed(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar as a stranger may write it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as out:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data) if kind == tarfile.REGTYPE else 0, kind
            info.linkname = "/etc/passwd"
            out.addfile(info, io.BytesIO(data))
    return file.getvalue()


GOOD = npy(np.zeros((2, 3), np.int16))


def test_offsets_point_at_the_values_and_numpy_reads_the_members() -> None:
    data, places = written()
    with tarfile.open(fileobj=io.BytesIO(data)) as file:
        assert file.getnames() == [f"rec-{i}.{end}" for i in range(3) for end in ("ecg.npy", "json")]
        for i, place in enumerate(places):
            member = file.extractfile(f"rec-{i}.ecg.npy")
            facts = file.extractfile(f"rec-{i}.json")
            assert member is not None
            assert facts is not None
            array = np.load(io.BytesIO(member.read()), allow_pickle=False)
            np.testing.assert_array_equal(array, SAMPLES[i].signals["ecg"])
            np.testing.assert_array_equal(np.frombuffer(data, "<i2", 24, place["ecg"][0]).reshape(2, 12), array)
            assert place["ecg"][1] == zlib.crc32(array.tobytes())
            assert json.loads(facts.read()) == SAMPLES[i].facts


def test_scan_finds_what_write_wrote() -> None:
    data, places = written()
    members = tar.scan(io.BytesIO(data), "x.tar")
    assert [member.offset for member in members] == [{"ecg": place["ecg"][0]} for place in places]
    assert [member.key for member in members] == ["rec-0", "rec-1", "rec-2"]
    assert {member.shape["ecg"] for member in members} == {(2, 12)}
    assert {member.dtype["ecg"] for member in members} == {np.dtype(np.int16)}
    assert members[2].facts == {"labels": {"n": 2}}


def test_write_is_deterministic() -> None:
    assert written()[0] == written()[0]
    with tarfile.open(fileobj=io.BytesIO(written()[0])) as file:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in file} == {(0, 0, 0, "", "")}


def test_long_keys_fit() -> None:
    key = "k" * 80
    data, _ = written([tar.Sample(key, SAMPLES[0].signals, {})])
    assert [member.key for member in tar.scan(io.BytesIO(data), "x.tar")] == [key]


def test_two_signals_of_a_sample_are_told_apart() -> None:
    both = tar.Sample("a", {"eeg": np.ones((3, 5), np.int16), "ecg": np.zeros((2, 5), np.int16)}, {})
    data, places = written([both])
    (member,) = tar.scan(io.BytesIO(data), "x.tar")
    assert member.offset == {name: start for name, (start, _) in places[0].items()}
    assert member.shape == {"ecg": (2, 5), "eeg": (3, 5)}
    assert np.frombuffer(data, "<i2", 15, places[0]["eeg"][0]).tolist() == [1] * 15


def test_not_a_number_in_the_facts_is_refused_rather_than_written_as_no_json() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        written([tar.Sample("a", {}, {"labels": {"x": float("nan")}})])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(written()[0]) - 1))
def test_scan_raises_on_truncated_tar(length: int) -> None:
    data, _ = written()
    try:
        members = tar.scan(io.BytesIO(data[:length]), "x.tar")
    except DataError as error:
        assert "x.tar" in str(error)
    else:
        # Only zeros of the padding after the end mark are gone.
        assert len(members) == 3
        assert not any(data[length:])


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 12 * 512), st.integers(1, 255))
def test_scan_survives_or_names_any_altered_byte(place: int, change: int) -> None:
    data = bytearray(written()[0])
    data[place] ^= change
    try:
        tar.scan(io.BytesIO(bytes(data)), "x.tar")
    except DataError as error:
        assert "x.tar" in str(error)


class Bomb:
    """Unpickling it would be noticed."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('unpickled')",)


BOMB = npy(np.array([Bomb()], dtype=object), allow_pickle=True)
ENTRIES = [
    (packed(("a.ecg.npy", BOMB)), "'a.ecg.npy' holds pickled objects, which are never opened"),
    (packed(("a.ecg.npy", pickle.dumps(Bomb()))), "'a.ecg.npy' is not a NumPy array"),
    (packed(("a.json", pickle.dumps(Bomb()))), "'a.json' is not JSON"),
    (packed(("/a.ecg.npy", GOOD)), "'/a.ecg.npy' is not a plain file with a plain name"),
    (packed(("../a.ecg.npy", GOOD)), "'../a.ecg.npy' is not a plain file with a plain name"),
    (packed(("x/../../a.ecg.npy", GOOD)), "is not a plain file with a plain name"),
    (packed(("a.ecg.npy", b""), kind=tarfile.SYMTYPE), "is not a plain file"),
    (packed(("a.ecg.npy", b""), kind=tarfile.LNKTYPE), "is not a plain file"),
    (packed(("a.ecg.npy", b""), kind=tarfile.FIFOTYPE), "is not a plain file"),
    (packed(("a.ecg.npy", GOOD), ("a.ecg.npy", GOOD)), "'a.ecg.npy' stands in it twice"),
    (packed(("a.json", b"{}"), ("b.json", b"{}"), ("a.json", b"{}")), "'a.json' stands in it twice"),
    (packed(("a.json", b"[1]")), "'a.json' is not a JSON object"),
    (packed(("a.json", b"{")), "'a.json' is not JSON"),
    (packed(("a.json", b"[" * 100_000)), "'a.json' is not JSON"),
    (packed(("a.ecg.npy", npy(np.asfortranarray(np.zeros((2, 3), np.int16))))), "is stored column by column"),
    (packed(("a.ecg.npy", GOOD[:-2])), "its header promises another size"),
    (packed(("a.ecg.npy", GOOD[:20])), "'a.ecg.npy' is not a NumPy array"),
    (packed(("a.ecg.npy", b"")), "'a.ecg.npy' is not a NumPy array"),
    (packed(("a.ecg.npy", GOOD[:10] + b"((((" + GOOD[14:])), "'a.ecg.npy' is not a NumPy array"),
    (b"", "not a whole tar"),
    (b"\x1f\x8b" + bytes(2000), "not a whole tar"),
]


@pytest.mark.parametrize(("data", "told"), ENTRIES, ids=range(len(ENTRIES)))
def test_scan_raises_on_forbidden_members(data: bytes, told: str) -> None:
    with pytest.raises(DataError) as caught:
        tar.scan(io.BytesIO(data), "x.tar")
    assert told in str(caught.value)
    assert str(caught.value).startswith("x.tar: ")


def test_folders_and_a_leading_dot_as_tar_writes_them_are_no_fault() -> None:
    file = io.BytesIO(packed(("./a.ecg.npy", GOOD), ("./a.json", b"{}")))
    assert [member.key for member in tar.scan(file, "x.tar")] == ["a"]
    assert tar.scan(io.BytesIO(packed(("./", b""), kind=tarfile.DIRTYPE)), "x.tar") == []


def test_arrays_of_other_kinds_are_described_not_refused() -> None:
    data = packed(("a.ecg.npy", npy(np.zeros((2, 3), ">i2"))), ("b.npy", npy(np.zeros(4, np.float32))))
    a, b = tar.scan(io.BytesIO(data), "x.tar")
    assert a.dtype["ecg"] == np.dtype(">i2") != np.dtype("<i2")
    assert b.shape == {"npy": (4,)}
