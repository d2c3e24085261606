"""Batches of a rank: the right samples, from any step on, and errors that come out."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from physio_dist.errors import DataError, UserError
from physio_dist.shards import stream
from physio_dist.shards.cache import ShardCache
from physio_dist.shards.index import ShardSet
from physio_dist.shards.stream import Batch, Feed, Source, rank_batch
from tests.conftest import S3
from tests.shards.conftest import signal_of

Make = Callable[..., ShardSet]


def source_of(tmp_path: Path, *urls: str, weights: tuple[float, ...] = ()) -> Source:
    parts = list(zip(urls, weights or (1.0,) * len(urls), strict=True))
    return Source(parts, "ecg", ShardCache(str(tmp_path / "cache"), 1e9))


def feed(
    source: Source, batch: int, start: int, stop: int, rank: int = 0, world: int = 1, seed: int = 0
) -> Feed[Batch]:
    size = -(-batch // world)
    order = source.order("train", batch, seed)
    return Feed(source, order, "train", rank, world, size, lambda made: made, start, stop)


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith(("feed", "fetch"))}


def test_gather_reads_what_the_tars_hold(make_set: Make, tmp_path: Path) -> None:
    make_set(str(tmp_path / "a"), sizes=(5, 3, 4))
    make_set(str(tmp_path / "b"), sizes=(4,), seed=1)
    source = source_of(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"))
    sets, ids = np.array([0, 1, 0, 0, 1]), np.array([11, 2, 0, 6, 0])
    batch = source.gather(3, sets, ids, ids + 100, 7)
    for row, (which, sample) in enumerate(zip(sets, ids, strict=True)):
        np.testing.assert_array_equal(batch.signal[row], signal_of(int(sample), seed=int(which)))
    assert batch.signal.shape == (7, 2, 64)
    assert batch.signal.dtype == np.int16
    assert batch.weight.tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert not batch.signal[5:].any()
    assert batch.scale.tolist() == [2.0] * 5 + [1.0] * 2
    assert batch.valid[:, 1].tolist() == [True, True, False, False, False, True, True]
    assert batch.positions.tolist() == [111, 102, 100, 106, 100, 0, 0]
    assert batch.step == 3
    assert source.keys(batch.samples) == ["s0-0011", "s1-0002", "s0-0000", "s0-0006", "s1-0000"]


def test_batches_hold_the_split_and_nothing_else(make_set: Make, tmp_path: Path) -> None:
    shards = make_set(str(tmp_path / "a"), sizes=(9, 0, 11, 4), every=3)
    source = source_of(tmp_path, shards.url)
    held = {i for i in range(24) if i % 3 == 2}
    for split, wanted in (("train", set(range(24)) - held), ("val", held)):
        order, members = source.order(split, 4, 0), source.members(split)
        steps = len(wanted) // 4
        seen = np.concatenate([rank_batch(source, order, members, step, 0, 1)[1] for step in range(steps)])
        assert set(seen.tolist()) == wanted


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
def test_ranks_together_get_the_global_batch_with_positions_in_the_run(
    make_set: Make, tmp_path: Path, world: int
) -> None:
    source = source_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10, 10)).url)
    whole = rank_batch(source, source.order("train", 7, 1), source.members("train"), 4, 0, 1)
    parts = [
        rank_batch(source, source.order("train", 7, 1), source.members("train"), 4, rank, world)
        for rank in range(world)
    ]
    for i in range(3):
        np.testing.assert_array_equal(np.concatenate([part[i] for part in parts]), whole[i])
    assert whole[2].tolist() == list(range(28, 35))


def test_the_order_is_the_same_wherever_the_set_lies(make_set: Make, s3_here: S3, tmp_path: Path) -> None:
    url = s3_here.bucket + "/set"
    make_set(url, sizes=(10, 10))
    shutil.copytree(s3_here.folder / "set", tmp_path / "copy")
    told = []
    for place in (url, str(tmp_path / "copy"), f"{tmp_path}/copy/index.json"):
        source = source_of(tmp_path, place)
        with feed(source, 5, 0, 6) as batches:
            told.append([source.keys(batch.samples) for batch in batches])
    assert told[0] == told[1] == told[2]
    make_set(str(tmp_path / "other"), sizes=(10, 10), seed=1)
    source = source_of(tmp_path, str(tmp_path / "other"))
    with feed(source, 5, 0, 6) as batches:
        other = [[int(sample) for sample in batch.samples[1]] for batch in batches]
    assert other != [[int(key.split("-")[1]) for key in keys] for keys in told[0]]


@pytest.mark.parametrize("start", [0, 1, 3, 4, 19, 20])
def test_a_feed_gives_the_same_batches_from_any_start(make_set: Make, tmp_path: Path, start: int) -> None:
    source = source_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10)).url)
    with feed(source, 4, 0, 20) as batches:
        whole = list(batches)
    assert [batch.step for batch in whole] == list(range(20))
    with feed(source_of(tmp_path, str(tmp_path / "a")), 4, start, 20) as batches:
        for batch, wanted in zip(batches, whole[start:], strict=True):
            np.testing.assert_array_equal(batch.signal, wanted.signal)
            np.testing.assert_array_equal(batch.positions, wanted.positions)


def test_slices_shorter_than_the_rest_are_padded(make_set: Make, tmp_path: Path) -> None:
    source = source_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10)).url)
    weights = []
    for rank in range(3):
        with feed(source, 4, 0, 1, rank, 3) as batches:
            weights.append(next(iter(batches)).weight.tolist())
    assert sorted(weights) == [[1, 0], [1, 0], [1, 1]]


def test_a_mixture_draws_from_its_sets_by_weight(make_set: Make, tmp_path: Path) -> None:
    make_set(str(tmp_path / "a"), sizes=(20,))
    make_set(str(tmp_path / "b"), sizes=(20,), seed=1)
    source = source_of(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"), weights=(3.0, 1.0))
    with feed(source, 8, 0, 9) as batches:
        for batch in batches:
            assert np.bincount(batch.samples[0]).tolist() == [6, 2]


def test_an_error_of_the_reading_thread_is_raised_and_names_the_shard(
    make_set: Make, tmp_path: Path, flip_bit: Callable[[Path, int], None]
) -> None:
    source = source_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10, 10)).url)
    flip_bit(tmp_path / "a" / "ecg-000001.tar", 900)
    with pytest.raises(DataError, match=r"ecg-000001\.tar disagrees"), feed(source, 7, 0, 50) as batches:
        list(batches)
    assert threads() == set()


def test_an_error_in_preparing_a_batch_is_raised(make_set: Make, tmp_path: Path) -> None:
    source = source_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10)).url)

    def prepare(batch: Batch) -> Batch:
        if batch.step == 2:
            raise ZeroDivisionError("in step 2")
        return batch

    seen = []
    with (
        pytest.raises(ZeroDivisionError, match="in step 2"),
        Feed(source, source.order("train", 4, 0), "train", 0, 1, 4, prepare, 0, 9) as batches,
    ):
        for batch in batches:
            seen.append(batch.step)
    assert seen == [0, 1]


def test_a_feed_left_early_ends_its_threads(make_set: Make, tmp_path: Path) -> None:
    source = source_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(10, 10)).url)
    with feed(source, 4, 0, 10_000) as batches:
        assert next(iter(batches)).step == 0
        assert "feed" in threads()
    assert threads() == set()


def test_shards_are_asked_for_ahead_again_in_every_epoch(
    make_set: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_STEPS_AHEAD", 2)
    source = source_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(8,) * 6, every=100).url)
    asked: list[int] = []
    opened = source.cache.open

    def note(shards: ShardSet, shard: int) -> np.ndarray:
        if threading.current_thread().name.startswith("fetch"):
            asked.append(shard)
        return opened(shards, shard)

    monkeypatch.setattr(source.cache, "open", note)
    with feed(source, 1, 0, 3 * 48) as batches:
        list(batches)
    # One lane walks six shards an epoch in a shuffled window; none is forgotten for having been asked for once.
    assert min(asked.count(shard) for shard in range(6)) >= 3


def test_a_split_too_small_for_a_batch_is_named_by_its_url(make_set: Make, tmp_path: Path) -> None:
    source = source_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(8,)).url)
    with pytest.raises(UserError, match=r"/a: split val holds 2 samples, fewer than the 5"):
        source.order("val", 5, 0)
    with pytest.raises(UserError, match="split test holds 0 samples"):
        source.order("test", 1, 0)


@pytest.mark.parametrize(("other", "told"), [({"length": 32}, "window length 32 against 64")])
def test_sets_that_do_not_fit_are_not_mixed(make_set: Make, tmp_path: Path, other: dict[str, int], told: str) -> None:
    make_set(str(tmp_path / "a"))
    make_set(str(tmp_path / "b"), **other)
    with pytest.raises(UserError, match=f"/b and .*/a cannot be mixed: {told}"):
        source_of(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"))


def test_a_signal_that_a_set_lacks_is_named(make_set: Make, tmp_path: Path) -> None:
    make_set(str(tmp_path / "a"))
    with pytest.raises(UserError, match="holds no eeg signal; it has: ecg"):
        Source([(str(tmp_path / "a"), 1.0)], "eeg", ShardCache(str(tmp_path / "cache"), 1e9))
