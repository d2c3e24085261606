"""The stock webdataset pipeline: decoded samples of one split, each once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from physio_dist.data.format.index import ShardSet
from physio_dist.data.webdataset_pipeline import webdataset_pipeline
from physio_dist.errors import UserError
from tests.conftest import S3
from tests.data.conftest import signal_of

Make = Callable[..., ShardSet]


def numbers(samples: list[dict[str, object]]) -> list[int]:
    return [int(str(sample["__key__"]).split("-")[1]) for sample in samples]


@pytest.mark.parametrize("split", ["train", "val"])
def test_pipeline_gives_decoded_samples_of_the_split(make_set: Make, tmp_path: Path, split: str) -> None:
    shards = make_set(str(tmp_path / "set"), sizes=(5, 3, 4))
    samples = list(webdataset_pipeline(f"{shards.url}/index.json", split))
    assert numbers(samples) == [i for i in range(12) if (i % 4 == 3) == (split == "val")]
    for number, sample in zip(numbers(samples), samples, strict=True):
        assert sample["ecg"].dtype == np.float32
        # The set has 2 microvolts per bit.
        np.testing.assert_array_equal(sample["ecg"], 2.0 * signal_of(number).astype(np.float32))
        assert sample["ecg.valid"].tolist() == [True, number % 3 > 0]
        assert sample["labels"] == sample["json"]["labels"] == {"n": number % 2}


def test_pipeline_reads_remote_shards(make_set: Make, s3_here: S3) -> None:
    shards = make_set(s3_here.bucket + "/set")
    assert len(list(webdataset_pipeline(shards.url))) == shards.splits["train"]


def test_pipeline_shuffles_shards_differently_in_each_epoch(make_set: Make, tmp_path: Path) -> None:
    url = make_set(str(tmp_path / "set"), sizes=(2,) * 12, every=100).url
    pipeline = webdataset_pipeline(url, shuffle_shards=12, seed=3)
    first, second = numbers(list(pipeline)), numbers(list(pipeline))
    assert sorted(first) == sorted(second) == list(range(24))
    assert len({tuple(first), tuple(second), tuple(range(24))}) == 3
    assert numbers(list(webdataset_pipeline(url, shuffle_shards=12, seed=3))) == first
    assert numbers(list(webdataset_pipeline(url, shuffle_samples=24))) != list(range(24))


@pytest.mark.integration
def test_workers_of_a_loader_share_the_shards(make_set: Make, tmp_path: Path) -> None:
    url = make_set(str(tmp_path / "set"), sizes=(3, 3, 3, 3), every=100).url
    pipeline = webdataset_pipeline(url, shuffle_shards=4).to_tuple("__key__", "ecg").batched(2)
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=2)
    keys = [key for batch, _ in loader for key in batch]
    assert sorted(keys) == [f"s0-{i:04d}" for i in range(12)]


def test_pipeline_raises_on_unknown_and_empty_splits(make_set: Make, tmp_path: Path) -> None:
    url = make_set(str(tmp_path / "set")).url
    with pytest.raises(UserError, match="split=dev"):
        webdataset_pipeline(url, "dev")
    with pytest.raises(UserError, match="no samples in its test split"):
        webdataset_pipeline(url, "test")
    with pytest.raises(UserError, match=r"index\.json"):
        webdataset_pipeline(str(tmp_path))
