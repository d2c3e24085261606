"""The node cache: only verified bytes are ever seen, whatever lies in the bucket, the cache or the folder."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from physio_dist import storage
from physio_dist.data.format.index import ShardSet
from physio_dist.data.loading.cache import Opened, ShardCache
from physio_dist.errors import DataError, UserError
from physio_dist.storage import StorageError
from tests.conftest import S3

Make = Callable[..., ShardSet]


def cached(folder: Path) -> list[Path]:
    return sorted((folder / "shards").glob("*.tar"))


def good(opened: Opened | None, shards: ShardSet, number: int = 0) -> bool:
    assert opened is not None
    data = np.zeros((1, shards.shards[number].filesize), np.uint8)
    whole = opened.read([0], [0], data)
    return whole and hashlib.sha256(data).hexdigest() == shards.shards[number].sha256


def test_cache_opens_local_shard_without_copying(make_set: Make, tmp_path: Path) -> None:
    shards = make_set(str(tmp_path / "set"))
    cache = ShardCache(str(tmp_path / "cache"), 1e9)
    opened = cache.open(shards, 1)
    assert good(opened, shards, 1)
    assert cache.open(shards, 1) is opened
    assert cache.held(shards, 0)
    assert cached(tmp_path / "cache") == []


@pytest.mark.parametrize("fault", ["flipped", "truncated"])
def test_opened_read_fails_on_shard_damaged_after_opening(
    make_set: Make, tmp_path: Path, flip_bit: Callable[[Path, int], None], fault: str
) -> None:
    shards = make_set(str(tmp_path / "set"))
    opened = ShardCache(str(tmp_path / "cache"), 1e9).open(shards, 1)
    assert opened is not None and good(opened, shards, 1)
    where, rows = tmp_path / "set" / "ecg-000001.tar", np.zeros((1, 1024), np.uint8)
    if fault == "flipped":
        flip_bit(where, 700)
    else:
        os.truncate(where, 1000)
        # A short read is no whole one, whatever the file's size and times say.
        assert not Opened(os.open(where, os.O_RDONLY), (1000, where.stat().st_mtime_ns, where.stat().st_ino)).read(
            [0], [0], rows
        )
    assert not opened.read([0], [0], rows)


@pytest.mark.parametrize("fault", ["flipped", "truncated", "empty", "missing", "folder"])
def test_cache_raises_on_faulty_local_shard(
    make_set: Make, tmp_path: Path, flip_bit: Callable[[Path, int], None], fault: str
) -> None:
    shards = make_set(str(tmp_path / "set"))
    where = tmp_path / "set" / "ecg-000001.tar"
    if fault == "flipped":
        flip_bit(where, 700)
    elif fault in ("truncated", "empty"):
        os.truncate(where, 1000 if fault == "truncated" else 0)
    else:
        where.unlink()
        if fault == "folder":
            where.mkdir()
    cache = ShardCache(str(tmp_path / "cache"), 1e9)
    with pytest.raises(DataError, match=r"shard .*ecg-000001\.tar (disagrees with its index|is in the index but)"):
        cache.open(shards, 1)
    assert good(cache.open(shards, 0), shards, 0)


def test_cache_fetches_remote_shard_once_for_all_processes(make_set: Make, s3_here: S3, tmp_path: Path) -> None:
    shards = make_set(s3_here.bucket + "/set")
    assert good(ShardCache(str(tmp_path), 1e9).open(shards, 0), shards)
    assert [path.stem for path in cached(tmp_path)] == [shards.shards[0].sha256]
    (s3_here.folder / "set" / "ecg-000000.tar").unlink()
    assert good(ShardCache(str(tmp_path), 1e9).open(shards, 0), shards)
    assert not list((tmp_path / "shards").glob("*.part"))


@pytest.mark.parametrize("fault", ["flipped", "truncated", "empty"])
def test_cache_fetches_damaged_copy_again(
    make_set: Make, s3_here: S3, tmp_path: Path, flip_bit: Callable[[Path, int], None], fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shards = make_set(s3_here.bucket)
    ShardCache(str(tmp_path), 1e9).open(shards, 0)
    (copy,) = cached(tmp_path)
    if fault == "flipped":
        flip_bit(copy, 700)
    else:
        os.truncate(copy, 1000 if fault == "truncated" else 0)
    with caplog.at_level(logging.WARNING, "physio_dist"):
        assert good(ShardCache(str(tmp_path), 1e9).open(shards, 0), shards)
    assert "is damaged; fetching it again" in caplog.text
    assert hashlib.sha256(copy.read_bytes()).hexdigest() == shards.shards[0].sha256


@pytest.mark.parametrize("fault", ["flipped", "truncated", "empty"])
def test_cache_raises_on_altered_remote_shard_after_two_fetches(
    make_set: Make, s3_here: S3, tmp_path: Path, flip_bit: Callable[[Path, int], None], fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shards = make_set(s3_here.bucket)
    where = s3_here.folder / "ecg-000002.tar"
    if fault == "flipped":
        flip_bit(where, 700)
    else:
        os.truncate(where, 1000 if fault == "truncated" else 0)
    cache = ShardCache(str(tmp_path), 1e9)
    with (
        caplog.at_level(logging.WARNING, "physio_dist"),
        pytest.raises(DataError, match=r"ecg-000002\.tar disagrees with its index \(sha256\), also when fetched again"),
    ):
        cache.open(shards, 2)
    assert caplog.text.count("ecg-000002.tar disagrees with its index; fetching it again") == 1
    assert cached(tmp_path) == []
    assert not list((tmp_path / "shards").glob("*.part"))


def test_cache_raises_on_missing_remote_shard(make_set: Make, s3_here: S3, tmp_path: Path) -> None:
    shards = make_set(s3_here.bucket)
    (s3_here.folder / "ecg-000001.tar").unlink()
    with pytest.raises(DataError, match=r"ecg-000001\.tar is in the index but not in storage"):
        ShardCache(str(tmp_path), 1e9).open(shards, 1)


def test_cache_evicts_least_recently_used_at_the_limit(make_set: Make, s3_here: S3, tmp_path: Path) -> None:
    shards = make_set(s3_here.bucket, sizes=(3, 3, 3, 3))
    one = shards.shards[0].filesize
    cache = ShardCache(str(tmp_path), 2.5 * one)
    for number in range(4):
        held = cache.open(shards, number)
        # Copies are told apart by their times, which one test is too quick for.
        copy = tmp_path / "shards" / f"{shards.shards[number].sha256}.tar"
        os.utime(copy, ns=(number, copy.stat().st_mtime_ns))
        assert sum(path.stat().st_size for path in cached(tmp_path)) <= 2.5 * one
    assert {path.stem for path in cached(tmp_path)} == {shards.shards[n].sha256 for n in (2, 3)}
    assert good(held, shards, 3)
    # What was dropped is no longer held open either, or the disk would not get its space back.
    files = " ".join(str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink())
    assert shards.shards[3].sha256 in files
    assert shards.shards[0].sha256 not in files
    assert good(cache.open(shards, 0), shards, 0)


def test_cache_with_limit_below_a_shard_warns_once(
    make_set: Make, s3_here: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = make_set(s3_here.bucket)
    cache = ShardCache(str(tmp_path), 10)
    with caplog.at_level(logging.WARNING, "physio_dist"):
        assert [cache.open(shards, number) for number in (0, 1, 2, 0)] == [None] * 4
    assert caplog.text.count("the shards in use do not fit into the node cache") == 1
    assert cached(tmp_path) == []
    assert not cache.held(shards, 0)
    assert hashlib.sha256(cache.content(shards, 1)).hexdigest() == shards.shards[1].sha256


def test_cache_evicts_what_is_needed_last_and_keeps_what_is_in_use(make_set: Make, s3_here: S3, tmp_path: Path) -> None:
    shards = make_set(s3_here.bucket, sizes=(3,) * 6)
    hashes = [info.sha256 for info in shards.shards]
    cache = ShardCache(str(tmp_path), 3.5 * shards.shards[0].filesize)
    other = make_set(s3_here.bucket + "/other", sizes=(3,), seed=1).shards[0].sha256
    (tmp_path / "shards" / f"{other}.tar").write_bytes(b"x" * 100)
    # At step 10: shard 0 is in use, 1 will be soon, 2 late; nobody needs 3 any more, and another run uses its own.
    cache.next_use = lambda: (10, {hashes[0]: 10, hashes[1]: 12, hashes[2]: 500, hashes[4]: 10, hashes[5]: 10})
    old = time.time() - 3600
    for number in (3, 0, 1):
        assert cache.open(shards, number) is not None
    os.utime(tmp_path / "shards" / f"{hashes[3]}.tar", (old, old))

    def there() -> set[int]:
        return {hashes.index(path.stem) for path in cached(tmp_path) if path.stem != other}

    for number, left in ((2, {0, 1, 2}), (4, {0, 1, 4}), (5, {0, 4, 5})):
        assert good(cache.open(shards, number), shards, number)
        assert there() == left
    assert cache.open(shards, 1) is None
    assert there() == {0, 4, 5}


def test_cache_removes_old_partial_files(make_set: Make, s3_here: S3, tmp_path: Path) -> None:
    shards = make_set(s3_here.bucket)
    cache = ShardCache(str(tmp_path), 1e9)
    old, young = tmp_path / "shards" / "a.1.part", tmp_path / "shards" / "b.2.part"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    cache.open(shards, 0)
    assert (old.exists(), young.exists()) == (False, True)


def _open_all(folder: str, shards: ShardSet, gate: object, told: object) -> None:
    fetches = 0
    fetch = storage.fetch

    def counted(url: str, target: Path, nbytes: int) -> str:
        nonlocal fetches
        fetches += 1
        return fetch(url, target, nbytes)

    storage.fetch = counted
    gate.wait()  # type: ignore[attr-defined]
    cache = ShardCache(folder, 1e9)
    whole = [good(cache.open(shards, number), shards, number) for number in range(len(shards.shards))]
    told.put((whole, fetches))  # type: ignore[attr-defined]


def test_concurrent_processes_fetch_each_shard_once(make_set: Make, s3_here: S3, tmp_path: Path) -> None:
    shards = make_set(s3_here.bucket, sizes=(40, 40, 40), length=2000)
    spawn = multiprocessing.get_context("spawn")
    gate, told = spawn.Barrier(3), spawn.Queue()
    processes = [spawn.Process(target=_open_all, args=(str(tmp_path), shards, gate, told)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [told.get(timeout=60) for _ in processes]
    assert [whole for whole, _ in answers] == [[True] * 3] * 3
    assert sum(fetches for _, fetches in answers) == 3
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert len(cached(tmp_path)) == 3


def test_cache_on_full_disk_warns_once(
    make_set: Make, s3_here: S3, tiny_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = make_set(s3_here.bucket, sizes=(20, 2, 2, 2, 2), length=2000)
    cache = ShardCache(str(tiny_disk), 1e9)
    with caplog.at_level(logging.WARNING, "physio_dist"):
        assert cache.open(shards, 0) is None
        assert cache.open(shards, 0) is None
    assert caplog.text.count("do not fit into the node cache") == 1
    assert {path.suffix for path in (tiny_disk / "shards").iterdir()} == {".lock"}


def test_cache_raises_on_folder_that_cannot_be_written(
    make_set: Make, s3_here: S3, tmp_path: Path, tiny_disk: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file: cannot make the folder"):
        ShardCache(str(tmp_path / "file"), 1e9)
    shards = make_set(s3_here.bucket)
    cache = ShardCache(str(tiny_disk), 1e9)
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)
    with pytest.raises(StorageError, match="Read-only file system"):
        cache.open(shards, 0)


def test_cache_on_small_disk_evicts_to_fit(make_set: Make, s3_here: S3, tiny_disk: Path) -> None:
    shards = make_set(s3_here.bucket, sizes=(2,) * 6, length=2000)
    cache = ShardCache(str(tiny_disk), 1e9)
    for number in (0, 1, 2, 3, 4, 5, 0):
        assert good(cache.open(shards, number), shards, number)
    assert 1 <= len(cached(tiny_disk)) <= 3


@pytest.mark.parametrize("fault", ["flipped", "truncated"])
def test_cache_fetches_again_if_an_open_shard_is_altered(
    make_set: Make, s3_here: S3, tmp_path: Path, fault: str
) -> None:
    shards = make_set(s3_here.bucket)
    cache = ShardCache(str(tmp_path), 1e9)
    opened = cache.open(shards, 0)
    assert good(opened, shards)
    (copy,) = cached(tmp_path)
    if fault == "flipped":
        with copy.open("r+b") as file:
            file.seek(700)
            file.write(b"?")
    else:
        os.truncate(copy, 700)
    assert opened is not None
    assert not opened.intact()
    assert not opened.read([600], [0], np.zeros((1, 200), np.uint8))
    assert good(cache.open(shards, 0), shards)


def test_cache_hashes_again_only_if_the_file_changed(make_set: Make, tmp_path: Path) -> None:
    shards = make_set(str(tmp_path / "set"), sizes=(4, 4))
    cache = ShardCache(str(tmp_path / "cache"), 1e9)
    cache._most_open = 1
    path = tmp_path / "set" / shards.shards[0].url
    facts = path.stat()
    cache.open(shards, 0)
    cache.open(shards, 1)
    with path.open("r+b") as file:
        file.seek(3000)
        file.write(b"x")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    cache.open(shards, 0)  # by its size and times the same file: not read again
    cache.open(shards, 1)
    os.utime(path)
    with pytest.raises(DataError, match=shards.shards[0].url):
        cache.open(shards, 0)
