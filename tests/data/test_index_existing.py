"""Indexing of WebDatasets that other programs wrote."""

from __future__ import annotations

import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physio_dist.config import IndexOptions, load
from physio_dist.data import describe
from physio_dist.data.format import tar
from physio_dist.data.format.index import ShardSet, open_set
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.data.handle import open_dataset
from physio_dist.data.index_existing import index_existing
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.verify import verify
from physio_dist.errors import DataError, UserError
from physio_dist.signals.montage import ECG_12
from tests.data.conftest import signal_of
from tests.data.format.test_tar import BOMB, npy, packed

Make = Callable[..., ShardSet]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


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


def test_stock_webdataset_gets_an_index_and_is_read_like_our_own(tmp_path: Path, cli: Cli) -> None:
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
def test_index_existing_raises_on_unfit_samples_and_writes_nothing(
    tmp_path: Path, members: list[tuple[str, bytes]], options: dict[str, Any], error: type[Exception], told: str
) -> None:
    (tmp_path / "x.tar").write_bytes(packed(*members))
    with pytest.raises(error) as caught:
        index_existing(str(tmp_path), IndexOptions(**{"channels": "I,II", **options}))
    assert told in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.tar"]


def test_index_existing_raises_on_repeated_key_and_without_tars(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.tar files; it has: nothing"):
        index_existing(str(tmp_path), IndexOptions(channels="I,II"))
    for name in ("x.tar", "y.tar"):
        (tmp_path / name).write_bytes(packed(("a.ecg.npy", npy(signal_of(0)))))
    with pytest.raises(UserError, match="key 'a' stands in it more than once"):
        index_existing(str(tmp_path), IndexOptions(channels="I,II"))


def test_index_existing_raises_on_tar_cut_between_samples(tmp_path: Path) -> None:
    file = io.BytesIO()
    tar.write([tar.Sample(key, {"ecg": signal_of(0)}, {}) for key in "ab"], file)
    (tmp_path / "x.tar").write_bytes(file.getvalue()[:2048])
    with pytest.raises(DataError, match=r"x\.tar: truncated: it has no end mark"):
        index_existing(str(tmp_path), IndexOptions(channels="I,II"))


def test_describe_copes_with_odd_labels(tmp_path: Path) -> None:
    stock(tmp_path, samples=3, shards=1, facts=lambda i: {"labels": [{"a": 1}, [1, 2], {"x": [1, {"y": 2}]}][i]})
    index_existing(str(tmp_path), IndexOptions(channels="I,II"))
    told = "\n".join(describe.describe(str(tmp_path)))
    assert "a: 1 x 1" in told
    assert '{"y": 2} x 1' in told


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["channels=I,I"], "each only once"),
        (["rate=0"], "rate=0.0: it must be positive"),
        (["uv_per_bit=inf"], "uv_per_bit=inf: it must be positive"),
        (["val=0.7", "test=0.7"], "together at most 1"),
    ],
)
def test_options_of_index_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(IndexOptions, None, words)
