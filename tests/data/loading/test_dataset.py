"""Reading samples into batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from physio_dist.data.format.index import ShardSet
from physio_dist.data.handle import open_dataset
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.loading.dataset import Batch
from physio_dist.errors import DataError, UserError
from tests.conftest import S3
from tests.data.conftest import dataset_of, signal_of

Make = Callable[..., ShardSet]


def test_read_batch_returns_samples_padding_and_keys(make_set: Make, tmp_path: Path) -> None:
    make_set(str(tmp_path / "a"), sizes=(5, 3, 4))
    make_set(str(tmp_path / "b"), sizes=(4,), seed=1)
    source = dataset_of(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"))
    sets, ids = np.array([0, 1, 0, 0, 1]), np.array([11, 2, 0, 6, 0])
    batch = source.read_batch(3, sets, ids, ids + 100, 7)
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


@pytest.mark.parametrize("size", [0.5, 1e6])
def test_single_read_raises_on_sample_with_another_checksum(
    make_set: Make, s3_here: S3, tmp_path: Path, flip_bit: Callable[[Path, int], None], size: float,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    shards = make_set(s3_here.bucket, sizes=(8,))
    cache = ShardCache(str(tmp_path / "small"), size * shards.shards[0].filesize)
    source = open_dataset([(shards.url, 1.0)], "ecg", cache)
    nothing, third = np.zeros(1, np.int64), np.array([3])
    flip_bit(s3_here.folder / "ecg-000000.tar", int(source.sample_tables[0].offset["ecg"][3]) + 9)
    disagrees = pytest.raises(DataError, match=r"ecg-000000\.tar disagrees .*s0-0003")
    with caplog.at_level("WARNING", "physio_dist"), disagrees:
        source.read_batch(0, nothing, third, third, 1, fetching=size < 1)
    assert "reading sample s0-0003 again" in caplog.text
    np.testing.assert_array_equal(
        source.read_batch(0, nothing, third - 1, third, 1, fetching=size < 1).signal[0], signal_of(2)
    )
    assert not cache.held(shards, 0)


def test_order_raises_on_split_smaller_than_a_batch(make_set: Make, tmp_path: Path) -> None:
    source = dataset_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(8,)).url)
    with pytest.raises(UserError, match=r"/a: split val holds 2 samples, fewer than the 5"):
        source.order("val", 5, 0)
    with pytest.raises(UserError, match="split test holds 0 samples"):
        source.order("test", 1, 0)


@pytest.mark.parametrize(("other", "told"), [({"length": 32}, "window length 32 against 64")])
def test_open_dataset_raises_on_incompatible_sets(
    make_set: Make, tmp_path: Path, other: dict[str, int], told: str
) -> None:
    make_set(str(tmp_path / "a"))
    make_set(str(tmp_path / "b"), **other)
    with pytest.raises(UserError, match=f"/b and .*/a cannot be mixed: {told}"):
        dataset_of(tmp_path, str(tmp_path / "a"), str(tmp_path / "b"))


def test_open_dataset_raises_on_missing_signal(make_set: Make, tmp_path: Path) -> None:
    make_set(str(tmp_path / "a"))
    with pytest.raises(UserError, match="holds no eeg signal; it has: ecg"):
        open_dataset([(str(tmp_path / "a"), 1.0)], "eeg", ShardCache(str(tmp_path / "cache"), 1e9))


def test_release_reuses_memory_once_and_kept_batches_keep_theirs(make_set: Make, tmp_path: Path) -> None:
    source = dataset_of(tmp_path, make_set(str(tmp_path / "a"), sizes=(9,)).url)

    def read(sample: int) -> Batch:
        ids = np.array([sample])
        return source.read_batch(0, ids * 0, ids, ids, 1)

    kept, released = read(0), read(1)
    place = released.signal.ctypes.data
    released.release()
    again = read(2)
    assert again.signal.ctypes.data == place
    # A second release of the first user takes nothing from the second one.
    released.release()
    later = [read(sample) for sample in range(9)]
    assert len({batch.signal.ctypes.data for batch in (kept, again, *later)}) == 11
    for sample, batch in ((0, kept), (2, again), *enumerate(later)):
        np.testing.assert_array_equal(batch.signal[0], signal_of(sample))
