"""Views: other splits over the same shards, which are found where the set is, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physio_dist import storage
from physio_dist.data.describe import describe
from physio_dist.data.format.index import ShardSet, open_set
from physio_dist.data.format.resplit import publish_resplits, with_splits
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.data.handle import open_dataset
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.verify import verify
from physio_dist.errors import DataError, UserError
from tests.conftest import S3

Make = Callable[..., ShardSet]


def publish(shards: ShardSet, out: str, number: int = 2) -> list[ShardSet]:
    """Views in which the samples take turns as test samples."""
    table = read_sample_table(shards)
    turns = np.arange(shards.nsamples) % number
    resplits = [
        with_splits(shards, table, np.where(turns == i, 2, 0).astype(np.uint8), f"{out}/{i}", {"fold": str(i)})
        for i in range(number)
    ]
    publish_resplits(resplits, out)
    return [made for made, _ in resplits]


def test_a_resplit_has_splits_of_its_own_and_the_shards_of_its_set(make_set: Make, tmp_path: Path) -> None:
    import wids

    shards = make_set(str(tmp_path / "data"))
    resplits = publish(shards, str(tmp_path / "out" / "resplits"))
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == 2 * ["index.json"] + 2 * [
        "samples.safetensors"
    ]
    assert len({shards.fingerprint, *(resplit.fingerprint for resplit in resplits)}) == 3
    for i, made in enumerate(resplits):
        opened = open_set(made.url)
        assert opened == made and opened.splits == {"train": 6, "val": 0, "test": 6}
        assert [opened.shard_url(n) for n in range(3)] == [shards.shard_url(n) for n in range(3)]
        assert (read_sample_table(opened).split == 2).tolist() == [n % 2 == i for n in range(12)]
        assert list(verify(made.url)) == []
        assert f"  a resplit of {tmp_path / 'data'}: fold {i}" in describe(made.url)
    listed = wids.ShardListDataset(f"{tmp_path}/out/resplits/1/index.json", keep=True)
    assert [listed[n]["__key__"] for n in (0, 11)] == ["s0-0000", "s0-0011"]
    # A resplit of a resplit is one of the set.
    (again, _) = publish(open_set(resplits[0].url), str(tmp_path / "more"))
    assert again.base_url == str(tmp_path / "data") and again.fingerprint == resplits[0].fingerprint
    # What is wrong with a shard is told of the resplit too.
    (tmp_path / "data" / "ecg-000001.tar").unlink()
    assert list(verify(resplits[0].url)) == ["ecg-000001.tar: missing"]


def test_a_set_and_its_resplits_may_be_moved_together_and_not_apart(make_set: Make, tmp_path: Path) -> None:
    for name in ("a/data", "real"):
        (tmp_path / name).mkdir(parents=True)
    # Through a link `..` leads elsewhere than it reads.
    (tmp_path / "a" / "out").symlink_to(tmp_path / "real")
    shards = make_set(str(tmp_path / "a" / "data"))
    (resplit, _) = publish(shards, str(tmp_path / "a" / "out" / "resplits"))
    assert (
        open_set(resplit.url).base_url
        == str(tmp_path / "a" / "data")
        == open_set(f"{tmp_path}/real/resplits/0").base_url
    )
    publish(shards, str(tmp_path / "a" / "near"))
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert open_set(f"{tmp_path}/b/near/1").data_url == str(tmp_path / "b" / "data")
    assert list(verify(f"{tmp_path}/b/near/1")) == []
    shutil.move(tmp_path / "b" / "near", tmp_path / "b" / "far" / "away")
    with pytest.raises(UserError, match=r"is a resplit of the shards in .*/b/far/data, where there is no finished"):
        open_set(f"{tmp_path}/b/far/away/1")
    make_set(str(tmp_path / "b" / "far" / "data"), seed=1)
    with pytest.raises(DataError, match="holds other shards than the resplit was made of; make it again"):
        open_set(f"{tmp_path}/b/far/away/1")


@pytest.mark.parametrize(
    ("of", "told"),
    [
        ("/etc", "/etc, where no index may point"), ("file:///etc", "where no index may point"),
        ("local:///etc", "where no index may point"), (".", "holds other shards"), ("../0", "holds other shards"),
        ("../../secrets", "no finished shard set"), ("../../elsewhere", "holds other shards"),
    ],
)  # fmt: skip
def test_open_set_raises_on_resplit_of_foreign_files(
    make_set: Make, tmp_path: Path, of: str, told: str
) -> None:  # fmt: skip
    publish(make_set(str(tmp_path / "data")), str(tmp_path / "resplits"))
    make_set(str(tmp_path / "elsewhere"), seed=1)
    shutil.copytree(tmp_path / "data", tmp_path / "secrets", ignore=shutil.ignore_patterns("index.json"))
    for folder in ("data", "resplits/1"):
        where = tmp_path / folder / "index.json"
        document = json.loads(where.read_text())
        before = document["physio_dist"].get("of", "")
        document["physio_dist"]["of"] = of if folder != "data" else of.replace("../../", "../").replace("../0", ".")
        for shard in document["shardlist"]:
            shard["url"] = storage.join(document["physio_dist"]["of"], shard["url"].removeprefix(f"{before}/"))
        where.write_text(json.dumps(document))
        with pytest.raises((DataError, UserError), match=told):
            open_set(str(where.parent))


def test_shards_of_a_resplit_are_named_below_its_set(make_set: Make, tmp_path: Path) -> None:
    publish(make_set(str(tmp_path / "data")), str(tmp_path / "resplits"))
    where = tmp_path / "resplits" / "1" / "index.json"
    good = where.read_text()
    for name in ("../../other/ecg-000000.tar", "../../data/../x.tar", "/etc/passwd", "s3://b/ecg-000000.tar"):
        document = json.loads(good)
        document["shardlist"][0]["url"] = name
        where.write_text(json.dumps(document))
        with pytest.raises(DataError, match="names a shard outside its own folder"):
            open_set(f"{tmp_path}/resplits/1")


@pytest.mark.parametrize(
    ("home", "start", "pointer"),
    [
        ("/a/data", "/a/resplits/0", "../../data"), ("file:///a/data", "/a/resplits/0", "../../data"),
        ("s3://b/data", "s3://b/resplits/0", "../../data"), ("s3://b", "s3://b/resplits/0", "../.."),
        ("s3://b/data/", "s3://b/resplits/0/", "../../data"), ("s3://b/data", "s3://c/resplits/0", "s3://b/data"),
        ("s3://b/data", "/a/resplits/0", "s3://b/data"), ("https://h/data", "/a/resplits/0", "https://h/data"),
    ],
)  # fmt: skip
def test_pointed_resolves_pointers(home: str, start: str, pointer: str) -> None:
    assert storage.pointer(home, start) == pointer
    assert storage.pointed(pointer, start) == home.removeprefix("file://").rstrip("/")


@pytest.mark.parametrize(
    ("pointer", "start", "leads"),
    [
        # Nobody from elsewhere names a file of this machine, or has it reached in another way.
        ("file:///etc", "s3://b/v/0", None), ("/etc", "s3://b/v/0", None), ("/etc", "/a/v/0", None), ("", "/a", None),
        ("file:///etc", "/a/v/0", None), ("local:///etc", "/a/v/0", None), ("s3://b/d", "https://h/v/0", None),
        ("https://h/d", "s3://b/v/0", None), ("../../../../etc", "s3://b/v/0", "s3://b/etc"),
        ("../../../..", "https://h/v/0", "https://h"), ("~/x", "/a/v", "/a/v/~/x"),
    ],
)  # fmt: skip
def test_pointed_refuses_unsafe_pointers(pointer: str, start: str, leads: str | None) -> None:
    assert storage.pointed(pointer, start) == leads


def test_publish_resplits_writes_once_and_overwrites_nothing(make_set: Make, tmp_path: Path) -> None:
    shards, out = make_set(str(tmp_path / "data")), tmp_path / "resplits"
    table = read_sample_table(shards)

    def again(number: int, code: int = 2) -> int:
        split = [np.full(shards.nsamples, code * (i % 2), dtype=np.uint8) for i in range(number)]
        resplits = [with_splits(shards, table, split[i], f"{out}/{i}", {"fold": str(i)}) for i in range(number)]
        return publish_resplits(resplits, str(out))

    assert again(3) == 3 and again(3) == 0
    first = {path: path.read_bytes() for path in out.rglob("*.*")}
    # Killed between the two files, with a write half done.
    (out / "1" / "index.json").unlink()
    (out / "1" / ".index.json.12-34.tmp").write_bytes(b"{")
    (out / "2" / "samples.safetensors").unlink()
    assert again(3) == 2
    assert {path: path.read_bytes() for path in out.rglob("*.*") if path.suffix != ".tmp"} == first
    for number, code, told in (
        (2, 2, "these 2 resplits: 2"),
        (3, 1, "1 holds another shard set, or a resplit made from"),
    ):
        with pytest.raises(UserError, match=told):
            again(number, code)
    for name in ("notes.txt", "0/ecg-000000.tar"):
        (out / name).write_text("x")
        with pytest.raises(UserError, match=rf"holds something else than .*{name.rsplit('/')[-1]}; choose another"):
            again(3)
        (out / name).unlink()
    assert {path: path.read_bytes() for path in out.rglob("*.*") if path.suffix != ".tmp"} == first


def test_resplits_in_a_bucket_share_the_shards_of_the_cache(make_set: Make, tmp_path: Path, s3_here: S3) -> None:
    bucket = s3_here.bucket
    shards = make_set(f"{bucket}/data")
    resplits = publish(shards, f"{bucket}/runs/resplits")
    document: dict[str, Any] = storage.read_json(f"{bucket}/runs/resplits/1/index.json")
    assert document["physio_dist"]["of"] == "../../../data"
    assert document["shardlist"][2]["url"] == "../../../data/ecg-000002.tar"
    local = publish(shards, str(tmp_path / "resplits"))
    assert open_set(local[1].url).data_url == f"{bucket}/data" and list(verify(local[1].url)) == []
    assert list(verify(resplits[1].url)) == []
    cache = ShardCache(str(tmp_path / "cache"), 1e9)
    every = np.arange(12)
    zeros = np.zeros(12, dtype=np.int64)
    wanted = open_dataset([(shards.url, 1.0)], "ecg", cache).read_batch(0, zeros, every, every, 12).signal.copy()
    fetched = {path.name for path in (tmp_path / "cache").rglob("*.tar")}
    assert len(fetched) == 3
    for url in (resplits[0].url, resplits[1].url, local[0].url):
        source = open_dataset([(url, 1.0)], "ecg", ShardCache(str(tmp_path / "cache"), 1e9))
        assert all(source.cache.held(source.sets[0], n) for n in range(3))
        assert np.array_equal(source.read_batch(0, zeros, every, every, 12).signal, wanted)
        assert {path.name for path in (tmp_path / "cache").rglob("*.tar")} == fetched
    # A resplit of local shards in a bucket would name what others cannot reach.
    with pytest.raises(UserError, match="could not name the shards in"):
        publish(make_set(str(tmp_path / "data")), f"{bucket}/other")
    assert storage.names(f"{bucket}/other") == []
    # Held is what the cache has, not what a local resplit says.
    assert not ShardCache(str(tmp_path / "empty"), 1e9).held(open_set(local[0].url), 0)
