"""The feed behind a bad network, beside a bad disk, among dying processes: the right batches or one clear error."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from physio_dist import storage
from physio_dist.data.format.index import ShardSet
from physio_dist.data.handle import open_dataset
from physio_dist.data.loading import order
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.loading.dataset import Batch
from physio_dist.data.loading.loader import LoaderPlan, PrefetchLoader
from physio_dist.errors import DataError
from physio_dist.storage import StorageError
from tests.conftest import Proxied, disk_of

Make = Callable[..., ShardSet]

# An epoch is 12 steps.
SIZES, LENGTH, BATCH, EPOCH = (12, 12, 12, 12), 4000, 4, 12
SECOND = r"^GET .*/ecg-000001\.tar$"

pytestmark = pytest.mark.timeout(90)


def limits(monkeypatch: pytest.MonkeyPatch, outage_s: float = 300.0, read_timeout_s: float = 30.0) -> None:
    """How long this process waits for an endpoint that has answered, and for its next byte."""
    monkeypatch.setattr(storage.files, "OUTAGE_S", outage_s)
    monkeypatch.setitem(storage.files._CLIENT_OPTIONS, "read_timeout", read_timeout_s)
    storage.forget_clients()


def feed(
    url: str, cache: Path, steps: int = EPOCH, rank: int = 0, world: int = 1, limit: float = 1e9
) -> PrefetchLoader[Batch]:
    source = open_dataset([(url, 1.0)], "ecg", ShardCache(str(cache), limit))
    plan = LoaderPlan(source.order("train", BATCH, 0), "train", BATCH // world, 0, steps, rank, world)
    return PrefetchLoader(source, plan, lambda made: made)


def content(batches: Iterable[Batch]) -> list[tuple[Any, ...]]:
    """What each batch holds, its signal as a hash."""
    return [
        (
            b.step,
            hashlib.sha256(b.signal).hexdigest(),
            b.scale.tolist(),
            b.valid.tolist(),
            b.weight.tolist(),
            b.positions.tolist(),
        )
        for b in batches
    ]


def read(url: str, cache: Path, **more: Any) -> list[tuple[Any, ...]]:
    with feed(url, cache, **more) as batches:
        return content(batches)


@pytest.fixture()
def local(make_set: Make, tmp_path: Path) -> str:
    """The set on the local disk, which no fault of the network reaches."""
    return make_set(str(tmp_path / "local"), SIZES, length=LENGTH, every=100).url


@pytest.fixture()
def remote(make_set: Make, proxied_here: Proxied) -> ShardSet:
    """The same set in the bucket behind the proxy."""
    return make_set(f"{proxied_here.bucket}/set", SIZES, length=LENGTH, every=100)


def only_right_files(cache: Path, shards: ShardSet) -> None:
    """Every tar in the cache's folder is a shard, whole."""
    for path in (cache / "shards").glob("*.tar"):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest in {info.sha256 for info in shards.shards}, path
        assert path.stem == digest


@pytest.mark.parametrize(
    ("fault", "match", "times"),
    [
        (503, r"^GET .*\.tar$", 5),
        (429, r"^GET .*\.tar$", 5),
        (503, r"^(GET|HEAD) ", 5),
        ("reset", r"^GET .*\.tar$", 3),
        ("short", r"^GET .*\.tar$", 3),
        ("flip", SECOND, 1),
        ("stall", SECOND, 1),
    ],
)
def test_loader_batches_survive_transient_faults(
    remote: ShardSet, local: str, proxied_here: Proxied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fault: int | str, match: str, times: int,
) -> None:  # fmt: skip
    limits(monkeypatch, read_timeout_s=1.0)
    rule = proxied_here.proxy.inject(fault, match, times, stall_s=3.0)
    assert read(remote.url, tmp_path / "cache") == read(local, tmp_path / "unused")
    assert rule.met == times
    only_right_files(tmp_path / "cache", remote)


def test_loader_waits_for_a_stalled_server_without_fetching_twice(
    remote: ShardSet, local: str, proxied_here: Proxied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits(monkeypatch, read_timeout_s=10.0)
    rule = proxied_here.proxy.inject("stall", SECOND, times=1, stall_s=2.0)
    assert read(remote.url, tmp_path / "cache") == read(local, tmp_path / "unused")
    assert rule.met == 1
    assert proxied_here.proxy.sent() == {info.url: info.filesize for info in remote.shards}


def test_loader_survives_server_restart(remote: ShardSet, local: str, proxied_here: Proxied, tmp_path: Path) -> None:
    made = feed(remote.url, tmp_path / "cache")
    proxied_here.server.stop()
    threading.Timer(3.0, proxied_here.server.start).start()
    with made as batches:
        assert content(batches) == read(local, tmp_path / "unused")
    assert any(seen.sent == 0 for seen in proxied_here.proxy.seen if seen.path.endswith(".tar"))


@pytest.mark.parametrize(
    ("fault", "error", "told"),
    [
        ("flip", DataError, "disagrees with its index"),
        (404, DataError, "is in the index but not in storage"),
        (403, StorageError, "access denied"),
        (503, StorageError, "SlowDown"),
        ("reset", StorageError, "cannot"),
        ("short", StorageError, "cannot"),
        ("stall", StorageError, "cannot"),
    ],
)
def test_loader_raises_on_permanent_fault(
    remote: ShardSet, proxied_here: Proxied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    fault: int | str, error: type[Exception], told: str,
) -> None:  # fmt: skip
    # What no second try mends is told long before an outage would be given up.
    limits(monkeypatch, outage_s=300.0 if fault in ("flip", 404, 403) else 3.0, read_timeout_s=1.0)
    rule = proxied_here.proxy.inject(fault, SECOND)
    with pytest.raises(error, match=r"ecg-000001\.tar") as caught, feed(remote.url, tmp_path / "cache") as batches:
        list(batches)
    assert told in str(caught.value)
    assert rule.met >= 1
    only_right_files(tmp_path / "cache", remote)


def test_loader_raises_on_revoked_credentials(
    make_set: Make, proxied_here: Proxied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "WINDOW", 12)
    shards = make_set(f"{proxied_here.bucket}/long", (12,) * 24, length=LENGTH, every=1000)
    seen = []
    with (
        pytest.raises(StorageError, match=r"/ecg-0000\d\d\.tar.*: access denied.*credentials"),
        # The cache has room for a sixth of an epoch, so that there is always something to fetch.
        feed(shards.url, tmp_path / "cache", steps=144, limit=4 * shards.shards[0].filesize) as batches,
    ):
        for batch in batches:
            seen.append(batch.step)
            if batch.step == 3:
                proxied_here.proxy.inject(403, "")
    assert 3 in seen


def _damaged_midway(url: str, cache: Path, damage: str, told: Any) -> None:
    made = []
    with feed(url, cache, steps=4 * EPOCH) as batches:
        for batch in batches:
            made.append(batch)
            if batch.step != EPOCH:
                continue
            # By now every shard has been fetched.
            victim, *_ = sorted((cache / "shards").glob("*.tar"))
            if damage == "truncated":
                os.truncate(victim, 5000)
            else:
                with victim.open("r+b") as file:
                    file.seek(5000)
                    (byte,) = file.read(1)
                    file.seek(5000)
                    file.write(bytes([byte ^ 4]))
    told.put((victim.stem, content(made)))


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_loader_refetches_cached_file_damaged_while_running(
    remote: ShardSet, local: str, proxied_here: Proxied, tmp_path: Path, damage: str
) -> None:
    # In a process of its own, because reading beyond the end of a mapped file kills the reader.
    spawn = multiprocessing.get_context("spawn")
    told = spawn.Queue()
    process = spawn.Process(target=_damaged_midway, args=(remote.url, tmp_path / "cache", damage, told))
    process.start()
    while process.is_alive() and told.empty():
        time.sleep(0.05)
    assert not told.empty(), f"the feed's process ended with {process.exitcode}"
    sha256, made = told.get()
    process.join()
    assert made == read(local, tmp_path / "unused", steps=4 * EPOCH)
    (victim,) = (info for info in remote.shards if info.sha256 == sha256)
    assert proxied_here.proxy.sent()[victim.url] > victim.filesize


def _read_and_tell(url: str, cache: Path, rank: int, told: Any, gate: Any = None) -> None:
    if gate is not None:
        gate.wait()
    told.put((rank, read(url, cache, rank=rank, world=2)))


def test_killed_fetch_leaves_no_visible_file(
    remote: ShardSet, local: str, proxied_here: Proxied, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    proxied_here.proxy.inject("stall", r"^GET .*\.tar$")
    spawn = multiprocessing.get_context("spawn")
    told = spawn.Queue()
    process = spawn.Process(target=_read_and_tell, args=(remote.url, cache, 0, told))
    process.start()
    end = time.monotonic() + 60
    while not [path for path in cache.glob("shards/*") if path.suffix != ".lock"]:
        assert process.is_alive() and time.monotonic() < end, "nothing was fetched"
        time.sleep(0.02)
    process.kill()
    process.join()
    left = {path for path in cache.glob("shards/*") if path.suffix != ".lock"}
    assert left
    only_right_files(cache, remote)
    proxied_here.proxy.clear()
    assert read(remote.url, cache) == read(local, tmp_path / "unused")
    only_right_files(cache, remote)
    assert {path.stem for path in cache.glob("shards/*.tar")} == {info.sha256 for info in remote.shards}


@pytest.mark.parametrize("size", ["64k", "500k"])
def test_loader_goes_on_with_full_cache_disk(
    remote: ShardSet, local: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, size: str
) -> None:
    """No shard has room on the first disk, two of four on the second."""
    with disk_of(size, tmp_path / "small") as folder, caplog.at_level(logging.WARNING, "physio_dist"):
        assert read(remote.url, folder, steps=3 * EPOCH) == read(local, tmp_path / "unused", steps=3 * EPOCH)
        only_right_files(folder, remote)
    said = [record.getMessage() for record in caplog.records if "full" in record.getMessage()]
    assert len(said) == 1, caplog.text
    assert str(folder) in said[0]


def test_two_loaders_with_one_cache_fetch_every_byte_once(
    remote: ShardSet, local: str, proxied_here: Proxied, tmp_path: Path
) -> None:
    spawn = multiprocessing.get_context("spawn")
    gate, told = spawn.Barrier(2), spawn.Queue()
    processes = [
        spawn.Process(target=_read_and_tell, args=(remote.url, tmp_path / "cache", rank, told, gate))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    answers = dict(told.get(timeout=60) for _ in processes)
    for process in processes:
        process.join()
    for rank, made in answers.items():
        assert made == read(local, tmp_path / "unused", rank=rank, world=2)
    assert proxied_here.proxy.sent() == {info.url: info.filesize for info in remote.shards}
