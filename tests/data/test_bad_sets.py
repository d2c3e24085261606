"""Shards as a faulty or hostile writer makes them, seen from the command line and from training: one clear message
that names shard and sample, the documented status, and nothing is executed."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from physio_dist.data.format.index import SPLITS, ShardInfo, ShardSet, SignalInfo, fingerprint_of
from physio_dist.data.format.sample_table import SampleTable, publish
from physio_dist.data.handle import open_dataset
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.loading.loader import LoaderPlan, PrefetchLoader
from physio_dist.errors import DataError, UserError
from physio_dist.signals.montage import ECG_12
from tests.data.conftest import signal_of
from tests.data.format.test_tar import BOMB, npy, packed
from tests.data.test_verify import drop, put, replaced, shard

Make = Callable[..., ShardSet]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]
Members = dict[str, bytes]


def extra(name: str) -> Callable[[int, Members], object]:
    return lambda i, mine: mine.update({name: b"{}"}) if i == 6 else None


GOOD = npy(signal_of(6))
# What stands in a shard's place, and what `verify` and `index` say of it beside its name. To `index` a tar without json
# or without samples is fine, and a sample table whose offsets lie beyond a tar's end is refused before any tar is read.
BAD: dict[str, tuple[bytes, str | None, str | None]] = {
    "cut in a member": (shard(lambda i, mine: None)[:2600], None, "truncated in member 's0-0006.ecg.npy'"),
    "cut between members": (shard(lambda i, mine: None)[:2048], None, "truncated: it has no end mark"),
    "larger member": (
        shard(put("ecg.npy", npy(signal_of(6, length=128)))),
        "s0-0006: ecg is int16 (2, 128) instead of int16 (2, 64)",
        "sample s0-0006 has shape [2, 128]; expected [2, 64]",
    ),
    "absolute name": (shard(extra("/evil.json")), "'/evil.json' is not a plain", "'/evil.json' is not a plain"),
    "name with dots": (shard(extra("../evil.json")), "'../evil.json' is not a", "'../evil.json' is not a"),
    "pickled": (shard(put("ecg.npy", BOMB)), "s0-0006.ecg.npy' holds pickled", "s0-0006.ecg.npy' holds pickled"),
    "other dtype": (
        shard(put("ecg.npy", npy(signal_of(6).astype(np.float16)))),
        "s0-0006: ecg is float16",
        "s0-0006: ecg.npy is float16",
    ),
    "other shape": (
        shard(put("ecg.npy", npy(signal_of(6).reshape(4, 32)))),
        "s0-0006: ecg is int16 (4, 32)",
        "sample s0-0006 has shape [4, 32]; expected [2, 64]",
    ),
    "no json": (shard(drop("json")), "sample s0-0006 has no json", None),
    "member twice": (
        packed(("s0-0005.ecg.npy", GOOD), ("s0-0006.ecg.npy", GOOD), ("s0-0006.ecg.npy", GOOD)),
        "'s0-0006.ecg.npy' stands in it twice",
        "'s0-0006.ecg.npy' stands in it twice",
    ),
    "empty": (packed(), "holds 0 samples, or other keys, than the 3", None),
}


def check(done: subprocess.CompletedProcess[str], statuses: tuple[int, ...], *told: str) -> None:
    said = done.stdout + done.stderr
    assert done.returncode in statuses, said
    for words in told:
        assert words in said
    assert "Traceback" not in said
    assert "unpickled" not in said


@pytest.mark.parametrize("kind", [kind for kind, (_, told, _) in BAD.items() if told])
def test_verify_names_bad_members_with_fitting_hash(make_set: Make, tmp_path: Path, cli: Cli, kind: str) -> None:
    data, told, _ = BAD[kind]
    replaced(make_set(str(tmp_path), sizes=(5, 3, 4)), 1, data)
    check(cli("verify", tmp_path), (3,), "ecg-000001.tar: ", str(told))


@pytest.mark.parametrize("kind", [kind for kind, (_, _, told) in BAD.items() if told])
def test_index_refuses_the_shard_and_makes_no_index(tmp_path: Path, cli: Cli, kind: str) -> None:
    data, _, told = BAD[kind]
    (tmp_path / "a.tar").write_bytes(shard(lambda i, mine: None, first=8))
    (tmp_path / "b.tar").write_bytes(data)
    check(cli("index", tmp_path, "channels=I,II"), (2, 3), "b.tar: ", str(told))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "b.tar"]


@pytest.mark.parametrize("kind", BAD)
def test_loader_raises_on_shard_with_another_hash(make_set: Make, tmp_path: Path, kind: str) -> None:
    shards = make_set(str(tmp_path / "set"), sizes=(5, 3, 4))
    (tmp_path / "set" / "ecg-000001.tar").write_bytes(BAD[kind][0])
    source = open_dataset([(shards.url, 1.0)], "ecg", ShardCache(str(tmp_path / "cache"), 1e9))
    order = source.order("train", 4, 0)
    with (
        pytest.raises(DataError, match=r"ecg-000001\.tar"),
        PrefetchLoader(source, LoaderPlan(order, "train", 4, 0, 100), lambda made: made) as batches,
    ):
        list(batches)


def test_index_existing_raises_on_empty_arrays(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "a.tar").write_bytes(packed(("x.ecg.npy", npy(np.zeros((2, 0), np.int16)))))
    check(cli("index", tmp_path, "channels=I,II"), (2, 3), "a.tar: ", "sample x")
    assert not (tmp_path / "index.json").exists()


def publish_empty(folder: Path) -> str:
    """Make a set of one shard that holds nothing, with an index that says so."""
    folder.mkdir()
    data = packed()
    (folder / "a.tar").write_bytes(data)
    nothing = np.zeros(0, np.uint64)
    leads, offset = {"ecg": np.zeros((0, len(ECG_12)), np.bool_)}, {"ecg": np.zeros(0, np.int64)}
    check = {"ecg": np.zeros(0, np.uint32)}
    table = SampleTable(offset, check, leads, np.zeros(0, np.uint8), nothing, nothing, np.zeros((0, 1), np.uint8))
    shards = (ShardInfo("a.tar", 0, len(data), hashlib.sha256(data).hexdigest()),)
    signals = {"ecg": SignalInfo(ECG_12, 2000, 1.0)}
    digest = hashlib.sha256(table.to_bytes()).hexdigest()
    print_ = fingerprint_of(shards, signals, 200.0, digest)
    splits = dict.fromkeys(SPLITS, 0)
    publish(ShardSet(str(folder), shards, signals, 200.0, splits, 0, False, ("x",), digest, print_, {}), table)
    return str(folder)


@pytest.fixture()
def empty_set(tmp_path: Path) -> str:
    return publish_empty(tmp_path / "empty")


def test_verify_passes_empty_set_and_order_raises(empty_set: str, tmp_path: Path, cli: Cli) -> None:
    check(cli("verify", empty_set), (0,), "0 samples in 1 shards")
    source = open_dataset([(empty_set, 1.0)], "ecg", ShardCache(str(tmp_path / "cache"), 1e9))
    with pytest.raises(UserError, match=r"/empty: split train holds 0 samples, fewer than the 4"):
        source.order("train", 4, 0)


def test_inspect_of_a_set_without_samples_says_so(empty_set: str, tmp_path: Path, cli: Cli) -> None:
    check(cli("inspect", empty_set), (0, 2), "0 windows")
    check(cli("inspect", empty_set, "--plot", 2, tmp_path / "out.png"), (2,))
