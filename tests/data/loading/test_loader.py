"""Batches of a rank: the right samples, from any step on, and errors that come out."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from physio_dist import storage
from physio_dist.data.format.index import ShardSet
from physio_dist.data.handle import open_dataset
from physio_dist.data.loading import dataset, order
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.loading.dataset import Batch, ShardDataset
from physio_dist.data.loading.loader import LoaderPlan, PrefetchLoader, rank_batch
from physio_dist.errors import DataError
from tests.conftest import S3
from tests.data.conftest import dataset_of, signal_of

Make = Callable[..., ShardSet]


def feed(
    source: ShardDataset, batch: int, start: int, stop: int, rank: int = 0, world: int = 1, seed: int = 0
) -> PrefetchLoader[Batch]:
    size = -(-batch // world)
    order = source.order("train", batch, seed)
    return PrefetchLoader(source, LoaderPlan(order, "train", size, start, stop, rank, world), lambda made: made)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(("feed", "fetch"))}


def test_rank_batch_covers_exactly_the_split(make_set: Make, tmp_path: Path) -> None:
    shards = make_set(str(tmp_path / "a"), sizes=(9, 0, 11, 4), every=3)
    source = dataset_of(tmp_path, shards.url)
    held = {i for i in range(24) if i % 3 == 2}
    for split, wanted in (("train", set(range(24)) - held), ("val", held)):
        order, members = source.order(split, 4, 0), source.members(split)
        steps = len(wanted) // 4
        seen = np.concatenate([rank_batch(order, members, step, 0, 1)[1] for step in range(steps)])
        assert set(seen.tolist()) == wanted


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_rank_batch_of_all_ranks_is_the_global_batch(make_set: Make, tmp_path: Path, world: int) -> None:
    source = dataset_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10, 10)).url)
    whole = rank_batch(source.order("train", 7, 1), source.members("train"), 4, 0, 1)
    parts = [rank_batch(source.order("train", 7, 1), source.members("train"), 4, rank, world) for rank in range(world)]
    # Within its slice a rank has them in an order of its own.
    together = sorted(zip(*(np.concatenate([part[i] for part in parts]).tolist() for i in (2, 0, 1)), strict=True))
    assert together == sorted(zip(*(whole[i].tolist() for i in (2, 0, 1)), strict=True))
    assert [position for position, _, _ in together] == list(range(28, 35))
    for rank, part in enumerate(parts):
        assert sorted(part[2].tolist()) == list(range(28 + rank * 7 // world, 28 + (rank + 1) * 7 // world))


def test_loader_order_does_not_depend_on_the_location_of_the_set(make_set: Make, s3_here: S3, tmp_path: Path) -> None:
    url = s3_here.bucket + "/set"
    make_set(url, sizes=(10, 10))
    shutil.copytree(s3_here.folder / "set", tmp_path / "copy")
    told = []
    for place in (url, str(tmp_path / "copy"), f"{tmp_path}/copy/index.json"):
        source = dataset_of(tmp_path, place)
        with feed(source, 5, 0, 6) as batches:
            told.append([source.keys(batch.samples) for batch in batches])
    assert told[0] == told[1] == told[2]
    make_set(str(tmp_path / "other"), sizes=(10, 10), seed=1)
    source = dataset_of(tmp_path, str(tmp_path / "other"))
    with feed(source, 5, 0, 6) as batches:
        other = [[int(sample) for sample in batch.samples[1]] for batch in batches]
    assert other != [[int(key.split("-")[1]) for key in keys] for keys in told[0]]


@pytest.mark.parametrize("start", [0, 1, 3, 4, 19, 20])
def test_loader_gives_the_same_batches_from_any_start(make_set: Make, tmp_path: Path, start: int) -> None:
    source = dataset_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10)).url)
    with feed(source, 4, 0, 20) as batches:
        whole = list(batches)
    assert [batch.step for batch in whole] == list(range(20))
    with feed(dataset_of(tmp_path, str(tmp_path / "a")), 4, start, 20) as batches:
        for batch, wanted in zip(batches, whole[start:], strict=True):
            np.testing.assert_array_equal(batch.signal, wanted.signal)
            np.testing.assert_array_equal(batch.positions, wanted.positions)


def test_loader_pads_short_slices(make_set: Make, tmp_path: Path) -> None:
    source = dataset_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10)).url)
    weights = []
    for rank in range(3):
        with feed(source, 4, 0, 1, rank, 3) as batches:
            weights.append(next(iter(batches)).weight.tolist())
    assert sorted(weights) == [[1, 0], [1, 0], [1, 1]]


def test_loader_draws_from_a_mixture_by_weight(make_set: Make, tmp_path: Path) -> None:
    make_set(str(tmp_path / "a"), sizes=(20,))
    make_set(str(tmp_path / "b"), sizes=(20,), seed=1)
    source = dataset_of(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"), weights=(3.0, 1.0))
    with feed(source, 8, 0, 9) as batches:
        for batch in batches:
            assert np.bincount(batch.samples[0]).tolist() == [6, 2]


def test_loader_raises_on_truncated_shard(
    make_set: Make, tmp_path: Path, flip_bit: Callable[[Path, int], None]
) -> None:
    source = dataset_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10, 10)).url)
    flip_bit(tmp_path / "a" / "ecg-000001.tar", 900)
    with pytest.raises(DataError, match=r"ecg-000001\.tar disagrees"), feed(source, 7, 0, 50) as batches:
        list(batches)
    assert threads() == set()


def test_loader_raises_errors_of_prepare(make_set: Make, tmp_path: Path) -> None:
    source = dataset_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10)).url)

    def prepare(batch: Batch) -> Batch:
        if batch.step == 2:
            raise ZeroDivisionError("in step 2")
        return batch

    seen = []
    with (
        pytest.raises(ZeroDivisionError, match="in step 2"),
        PrefetchLoader(source, LoaderPlan(source.order("train", 4, 0), "train", 4, 0, 9), prepare) as batches,
    ):
        for batch in batches:
            seen.append(batch.step)
    assert seen == [0, 1]


def test_loader_left_early_ends_its_threads(make_set: Make, tmp_path: Path) -> None:
    source = dataset_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10)).url)
    with feed(source, 4, 0, 10_000) as batches:
        assert next(iter(batches)).step == 0
        assert "feed" in threads()
    assert threads() == set()


def fetches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(shard, thread) of every fetch from now on."""
    told: list[tuple[str, str]] = []
    fetch = storage.fetch

    def note(url: str, target: Path, nbytes: int) -> str:
        if url.endswith(".tar"):
            told.append((url[-6:-4], threading.current_thread().name.split("_")[0]))
        return fetch(url, target, nbytes)

    monkeypatch.setattr(storage, "fetch", note)
    return told


def contents(source: ShardDataset, batch: int, steps: int) -> list[np.ndarray]:
    with feed(source, batch, 0, steps) as batches:
        return [batch.signal for batch in batches]


def test_loader_fetches_each_shard_once_if_the_cache_holds_the_set(
    make_set: Make, s3_here: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = dataset_of(tmp_path, make_set(s3_here.bucket, sizes=(8,) * 6, every=100).url)
    told = fetches(monkeypatch)
    contents(source, 2, 3 * 24)
    assert sorted(shard for shard, _ in told) == [f"{n:02d}" for n in range(6)]
    assert "fetch" in {thread for _, thread in told}


def test_loader_fetches_evicted_shards_once_an_epoch(
    make_set: Make, s3_here: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One lane that shuffles over two shards' worth, in a cache of four: what is done with goes, what is needed stays.
    monkeypatch.setattr(order, "WINDOW", 16)
    shards = make_set(s3_here.bucket, sizes=(8,) * 12, every=1000)
    whole = contents(dataset_of(tmp_path, shards.url), 1, 3 * 96)
    cache = ShardCache(str(tmp_path / "small"), 4.5 * shards.shards[0].filesize)
    told = fetches(monkeypatch)
    again = contents(open_dataset([(shards.url, 1.0)], "ecg", cache), 1, 3 * 96)
    for ours, theirs in zip(again, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    counts = [sum(shard == f"{n:02d}" for shard, _ in told) for n in range(12)]
    assert max(counts) <= 3
    assert sum(counts) >= 12 + 2 * (12 - 5)


def test_loader_reads_single_samples_if_the_cache_is_full(
    make_set: Make, s3_here: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = make_set(s3_here.bucket, sizes=(8,) * 6, every=100)
    whole = contents(dataset_of(tmp_path, shards.url), 5, 20)
    cache = ShardCache(str(tmp_path / "small"), 2.5 * shards.shards[0].filesize)
    told = fetches(monkeypatch)
    again = contents(open_dataset([(shards.url, 1.0)], "ecg", cache), 5, 20)
    for ours, theirs in zip(again, whole, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    # All shards are in use all the time, so none takes the place of another.
    assert len(told) == 2


def test_loader_without_releases_delivers_batches_that_can_be_kept(make_set: Make, tmp_path: Path) -> None:
    source = dataset_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10)).url)
    with feed(source, 4, 0, 12) as batches:
        kept = list(batches)
    for batch in kept:
        for row, sample in enumerate(batch.samples[1].tolist()):
            np.testing.assert_array_equal(batch.signal[row], signal_of(sample))


def test_loader_reuses_memory_of_released_batches(make_set: Make, tmp_path: Path) -> None:
    source = dataset_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10)).url)
    places = set()
    with feed(source, 4, 0, 40) as batches:
        for batch in batches:
            for row, sample in enumerate(batch.samples[1].tolist()):
                np.testing.assert_array_equal(batch.signal[row], signal_of(sample))
            places.add(batch.signal.ctypes.data)
            batch.release()
    assert len(places) <= dataset._BUFFERS
