"""Reading and checking of sample tables."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from physio_dist.data.format.index import ShardSet, fingerprint_of, open_set
from physio_dist.data.format.sample_table import key_table, publish, read_sample_table
from physio_dist.errors import DataError


def test_read_sample_table_raises_on_altered_or_missing_file(
    make_set: Callable[..., ShardSet], tmp_path: Path, flip_bit: Callable[[Path, int], None]
) -> None:
    made = make_set(str(tmp_path))
    where = tmp_path / "samples.safetensors"
    flip_bit(where, where.stat().st_size - 3)
    with pytest.raises(DataError, match=r"samples.safetensors disagrees with the index \(sha256\)"):
        read_sample_table(made)
    where.unlink()
    with pytest.raises(DataError, match=r"samples.safetensors is missing"):
        read_sample_table(made)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("split", lambda s: dataclasses.replace(s, split=s.split[:-1])),
        ("split", lambda s: dataclasses.replace(s, split=s.split.astype(np.int64))),
        ("splits", lambda s: dataclasses.replace(s, split=s.split * 0)),
        ("splits", lambda s: dataclasses.replace(s, split=s.split * 9)),
        ("people", lambda s: dataclasses.replace(s, person=s.person // 2)),
        ("person", lambda s: dataclasses.replace(s, person=s.person[:3])),
        ("offset.ecg", lambda s: dataclasses.replace(s, offset={"ecg": s.offset["ecg"] - 10**6})),
        ("offset.ecg", lambda s: dataclasses.replace(s, offset={"ecg": s.offset["ecg"] + 10**6})),
        ("offset.ecg", lambda s: dataclasses.replace(s, offset={})),
        ("valid.ecg", lambda s: dataclasses.replace(s, valid={"ecg": s.valid["ecg"][:, :1]})),
        ("key", lambda s: dataclasses.replace(s, key=s.key[:2])),
    ],
)
def test_read_sample_table_raises_on_contradiction_with_index(
    make_set: Callable[..., ShardSet], tmp_path: Path, name: str, change: Callable[[Any], Any]
) -> None:
    made = make_set(str(tmp_path))
    sample_table = change(read_sample_table(made))
    digest = hashlib.sha256(sample_table.to_bytes()).hexdigest()
    print_ = fingerprint_of(made.shards, made.signals, made.rate, digest)
    publish(dataclasses.replace(made, sample_table_sha256=digest, fingerprint=print_), sample_table)
    with pytest.raises(DataError, match=rf"contradicts the index: .*{name}"):
        read_sample_table(open_set(str(tmp_path)))


def test_read_sample_table_raises_on_damage_with_a_fitting_hash(
    make_set: Callable[..., ShardSet], tmp_path: Path
) -> None:
    made = make_set(str(tmp_path))
    (tmp_path / "samples.safetensors").write_bytes(b"\x80\x04nothing")
    altered = dataclasses.replace(made, sample_table_sha256=hashlib.sha256(b"\x80\x04nothing").hexdigest())
    with pytest.raises(DataError, match="is damaged"):
        read_sample_table(altered)


@given(st.lists(st.text("abcXYZ019_-", min_size=1, max_size=20), min_size=1, max_size=20))
def test_keys_survive_the_table(keys: list[str]) -> None:
    table = key_table(keys)
    assert [row.tobytes().rstrip(b"\0").decode() for row in table] == keys
