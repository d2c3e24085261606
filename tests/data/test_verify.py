"""`verify`, `index` and `inspect`: every fault is named, and what others wrote becomes usable."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physio_dist import storage
from physio_dist.data import describe
from physio_dist.data.format import tar
from physio_dist.data.format.index import ShardInfo, ShardSet, fingerprint_of, open_set
from physio_dist.data.format.sample_table import publish, read_sample_table
from physio_dist.data.handle import open_dataset
from physio_dist.data.index_existing import IndexOptions, index_existing
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.verify import verify
from physio_dist.errors import DataError, UserError
from physio_dist.signals.montage import ECG_12
from tests.data.conftest import signal_of
from tests.data.format.test_tar import BOMB, npy, packed

Make = Callable[..., ShardSet]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def replaced(shards: ShardSet, number: int, data: bytes) -> None:
    """Put other bytes in a shard's place and let the index vouch for them, as a faulty writer would."""
    name = shards.shards[number].url
    storage.write_bytes(shards.shard_url(number), data)
    infos = list(shards.shards)
    infos[number] = ShardInfo(name, infos[number].nsamples, len(data), hashlib.sha256(data).hexdigest())
    print_ = fingerprint_of(infos, shards.signals, shards.rate, shards.sample_table_sha256)
    publish(dataclasses.replace(shards, shards=tuple(infos), fingerprint=print_), read_sample_table(shards))


def shard(edit: Callable[[int, dict[str, bytes]], object], first: int = 5, size: int = 3) -> bytes:
    """The second shard of a built set, with its members edited: ``edit(sample, {name: bytes})``."""
    members: list[tuple[str, bytes]] = []
    for i in range(first, first + size):
        key = f"s0-{i:04d}"
        mine = {f"{key}.ecg.npy": npy(signal_of(i)), f"{key}.json": json.dumps({"labels": {"n": i % 2}}).encode()}
        edit(i, mine)
        members += mine.items()
    return packed(*members)


def test_a_clean_set_has_no_faults(make_set: Make, tmp_path: Path, cli: Cli) -> None:
    make_set(str(tmp_path))
    assert list(verify(str(tmp_path))) == []
    done = cli("verify", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}: 12 samples in 3 shards, all as the index says\n"


def test_each_damaged_file_is_named_and_the_status_is_3(
    make_set: Make, tmp_path: Path, flip_bit: Callable[[Path, int], None], cli: Cli
) -> None:
    make_set(str(tmp_path), sizes=(5, 3, 4, 2))
    flip_bit(tmp_path / "ecg-000000.tar", 700)
    os.truncate(tmp_path / "ecg-000001.tar", 1000)
    (tmp_path / "ecg-000002.tar").unlink()
    (tmp_path / "stray.tar").write_bytes(b"")
    done = cli("verify", tmp_path)
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "stray.tar: lies beside the shards but is not in the index",
        "ecg-000000.tar: its sha256 disagrees with the index",
        "ecg-000001.tar: 1000 bytes, the index says 10240",
        "ecg-000001.tar: not a whole tar: unexpected end of data",
        "ecg-000002.tar: missing",
    ]
    assert done.stderr == f"physio-dist: data failed verification: {tmp_path}: 5 fault(s) (exit status 3)\n"


@pytest.mark.parametrize("name", ["samples.safetensors", "index.json"])
def test_an_altered_index_or_sample_table_has_status_3(make_set: Make, tmp_path: Path, cli: Cli, name: str) -> None:
    make_set(str(tmp_path))
    data = (tmp_path / name).read_bytes()
    altered = data.replace(b'"rate": 200.0', b'"rate": 250.0') if name == "index.json" else data[:-1] + b"?"
    assert altered != data
    (tmp_path / name).write_bytes(altered)
    done = cli("verify", tmp_path)
    assert done.returncode == 3
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_no_set_and_one_of_the_future_have_status_2(make_set: Make, tmp_path: Path, cli: Cli) -> None:
    assert cli("verify", tmp_path / "nothing").returncode == 2
    make_set(str(tmp_path))
    where = tmp_path / "index.json"
    where.write_text(where.read_text().replace('"format": 2', '"format": 99'))
    done = cli("verify", tmp_path)
    assert done.returncode == 2
    assert "has format 99, this version of physio-dist reads format 2; upgrade physio-dist" in done.stderr


def put(name: str, data: bytes) -> Callable[[int, dict[str, bytes]], object]:
    """An edit that puts ``data`` into member ``name`` of sample 6."""
    return lambda i, mine: mine.update({f"s0-0006.{name}": data}) if i == 6 else None


def drop(name: str) -> Callable[[int, dict[str, bytes]], object]:
    return lambda i, mine: mine.pop(f"s0-0006.{name}") if i == 6 else None


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (put("ecg.npy", npy(signal_of(6).astype(np.int32))), "s0-0006: ecg is int32 (2, 64) instead of int16 (2, 64)"),
        (put("ecg.npy", npy(signal_of(6).astype(">i2"))), "s0-0006: ecg is >i2 (2, 64) instead of int16 (2, 64)"),
        (put("ecg.npy", npy(signal_of(6, length=32))), "s0-0006: ecg is int16 (2, 32) instead of int16 (2, 64)"),
        (drop("ecg.npy"), "s0-0006: ecg is no such array instead of int16 (2, 64)"),
        (drop("json"), "sample s0-0006 has no json"),
        (put("ecg.npy", BOMB), "holds pickled objects, which are never opened"),
        (put("json", b'{"simulated": true}'), "sample s0-0006 is simulated, which the index does not say"),
        (put("json", b"x" * 600), "is not JSON"),
        (lambda i, mine: mine.update({"../evil.json": b"{}"}), "'../evil.json' is not a plain file"),
        (lambda i, mine: mine.update({"/evil.json": b"{}"}), "'/evil.json' is not a plain file"),
        (lambda i, mine: mine.update({"zz.json": b"{}"}) if i == 7 else None, "holds 4 samples, or other keys, than"),
        (put("ecg.npy", npy(np.zeros((2, 64), np.int16))), "s0-0006 ecg lead I is constant but marked valid"),
        (
            put("ecg.npy", npy(np.where(np.arange(64) < 40, 32767, signal_of(6)).astype(np.int16))),
            "s0-0006 ecg lead I is at the end of the range but marked valid",
        ),
        (put("aaa.npy", npy(np.zeros(500, np.int16))), "s0-0007 stands elsewhere than the sample table says"),
    ],
)
def test_faults_that_the_hash_vouches_for_are_still_named(
    make_set: Make, tmp_path: Path, edit: Callable[[int, dict[str, bytes]], object], told: str
) -> None:
    shards = make_set(str(tmp_path), sizes=(5, 3, 4))
    replaced(shards, 1, shard(edit))
    faults = list(verify(str(tmp_path)))
    assert any(told in fault for fault in faults), faults
    assert all(fault.startswith("ecg-000001.tar: ") for fault in faults), faults


def test_a_sample_twice_in_a_tar_or_in_the_set_is_named(make_set: Make, tmp_path: Path) -> None:
    shards = make_set(str(tmp_path), sizes=(5, 3, 4))
    whole = shard(lambda i, mine: None)
    with tarfile.open(fileobj=io.BytesIO(whole)) as file:
        twice = [(info.name, file.extractfile(info).read()) for info in file]  # type: ignore[union-attr]
    replaced(shards, 1, packed(*twice, twice[0]))
    assert list(verify(str(tmp_path))) == ["ecg-000001.tar: member 's0-0005.ecg.npy' stands in it twice"]
    table = read_sample_table(open_set(str(tmp_path)))
    key = table.key.copy()
    key[11] = key[0]
    altered = dataclasses.replace(table, key=key)
    digest = hashlib.sha256(altered.to_bytes()).hexdigest()
    print_ = fingerprint_of(shards.shards, shards.signals, shards.rate, digest)
    publish(dataclasses.replace(shards, sample_table_sha256=digest, fingerprint=print_), altered)
    assert "key 's0-0000' stands in the set more than once" in list(verify(str(tmp_path)))


def stock(
    folder: Path, samples: int = 10, shards: int = 2, facts: Callable[[int], dict[str, Any]] | None = None
) -> None:
    """A WebDataset as its own package writes it."""
    import webdataset

    folder.mkdir(exist_ok=True)
    for number in range(shards):
        with webdataset.TarWriter(str(folder / f"data-{number}.tar")) as out:
            for i in range(number, samples, shards):
                told = facts(i) if facts else {"person": f"p{i // 3}", "labels": {"grade": i}}
                out.write({"__key__": f"x{i:03d}", "ecg.npy": signal_of(i), "json": told})


def test_a_stock_webdataset_gets_an_index_and_is_read_like_our_own(tmp_path: Path, cli: Cli) -> None:
    folder = tmp_path / "theirs"
    stock(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = cli("index", folder, "channels=I,II", "rate=100", "uv_per_bit=2.5", "val=0.5", "test=0")
    assert (done.returncode, done.stdout) == (0, f"10 samples of 4 people in 2 shards\n{folder}/index.json\n")
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert list(verify(str(folder))) == []
    source = open_dataset([(str(folder), 1.0)], "ecg", ShardCache(str(tmp_path / "cache"), 1e9))
    assert source.sets[0].rate == 100
    assert source.info.uv_per_bit == 2.5
    batch = source.read_batch(0, np.zeros(10, int), np.arange(10), np.arange(10), 10)
    for row, key in enumerate(source.keys(batch.samples)):
        np.testing.assert_array_equal(batch.signal[row], signal_of(int(key[1:])))
    people = dict(zip(source.keys(batch.samples), source.sample_tables[0].person.tolist(), strict=True))
    assert people["x000"] == people["x001"] == people["x002"] != people["x003"]
    again = cli("index", folder, "channels=I,II")
    assert again.returncode == 2
    assert "has an index.json already" in again.stderr


def test_a_bare_index_of_wids_is_completed(tmp_path: Path) -> None:
    stock(tmp_path)
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": [{"url": "data-0.tar", "nsamples": 5}]}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lacks what training needs"):
        open_set(str(tmp_path))
    assert index_existing(str(tmp_path), IndexOptions(channels="I,II")).nsamples == 10
    assert list(verify(str(tmp_path))) == []


def test_simulated_samples_stay_simulated(tmp_path: Path) -> None:
    stock(tmp_path, facts=lambda i: {"simulated": True})
    assert index_existing(str(tmp_path), IndexOptions(channels="I,II")).simulated


def test_dead_leads_are_invalid_and_samples_without_person_are_people_of_their_own(tmp_path: Path) -> None:
    dead = signal_of(0)
    dead[1] = 5
    railed = signal_of(1)
    railed[0, :40] = 32767
    data = packed(("a.ecg.npy", npy(dead)), ("b.ecg.npy", npy(railed)), ("c.ecg.npy", npy(signal_of(2))))
    (tmp_path / "x.tar").write_bytes(data)
    made = index_existing(str(tmp_path), IndexOptions(channels="I,II"))
    assert made.people == 3
    assert read_sample_table(made).valid["ecg"].tolist() == [[True, False], [False, True], [True, True]]
    assert list(verify(str(tmp_path))) == [], "shards of others may do without json"


@pytest.mark.parametrize(
    ("members", "options", "error", "told"),
    [
        ([("a.ecg.npy", npy(signal_of(0)))], {"channels": "I"}, UserError, "has shape [2, 64]; expected [1, 64]"),
        ([("a.ecg.npy", npy(signal_of(0)))], {"channels": "I,I"}, UserError, "each only once"),
        ([("a.ecg.npy", npy(signal_of(0)))], {"rate": 0.0}, UserError, "rate=0.0: it must be positive"),
        ([("a.ecg.npy", npy(signal_of(0)))], {"val": 0.7, "test": 0.7}, UserError, "together at most 1"),
        ([("a.ecg.npy", npy(signal_of(0)))], {"person": "who"}, UserError, "no sample of"),
        ([("a.ecg.npy", npy(np.zeros((2, 9), np.float32)))], {}, UserError, "is float32 (2, 9), not int16"),
        ([("a.ecg.npy", npy(np.zeros(9, np.int16)))], {}, UserError, "is int16 (9,), not int16 [channel, time]"),
        ([("a.wav", b"x")], {}, UserError, "has no arrays; expected ecg.npy or eeg.npy"),
        ([("a/b.ecg.npy", npy(signal_of(0)))], {}, UserError, "key 'a/b' has characters other than"),
        ([("a.ecg.npy", npy(signal_of(0))), ("b.json", b"{}")], {}, UserError, "sample b: ecg.npy is missing"),
        ([("a.ecg.npy", BOMB)], {}, DataError, "holds pickled objects"),
        ([], {}, UserError, "its tars hold no samples"),
    ],
)
def test_what_cannot_be_adopted_is_refused_and_gets_no_index(
    tmp_path: Path, members: list[tuple[str, bytes]], options: dict[str, Any], error: type[Exception], told: str
) -> None:
    (tmp_path / "x.tar").write_bytes(packed(*members))
    with pytest.raises(error) as caught:
        index_existing(str(tmp_path), IndexOptions(**{"channels": "I,II", **options}))
    assert told in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]


def test_a_key_twice_or_no_tar_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.tar files; it has: nothing"):
        index_existing(str(tmp_path), IndexOptions(channels="I,II"))
    for name in ("x.tar", "y.tar"):
        (tmp_path / name).write_bytes(packed(("a.ecg.npy", npy(signal_of(0)))))
    with pytest.raises(UserError, match="key 'a' stands in it more than once"):
        index_existing(str(tmp_path), IndexOptions(channels="I,II"))


def test_a_tar_cut_between_two_samples_is_not_adopted(tmp_path: Path) -> None:
    file = io.BytesIO()
    tar.write([tar.Sample(key, {"ecg": signal_of(0)}, {}) for key in "ab"], file)
    (tmp_path / "x.tar").write_bytes(file.getvalue()[:2048])
    with pytest.raises(DataError, match=r"x\.tar: truncated: it has no end mark"):
        index_existing(str(tmp_path), IndexOptions(channels="I,II"))


def test_inspect_tells_what_a_set_holds(make_set: Make, tmp_path: Path) -> None:
    shards = make_set(str(tmp_path), sizes=(5, 3, 4))
    told = "\n".join(describe.describe(str(tmp_path)))
    for words in (
        "12 windows of 6 people in 3 shards", shards.fingerprint, "train: 9 windows of 6 people",
        "val: 3 windows of 3 people", "test: 0 windows of 0 people", "2 channels x 64 samples at 200 Hz (0.32 s), 2 uV",
        "I 100.0%, II 66.7%", "labels in all windows:", "n: 0 x 6, 1 x 6",
    ):  # fmt: skip
        assert words in told
    make_set(str(tmp_path / "many"), sizes=(2,) * 6)
    assert "labels in the first 8 windows:" in "\n".join(describe.describe(str(tmp_path / "many")))


def test_inspect_draws_windows_spread_over_the_set(make_set: Make, tmp_path: Path, cli: Cli) -> None:
    shards = make_set(str(tmp_path / "set"), sizes=(5, 3, 4))
    _, drawn = describe.some_windows(shards.url, 3)
    assert drawn["ecg"].keys == ["s0-0000", "s0-0005", "s0-0011"]
    np.testing.assert_array_equal(drawn["ecg"].signal[1], signal_of(5) * 2.0)
    assert len(describe.some_windows(shards.url, 99)[1]["ecg"].keys) == 12
    done = cli("inspect", shards.url, "--plot", 2, tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    for count in ("0", "-1", "x", "1.5"):
        assert cli("inspect", shards.url, "--plot", count, tmp_path / "no.png").returncode == 2
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_inspect_of_a_damaged_set_names_the_shard_with_status_3(
    make_set: Make, tmp_path: Path, cli: Cli, fault: str
) -> None:
    make_set(str(tmp_path), sizes=(5, 3))
    where = tmp_path / "ecg-000001.tar"
    where.unlink() if fault == "missing" else os.truncate(where, 600)
    for words in ([], ["--plot", "12", str(tmp_path / "x.png")]):
        done = cli("inspect", tmp_path, *words)
        assert done.returncode == 3
        assert "ecg-000001.tar" in done.stderr
        assert "Traceback" not in done.stderr
    with pytest.raises(DataError, match=r"ecg-000001\.tar"):
        describe.some_windows(str(tmp_path), 12)


def test_odd_labels_of_adopted_sets_do_not_stop_inspect(tmp_path: Path) -> None:
    stock(tmp_path, samples=3, shards=1, facts=lambda i: {"labels": [{"a": 1}, [1, 2], {"x": [1, {"y": 2}]}][i]})
    index_existing(str(tmp_path), IndexOptions(channels="I,II"))
    told = "\n".join(describe.describe(str(tmp_path)))
    assert "a: 1 x 1" in told
    assert '{"y": 2} x 1' in told


def test_a_sample_table_made_for_other_values_is_named(make_set: Make, tmp_path: Path) -> None:
    shards = make_set(str(tmp_path / "set"))
    table = read_sample_table(shards)
    table.check["ecg"][5] ^= 1
    digest = hashlib.sha256(table.to_bytes()).hexdigest()
    fingerprint = fingerprint_of(shards.shards, shards.signals, shards.rate, digest)
    publish(dataclasses.replace(shards, sample_table_sha256=digest, fingerprint=fingerprint), table)
    assert list(verify(shards.url)) == [
        "ecg-000001.tar: sample s0-0005 ecg disagrees with its check in the sample table"
    ]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda x: x, None),
        (lambda x: x[[0, 1, 2, 4, 3, 5, 6, 7, 8, 9, 10, 11]], "do not obey the identities"),
        (lambda x: x[:11], "nothing tells which lead each row is"),
        (lambda x: x * 0, "nothing tells which lead each row is"),
    ],
)
def test_twelve_unnamed_rows_are_the_standard_leads_if_their_identities_say_so(
    heart: Callable[[int], np.ndarray], tmp_path: Path, edit: Callable[[np.ndarray], np.ndarray], told: str | None
) -> None:
    with (tmp_path / "a.tar").open("wb") as file:
        tar.write([tar.Sample(f"k{i}", {"ecg": edit(heart(i))}, {}) for i in range(3)], file)
    if told is None:
        assert index_existing(str(tmp_path), IndexOptions()).signals["ecg"].channels == ECG_12
    else:
        with pytest.raises(UserError, match=told):
            index_existing(str(tmp_path), IndexOptions())
