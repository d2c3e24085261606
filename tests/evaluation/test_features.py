"""Frozen features: computed once, verified when opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from physio_dist import storage
from physio_dist.data.format.index import ShardSet, SignalInfo
from physio_dist.errors import DataError, UserError
from physio_dist.evaluation import features
from physio_dist.evaluation.backbones import Backbone, open_backbone, untrained
from physio_dist.evaluation.features import check_fits, embed, open_features
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder, preset
from physio_dist.models.export import load_encoder, save_encoder
from tests.conftest import S3, Web
from tests.data.conftest import build, flip, signal_of
from tests.evaluation.study_samples import opened

LENGTH = 600
PATCHES = 3


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An export's folder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    about = {"signal": "ecg", "channels": ["I", "II"], "rate": 200.0, "unit_uv": 100.0, "simulated": False}
    for name, data in save_encoder(CrissCrossEncoder(preset("tiny")), about).items():
        (folder / name).write_bytes(data)
    return str(folder)


@pytest.fixture()
def backbone(encoder: str) -> Backbone:
    return open_backbone(encoder, "ecg")


@pytest.fixture()
def shards(tmp_path: Path) -> ShardSet:
    """Twelve windows of two channels in three shards, some with an invalid channel, in two splits."""
    return build(str(tmp_path / "set"), length=LENGTH)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of the test's own, and one thread: small windows make many wait for each other."""
    monkeypatch.setattr(features.processes, "cores", lambda: 1)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))


def made(backbone: Backbone, shards: ShardSet, out: str) -> list[str]:
    said: list[str] = []
    embed(backbone, opened(shards.url), out, said.append)
    return said


def by_hand(encoder: str, windows: range) -> np.ndarray:
    """Features of windows of `build`, one by one: 2 uV a bit, units of 100 uV, channel 1 off in each third."""
    module, rows = load_encoder(encoder), []
    for i in windows:
        x = torch.from_numpy(signal_of(i, length=LENGTH).astype(np.float32) * 0.02).view(1, 2, PATCHES, 200)
        valid = torch.tensor([[[True] * PATCHES, [i % 3 > 0] * PATCHES]])
        with torch.no_grad():
            rows.append(module(x, valid=valid)[0].numpy())
    return np.stack(rows)


def test_features_are_the_encoders_and_stand_in_storage_order(
    backbone: Backbone, encoder: str, shards: ShardSet, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    said = made(backbone, shards, out)
    assert said == [f"features [2, 3, 80] of 12 ecg windows -> {out}"]
    opened = open_features(out)
    known = by_hand(encoder, range(12))
    assert opened.values.shape == (12, 2, PATCHES, 80)
    assert opened.values.dtype == np.float32
    np.testing.assert_allclose(opened.values, known, atol=2e-5)
    assert (opened.values[0, 1] == 0).all()
    assert (np.abs(known).max(axis=(1, 2, 3)) > 0.1).all()
    assert opened.valid.dtype == np.bool_
    assert opened.valid.tolist() == [[True, i % 3 > 0] for i in range(12)]
    assert opened.keys == [f"s0-{i:04d}" for i in range(12)]
    assert (opened.signal, opened.encoder_sha256, opened.fingerprint) == ("ecg", backbone.sha256, shards.fingerprint)


def test_a_batch_by_hand_gives_the_same_bits(
    backbone: Backbone, encoder: str, shards: ShardSet, tmp_path: Path
) -> None:
    made(backbone, shards, str(tmp_path / "out"))
    x = np.stack([signal_of(i, length=LENGTH) for i in range(12)]).astype(np.float32) * np.float32(0.02)
    valid = torch.tensor([[True, i % 3 > 0] for i in range(12)])[:, :, None].expand(12, 2, PATCHES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        known = load_encoder(encoder)(torch.from_numpy(x).view(12, 2, PATCHES, 200), valid=valid).numpy()
    torch.set_num_threads(threads)
    assert np.array_equal(open_features(str(tmp_path / "out")).values, known)


def test_the_index_tells_what_is_there(backbone: Backbone, shards: ShardSet, tmp_path: Path) -> None:
    made(backbone, shards, str(tmp_path / "out"))
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    data = (tmp_path / "out" / "features-00000.safetensors").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert index == {
        "format": 1,
        "kind": "physio-dist-features",
        "encoder_sha256": backbone.sha256,
        "encoder": backbone.module.config.to_dict(),
        "fingerprint": shards.fingerprint,
        "signal": "ecg",
        "channels": ["I", "II"],
        "shape": [2, PATCHES, 80],
        "dtype": "float32",
        "windows": 12,
        "simulated": False,
        "files": [{"file": "features-00000.safetensors", "windows": 12, "sha256": digest, "bytes": len(data)}],
        "keys": [f"s0-{i:04d}" for i in range(12)],
    }
    tensors = safetensors.numpy.load(data)
    assert {name: (value.shape, value.dtype) for name, value in tensors.items()} == {
        "values": ((12, 2, PATCHES, 80), np.float32), "valid": ((12, 2), np.bool_),
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["features-00000.safetensors", "index.json"]


def test_the_same_again_is_the_same_bytes_and_the_batch_size_does_not_count(
    backbone: Backbone, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        made(backbone, shards, str(tmp_path / name))
    for name in ("index.json", "features-00000.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    whole = open_features(str(tmp_path / "a"))
    for number, patches in enumerate((1, 5 * 2 * PATCHES, 12 * 2 * PATCHES)):
        monkeypatch.setattr(features, "_CPU_PATCHES", patches)
        made(backbone, shards, str(tmp_path / f"{number}"))
        other = open_features(str(tmp_path / f"{number}"))
        np.testing.assert_allclose(other.values, whole.values, atol=2e-5)
        assert np.array_equal(other.valid, whole.valid)


@pytest.mark.parametrize(("per_file", "per_batch"), [(5, 2), (5, 12), (4, 3), (1, 1), (12, 5)])
def test_many_windows_make_several_files(
    backbone: Backbone, encoder: str, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    per_file: int, per_batch: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(features, "_FILE_BYTES", per_file * (2 * PATCHES * 80 * 4 + 2))
    monkeypatch.setattr(features, "_CPU_PATCHES", per_batch * 2 * PATCHES)
    out = tmp_path / "out"
    made(backbone, shards, str(out))
    index = json.loads((out / "index.json").read_text())
    count = -(-12 // per_file)
    assert [file["file"] for file in index["files"]] == [f"features-{n:05d}.safetensors" for n in range(count)]
    assert [file["windows"] for file in index["files"]] == [min(per_file, 12 - n * per_file) for n in range(count)]
    opened = open_features(str(out))
    np.testing.assert_allclose(opened.values, by_hand(encoder, range(12)), atol=2e-5)
    assert opened.valid.tolist() == [[True, i % 3 > 0] for i in range(12)]
    assert isinstance(opened.values, np.memmap) == (count == 1)
    with pytest.raises(ValueError, match="read-only"):
        opened.values[0, 0, 0, 0] = 1


def test_the_threads_of_the_process_are_left_as_they_were(
    backbone: Backbone, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = features._forward
    monkeypatch.setattr(features, "_forward", lambda *a: (seen.append(torch.get_num_threads()), real(*a))[1])
    monkeypatch.setattr(features.processes, "cores", lambda: 3)
    before = torch.get_num_threads()
    made(backbone, shards, str(tmp_path / "out"))
    assert set(seen) == {3}
    assert torch.get_num_threads() == before
    assert not any(parameter.is_inference() for parameter in backbone.module.parameters())


def test_what_is_there_is_left_alone(backbone: Backbone, shards: ShardSet, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made(backbone, shards, str(out))
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert made(backbone, shards, str(out)) == [f"features of 12 windows are there already: {out}"]
    # The same windows elsewhere are the same set.
    assert made(backbone, build(str(tmp_path / "copy"), length=LENGTH), str(out))[0].endswith(f"already: {out}")
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_features_of_something_else_are_not_overwritten(backbone: Backbone, shards: ShardSet, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    made(backbone, shards, out)
    before = (tmp_path / "out" / "index.json").read_bytes()
    fresh = untrained(backbone, 0)
    told = f"{out} holds features of encoder {backbone.sha256[:12]} on .* not of encoder {fresh.sha256[:12]} on "
    with pytest.raises(UserError, match=told):
        made(fresh, shards, out)
    other = build(str(tmp_path / "other"), seed=1, length=LENGTH)
    told = f"set {shards.fingerprint[:12]}, not of .* set {other.fingerprint[:12]}; choose another folder "
    told += r"\(--out, or tune\.feature_cache, or probe\.feature_cache\)"
    with pytest.raises(UserError, match=told):
        made(backbone, other, out)
    with pytest.raises(UserError, match=r"set/index\.json is not an index of features; choose another folder"):
        made(backbone, shards, shards.url)
    assert (tmp_path / "out" / "index.json").read_bytes() == before


def test_what_was_interrupted_is_made_again_and_leaves_nothing_behind(
    backbone: Backbone, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for number in range(3):
        (out / f"features-{number:05d}.safetensors").write_bytes(b"of an earlier try")
    (out / "mine.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"out holds no index\.json: there are no finished features"):
        open_features(str(out))
    monkeypatch.setattr(features, "_FILE_BYTES", 6 * (2 * PATCHES * 80 * 4 + 2))
    made(backbone, shards, str(out))
    whole = np.array(open_features(str(out)).values)
    names = ["features-00000.safetensors", "features-00001.safetensors", "index.json", "mine.safetensors"]
    assert sorted(path.name for path in out.iterdir()) == names
    (out / "features-00001.safetensors").unlink()
    assert made(backbone, shards, str(out)) == [f"features [2, 3, 80] of 12 ecg windows -> {out}"]
    assert np.array_equal(open_features(str(out)).values, whole)
    # Made again after a loss, they are not there until they are whole.
    (out / "features-00000.safetensors").unlink()
    flip(tmp_path / "set" / "ecg-000002.tar", 2000)
    with pytest.raises(DataError, match=r"ecg-000002\.tar"):
        made(backbone, shards, str(out))
    with pytest.raises(UserError, match="there are no finished features"):
        open_features(str(out))


def test_a_failure_leaves_no_index(backbone: Backbone, shards: ShardSet, tmp_path: Path, tiny_disk: Path) -> None:
    (tiny_disk / "other").write_bytes(bytes(50_000))
    with pytest.raises(UserError, match=r"features-00000\.safetensors: the disk is full"):
        made(backbone, shards, str(tiny_disk / "out"))
    assert not (tiny_disk / "out" / "index.json").exists()


def test_a_damaged_shard_is_named_and_nothing_is_published(
    backbone: Backbone, shards: ShardSet, tmp_path: Path
) -> None:
    flip(tmp_path / "set" / "ecg-000001.tar", 2000)
    with pytest.raises(DataError, match=r"ecg-000001\.tar disagrees with its index"):
        made(backbone, shards, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "index.json").exists()


def test_features_that_are_no_numbers_are_refused(
    backbone: Backbone, shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_CPU_PATCHES", 5 * 2 * PATCHES)
    monkeypatch.setattr(features, "_FILE_BYTES", 8 * (2 * PATCHES * 80 * 4 + 2))
    real, calls = features._forward, iter(range(99))

    def broken(*given: Any) -> Any:
        values = real(*given)
        if next(calls) == 2:
            values[1, 0, 0, 0] = np.inf
        return values

    monkeypatch.setattr(features, "_forward", broken)
    with pytest.raises(UserError, match="gives features of window s0-0009 that are no numbers"):
        made(backbone, shards, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "index.json").exists()


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def act(out: Path) -> None:
        index = json.loads((out / "index.json").read_text())
        change(index)
        (out / "index.json").write_text(json.dumps(index))

    return act


def swapped(out: Path) -> None:
    """A whole file of another shape, its hash in the index."""
    data = safetensors.numpy.save({"values": np.zeros((12, 2), np.float32), "valid": np.zeros((12, 2), np.bool_)})
    (out / "features-00000.safetensors").write_bytes(data)
    rewritten(lambda index: index["files"][0].update(sha256=hashlib.sha256(data).hexdigest()))(out)


@pytest.mark.parametrize(
    ("act", "told"),
    [
        (lambda out: flip(out / "features-00000.safetensors", -5), r"features-00000\.safetensors disagrees with"),
        (lambda out: os.truncate(out / "features-00000.safetensors", 999), r"00000\.safetensors disagrees with"),
        (lambda out: os.truncate(out / "features-00000.safetensors", 0), r"00000\.safetensors disagrees with"),
        (lambda out: (out / "features-00000.safetensors").unlink(), r"00000\.safetensors is in index\.json but not"),
        (swapped, r"features-00000\.safetensors is not of the shape that index\.json tells"),
        (rewritten(lambda index: index.pop("keys")), r"index\.json is damaged"),
        (rewritten(lambda index: index["keys"].pop()), r"index\.json is damaged"),
        (rewritten(lambda index: index.update(windows=11)), r"index\.json is damaged"),
        (rewritten(lambda index: index.update(shape=[2, 240])), r"index\.json is damaged"),
        (rewritten(lambda index: index.update(files="x")), r"index\.json is damaged"),
        (rewritten(lambda index: index["files"][0].update(file="../x/features-00000.safetensors")), "is damaged"),
        (rewritten(lambda index: index["files"][0].pop("sha256")), "is damaged"),
        (rewritten(lambda index: index.update(encoder_sha256=None)), "is damaged"),
    ],
)
def test_damaged_features_are_named(
    backbone: Backbone, shards: ShardSet, tmp_path: Path, act: Callable[[Path], None], told: str
) -> None:
    made(backbone, shards, str(tmp_path / "out"))
    act(tmp_path / "out")
    with pytest.raises(DataError, match=f"{tmp_path}/out/.*{told}.*`physio-dist embed` again"):
        open_features(str(tmp_path / "out"))


def test_an_index_of_a_later_version_is_refused(backbone: Backbone, shards: ShardSet, tmp_path: Path) -> None:
    made(backbone, shards, str(tmp_path / "out"))
    rewritten(lambda index: index.update(format=2))(tmp_path / "out")
    for act in (lambda: open_features(str(tmp_path / "out")), lambda: made(backbone, shards, str(tmp_path / "out"))):
        with pytest.raises(UserError, match="has format 2, this version reads format 1; upgrade it"):
            act()


def test_features_in_a_bucket_are_fetched_once_and_verified(
    backbone: Backbone, encoder: str, shards: ShardSet, s3_here: S3, tmp_path: Path
) -> None:
    out = f"{s3_here.bucket}/deep/features"
    made(backbone, shards, out)
    first = open_features(out)
    np.testing.assert_allclose(first.values, by_hand(encoder, range(12)), atol=2e-5)
    assert isinstance(first.values, np.memmap)
    assert made(backbone, shards, out)[0].endswith("already: " + out)
    (kept,) = (tmp_path / "xdg" / "physio-dist" / "features").glob("*[!k]")
    # It is read from the cache from now on, for the bucket's is gone.
    stored = s3_here.folder / "deep" / "features" / "features-00000.safetensors"
    data = stored.read_bytes()
    assert kept.name == hashlib.sha256(data).hexdigest()
    stored.unlink()
    assert np.array_equal(open_features(out).values, first.values)
    flip(kept, -1)
    with pytest.raises(DataError, match=r"features-00000\.safetensors is in index\.json but not there"):
        open_features(out)
    stored.write_bytes(data)
    assert np.array_equal(open_features(out).values, first.values)
    assert kept.read_bytes() == data
    kept.unlink()
    flip(stored, -1)
    with pytest.raises(DataError, match=r"features-00000\.safetensors disagrees with index\.json"):
        open_features(out)
    assert not kept.exists()


def test_shards_and_encoder_may_lie_on_a_web_server(
    backbone: Backbone, encoder: str, shards: ShardSet, web: Web, tmp_path: Path
) -> None:
    (web.folder / "set").symlink_to(tmp_path / "set")
    (web.folder / "encoder").symlink_to(encoder)
    there = open_backbone(f"{web.url}/encoder", "ecg")
    assert there.sha256 == backbone.sha256
    said: list[str] = []
    embed(there, opened(f"{web.url}/set/index.json"), str(tmp_path / "out"), said.append)
    np.testing.assert_allclose(open_features(str(tmp_path / "out")).values, by_hand(encoder, range(12)), atol=2e-5)


@pytest.mark.parametrize(
    ("encoder_is", "shards_are", "told"),
    [
        ({"signal": "eeg"}, {}, "holds no eeg signal; it has: ecg. Convert the recordings with signals=eeg"),
        ({}, {"rate": 250.0}, r"sampled at 250 Hz and .* trained at 200 Hz; convert .* window.rate=200"),
        ({"rate": 100.0}, {}, r"sampled at 200 Hz and .* trained at 100 Hz; convert .* window.rate=100"),
        ({}, {"samples": 550}, r"windows of 550 samples and .* whole patches of 200; .*seconds a multiple of 1"),
        ({}, {"samples": 0}, "windows of 0 samples"),
        ({"unit_uv": 1.0}, {}, r"trained in units of 1 uV, and signals of .*\(2 uV per bit\).* units of 100 uV"),
        ({}, {"uv_per_bit": 0.0}, r"\(0 uV per bit\)"),
        ({}, {"uv_per_bit": float("inf")}, r"\(inf uV per bit\)"),
    ],
)
def test_encoders_and_shards_that_disagree_are_refused(
    backbone: Backbone, shards: ShardSet, encoder_is: dict[str, Any], shards_are: dict[str, Any], told: str
) -> None:
    check_fits(backbone, shards)
    check_fits(backbone, replace(shards, signals={"ecg": SignalInfo(("other",) * 7, LENGTH, 0.1)}))
    info = replace(shards.signals["ecg"], **{k: v for k, v in shards_are.items() if k != "rate"})
    other = replace(shards, signals={"ecg": info}, rate=shards_are.get("rate", shards.rate))
    with pytest.raises(UserError, match=told) as caught:
        check_fits(replace(backbone, **encoder_is), other)
    assert shards.url in str(caught.value)


def test_embedding_checks_the_fit_before_it_writes(backbone: Backbone, tmp_path: Path) -> None:
    short = build(str(tmp_path / "short"), length=64)
    with pytest.raises(UserError, match="windows of 64 samples"):
        made(backbone, short, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"holds no index\.json"):
        embed(backbone, opened(str(tmp_path / "none")), str(tmp_path / "out"), print)


def test_kept_features_survive_a_cache_that_cannot_be_written(
    backbone: Backbone, shards: ShardSet, s3_here: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(backbone, shards, f"{s3_here.bucket}/f")
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(storage.StorageError, match=f"{tmp_path}/file/physio-dist.*: Not a directory"):
        open_features(f"{s3_here.bucket}/f")
