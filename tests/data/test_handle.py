"""Handles of shard sets: the index is parsed, the table read and each shard hashed once."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physio_dist import storage
from physio_dist.config.pretrain import DataOptions
from physio_dist.data.format.index import ShardSet
from physio_dist.data.format.sample_table import SampleTable
from physio_dist.data.handle import ShardSetHandle, open_dataset, open_handle
from physio_dist.data.loading.cache import ShardCache
from physio_dist.errors import DataError, UserError
from tests.conftest import S3

Make = Callable[..., ShardSet]


@pytest.fixture()
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often JSON files are read, by name; how often a sample table is parsed and a shard's file hashed."""
    counts: Counter[str] = Counter()
    read_json, from_bytes, file_digest = storage.read_json, SampleTable.from_bytes, hashlib.file_digest

    def counted_json(url: str) -> Any:
        counts[url.rsplit("/", 1)[-1]] += 1
        return read_json(url)

    def counted_table(data: bytes, name: str) -> SampleTable:
        counts["table"] += 1
        return from_bytes(data, name)

    def counted_digest(file: Any, name: str) -> Any:
        counts["hashed"] += 1
        return file_digest(file, name)

    monkeypatch.setattr(storage, "read_json", counted_json)
    monkeypatch.setattr(SampleTable, "from_bytes", counted_table)
    monkeypatch.setattr(hashlib, "file_digest", counted_digest)
    return counts


def read_all(handle: ShardSetHandle) -> np.ndarray:
    dataset, ids = handle.dataset("ecg"), np.arange(handle.index.nsamples)
    return dataset.read_batch(0, ids * 0, ids, ids, len(ids)).signal


def test_datasets_of_a_handle_share_index_table_and_hashes(make_set: Make, tmp_path: Path, reads: Counter[str]) -> None:
    url = make_set(str(tmp_path / "set")).url
    reads.clear()
    handle = ShardSetHandle(url, ShardCache(str(tmp_path / "cache"), 1e9))
    assert reads["table"] == 0
    first, second = read_all(handle), read_all(handle)
    np.testing.assert_array_equal(first, second)
    assert handle.dataset("ecg").sample_tables[0] is handle.sample_table
    assert handle.dataset("ecg").cache is handle.cache
    assert (reads["index.json"], reads["table"], reads["hashed"]) == (1, 1, 3)


def test_caches_of_a_process_hash_each_local_shard_once(make_set: Make, tmp_path: Path, reads: Counter[str]) -> None:
    url = make_set(str(tmp_path / "set")).url
    for cache in ("one", "two", "one"):
        read_all(ShardSetHandle(url, ShardCache(str(tmp_path / cache), 1e9)))
    assert reads["hashed"] == 3


def test_cached_shards_of_a_process_are_not_hashed_again(
    make_set: Make, s3_here: S3, tmp_path: Path, reads: Counter[str]
) -> None:
    url = make_set(s3_here.bucket).url
    for _ in range(2):
        read_all(ShardSetHandle(url, ShardCache(str(tmp_path), 1e9)))
    # A fetch hashes the bytes as they come.
    assert reads["hashed"] == 0


def test_altered_shard_is_hashed_again_and_refused(make_set: Make, tmp_path: Path, reads: Counter[str]) -> None:
    url = make_set(str(tmp_path / "set")).url
    read_all(ShardSetHandle(url, ShardCache(str(tmp_path / "cache"), 1e9)))
    shard = tmp_path / "set" / "ecg-000001.tar"
    with shard.open("r+b") as file:
        file.seek(700)
        file.write(b"?")
    os.utime(shard)
    with pytest.raises(DataError, match=r"ecg-000001\.tar"):
        read_all(ShardSetHandle(url, ShardCache(str(tmp_path / "cache"), 1e9)))
    assert reads["hashed"] > 3


def test_open_handle_takes_the_cache_of_the_options(make_set: Make, tmp_path: Path) -> None:
    url = make_set(str(tmp_path / "set")).url
    handle = open_handle(f"{url}/index.json", DataOptions(cache_dir=str(tmp_path / "cache"), cache_gb=2.0))
    assert (handle.index.url, handle.cache.folder) == (url, tmp_path / "cache" / "shards")
    assert handle.cache.limit_bytes == 2e9


def test_handle_raises_without_index_and_table(make_set: Make, tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 1e9)
    with pytest.raises(UserError):
        ShardSetHandle(str(tmp_path / "nothing"), cache)
    handle = ShardSetHandle(make_set(str(tmp_path / "set")).url, cache)
    (tmp_path / "set" / "samples.safetensors").unlink()
    with pytest.raises(DataError, match=r"samples\.safetensors"):
        _ = handle.sample_table


def test_open_dataset_mixes_sets_by_weight(make_set: Make, tmp_path: Path) -> None:
    urls = [make_set(str(tmp_path / name), sizes=(40,), seed=seed).url for seed, name in enumerate("ab")]
    dataset = open_dataset([(urls[0], 3.0), (urls[1], 1.0)], "ecg", ShardCache(str(tmp_path / "cache"), 1e9))
    assert [part.batch for part in dataset.order("train", 8, 0).sets] == [6, 2]
