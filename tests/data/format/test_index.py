"""The index and its sample table: what they say is checked before anybody believes it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physio_dist.data.format.index import ShardSet, open_set
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.errors import DataError, UserError

Edit = Callable[[dict[str, Any]], object]


def edit(folder: Path, change: Edit) -> None:
    where = folder / "index.json"
    document = json.loads(where.read_text())
    change(document)
    where.write_text(json.dumps(document))


def test_open_set_returns_what_was_published(make_set: Callable[..., ShardSet], tmp_path: Path) -> None:
    made = make_set(str(tmp_path), sizes=(5, 3, 4))
    assert made.nsamples == 12
    assert made.shard_starts().tolist() == [0, 5, 8, 12]
    assert made.shard_url(1) == f"{tmp_path}/ecg-000001.tar"
    for name in (str(tmp_path), f"{tmp_path}/", f"{tmp_path}/index.json", f"file://{tmp_path}"):
        again = open_set(name)
        assert dataclasses.replace(again, url=made.url) == made
    sample_table = read_sample_table(made)
    assert sample_table.keys(np.array([11, 0])) == ["s0-0011", "s0-0000"]
    assert sample_table.split.tolist() == [0, 0, 0, 1] * 3


def test_index_is_a_wids_document(make_set: Callable[..., ShardSet], tmp_path: Path) -> None:
    make_set(str(tmp_path))
    document = json.loads((tmp_path / "index.json").read_text())
    assert document["__kind__"] == "wids-shard-index-v1"
    assert document["wids_version"] == 1
    assert [(s["url"], s["nsamples"]) for s in document["shardlist"]] == [
        ("ecg-000000.tar", 5),
        ("ecg-000001.tar", 3),
        ("ecg-000002.tar", 4),
    ]


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda d: d.update(__kind__="other"), UserError, "is not a wids-shard-index-v1 document"),
        (lambda d: d.pop("physio_dist"), UserError, "lacks what training needs; `physio-dist index"),
        (lambda d: d["physio_dist"].update(format=3), UserError, "has format 3, this version .* reads format 2; upgr"),
        (lambda d: d["physio_dist"].update(format="x"), UserError, "has format 'x', .* reads format 2; upgrade"),
        (lambda d: d["physio_dist"].update(format=1), UserError, "format 1, .* reads format 2; convert the recordings"),
        (lambda d: d["physio_dist"].pop("rate"), DataError, "is damaged: KeyError 'rate'"),
        (lambda d: d["shardlist"][0].pop("sha256"), DataError, "is damaged"),
        (lambda d: d["shardlist"][0].update(nsamples="many"), DataError, "is damaged"),
        (lambda d: d.update(shardlist=None), DataError, "is damaged"),
        (lambda d: d["physio_dist"].update(signals=[]), DataError, "is damaged"),
        (lambda d: d["shardlist"][0].update(nsamples=4), DataError, "was altered: its fingerprint does not fit"),
        (lambda d: d["shardlist"].reverse(), DataError, "was altered"),
        (lambda d: d["physio_dist"].update(rate=100.0), DataError, "was altered"),
        (lambda d: d["physio_dist"]["signals"]["ecg"].update(uv_per_bit=1.0), DataError, "was altered"),
        (lambda d: d["physio_dist"]["signals"]["ecg"]["channels"].reverse(), DataError, "was altered"),
        (lambda d: d["physio_dist"]["sidecar"].update(sha256="0" * 64), DataError, "was altered"),
        (lambda d: d["shardlist"][0].update(url="../ecg.tar"), DataError, "names a shard outside its own folder"),
        (lambda d: d["shardlist"][0].update(url="/etc/passwd"), DataError, "names a shard outside its own folder"),
        (lambda d: d["shardlist"][0].update(url=".."), DataError, "names a shard outside its own folder"),
    ],
)
def test_open_set_raises_on_altered_index(
    make_set: Callable[..., ShardSet], tmp_path: Path, change: Edit, error: type[Exception], told: str
) -> None:
    make_set(str(tmp_path))
    edit(tmp_path, change)
    with pytest.raises(error, match=told):
        open_set(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "told"), [("{", "is not a JSON document"), ("[]", "is not a wids"), ("", "not a JSON")]
)
def test_open_set_raises_on_other_documents(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(UserError, match=told):
        open_set(str(tmp_path))


def test_open_set_raises_without_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no index\.json.*`physio-dist shard` makes one.*`physio-dist index"):
        open_set(str(tmp_path))


def test_fingerprint_depends_on_content_only(make_set: Callable[..., ShardSet], tmp_path: Path) -> None:
    a, b = make_set(str(tmp_path / "a")), make_set(str(tmp_path / "b"))
    assert a.fingerprint == b.fingerprint
    assert make_set(str(tmp_path / "c"), seed=1).fingerprint != a.fingerprint
    assert make_set(str(tmp_path / "d"), every=3).fingerprint != a.fingerprint
