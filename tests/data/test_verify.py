"""Verification: every fault is named."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from physio_dist import storage
from physio_dist.data.format.index import ShardInfo, ShardSet, fingerprint_of, open_set
from physio_dist.data.format.sample_table import publish, read_sample_table
from physio_dist.data.verify import verify
from tests.data.conftest import signal_of
from tests.data.format.test_tar import BOMB, npy, packed

Make = Callable[..., ShardSet]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def replaced(shards: ShardSet, number: int, data: bytes) -> None:
    """Put other bytes in a shard's place and let the index vouch for them, as a faulty writer would."""
    name = shards.shards[number].url
    storage.write_bytes(shards.shard_url(number), data)
    infos = list(shards.shards)
    infos[number] = ShardInfo(name, infos[number].nsamples, len(data), hashlib.sha256(data).hexdigest())
    print_ = fingerprint_of(infos, shards.signals, shards.rate, shards.sample_table_sha256)
    publish(dataclasses.replace(shards, shards=tuple(infos), fingerprint=print_), read_sample_table(shards))


def shard(edit: Callable[[int, dict[str, bytes]], object], first: int = 5, size: int = 3) -> bytes:
    """The second shard of a built set, with its members edited: ``edit(sample, {name: bytes})``."""
    members: list[tuple[str, bytes]] = []
    for i in range(first, first + size):
        key = f"s0-{i:04d}"
        mine = {f"{key}.ecg.npy": npy(signal_of(i)), f"{key}.json": json.dumps({"labels": {"n": i % 2}}).encode()}
        edit(i, mine)
        members += mine.items()
    return packed(*members)


def test_verify_passes_clean_set(make_set: Make, tmp_path: Path, cli: Cli) -> None:
    make_set(str(tmp_path))
    assert list(verify(str(tmp_path))) == []
    done = cli("verify", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{tmp_path}: 12 samples in 3 shards, all as the index says\n"


def test_verify_names_each_damaged_file_with_status_3(
    make_set: Make, tmp_path: Path, flip_bit: Callable[[Path, int], None], cli: Cli
) -> None:
    make_set(str(tmp_path), sizes=(5, 3, 4, 2))
    flip_bit(tmp_path / "ecg-000000.tar", 700)
    os.truncate(tmp_path / "ecg-000001.tar", 1000)
    (tmp_path / "ecg-000002.tar").unlink()
    (tmp_path / "stray.tar").write_bytes(b"")
    done = cli("verify", tmp_path)
    assert done.returncode == 3
    assert done.stdout.splitlines() == [
        "stray.tar: lies beside the shards but is not in the index",
        "ecg-000000.tar: its sha256 disagrees with the index",
        "ecg-000001.tar: 1000 bytes, the index says 10240",
        "ecg-000001.tar: not a whole tar: unexpected end of data",
        "ecg-000002.tar: missing",
    ]
    assert done.stderr == f"physio-dist: data failed verification: {tmp_path}: 5 fault(s) (exit status 3)\n"


@pytest.mark.parametrize("name", ["samples.safetensors", "index.json"])
def test_verify_of_altered_index_or_sample_table_has_status_3(
    make_set: Make, tmp_path: Path, cli: Cli, name: str
) -> None:
    make_set(str(tmp_path))
    data = (tmp_path / name).read_bytes()
    altered = data.replace(b'"rate": 200.0', b'"rate": 250.0') if name == "index.json" else data[:-1] + b"?"
    assert altered != data
    (tmp_path / name).write_bytes(altered)
    done = cli("verify", tmp_path)
    assert done.returncode == 3
    assert name in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_of_missing_or_newer_set_has_status_2(make_set: Make, tmp_path: Path, cli: Cli) -> None:
    assert cli("verify", tmp_path / "nothing").returncode == 2
    make_set(str(tmp_path))
    where = tmp_path / "index.json"
    where.write_text(where.read_text().replace('"format": 2', '"format": 99'))
    done = cli("verify", tmp_path)
    assert done.returncode == 2
    assert "has format 99, this version of physio-dist reads format 2; upgrade physio-dist" in done.stderr


def put(name: str, data: bytes) -> Callable[[int, dict[str, bytes]], object]:
    """An edit that puts ``data`` into member ``name`` of sample 6."""
    return lambda i, mine: mine.update({f"s0-0006.{name}": data}) if i == 6 else None


def drop(name: str) -> Callable[[int, dict[str, bytes]], object]:
    return lambda i, mine: mine.pop(f"s0-0006.{name}") if i == 6 else None


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (put("ecg.npy", npy(signal_of(6).astype(np.int32))), "s0-0006: ecg is int32 (2, 64) instead of int16 (2, 64)"),
        (put("ecg.npy", npy(signal_of(6).astype(">i2"))), "s0-0006: ecg is >i2 (2, 64) instead of int16 (2, 64)"),
        (put("ecg.npy", npy(signal_of(6, length=32))), "s0-0006: ecg is int16 (2, 32) instead of int16 (2, 64)"),
        (drop("ecg.npy"), "s0-0006: ecg is no such array instead of int16 (2, 64)"),
        (drop("json"), "sample s0-0006 has no json"),
        (put("ecg.npy", BOMB), "holds pickled objects, which are never opened"),
        (put("json", b'{"simulated": true}'), "sample s0-0006 is simulated, which the index does not say"),
        (put("json", b"x" * 600), "is not JSON"),
        (lambda i, mine: mine.update({"../evil.json": b"{}"}), "'../evil.json' is not a plain file"),
        (lambda i, mine: mine.update({"/evil.json": b"{}"}), "'/evil.json' is not a plain file"),
        (lambda i, mine: mine.update({"zz.json": b"{}"}) if i == 7 else None, "holds 4 samples, or other keys, than"),
        (put("ecg.npy", npy(np.zeros((2, 64), np.int16))), "s0-0006 ecg lead I is constant but marked valid"),
        (
            put("ecg.npy", npy(np.where(np.arange(64) < 40, 32767, signal_of(6)).astype(np.int16))),
            "s0-0006 ecg lead I is at the end of the range but marked valid",
        ),
        (put("aaa.npy", npy(np.zeros(500, np.int16))), "s0-0007 stands elsewhere than the sample table says"),
    ],
)
def test_verify_names_faults_with_fitting_hash(
    make_set: Make, tmp_path: Path, edit: Callable[[int, dict[str, bytes]], object], told: str
) -> None:
    shards = make_set(str(tmp_path), sizes=(5, 3, 4))
    replaced(shards, 1, shard(edit))
    faults = list(verify(str(tmp_path)))
    assert any(told in fault for fault in faults), faults
    assert all(fault.startswith("ecg-000001.tar: ") for fault in faults), faults


def test_verify_names_repeated_keys(make_set: Make, tmp_path: Path) -> None:
    shards = make_set(str(tmp_path), sizes=(5, 3, 4))
    whole = shard(lambda i, mine: None)
    with tarfile.open(fileobj=io.BytesIO(whole)) as file:
        twice = [(info.name, file.extractfile(info).read()) for info in file]  # type: ignore[union-attr]
    replaced(shards, 1, packed(*twice, twice[0]))
    assert list(verify(str(tmp_path))) == ["ecg-000001.tar: member 's0-0005.ecg.npy' stands in it twice"]
    table = read_sample_table(open_set(str(tmp_path)))
    key = table.key.copy()
    key[11] = key[0]
    altered = dataclasses.replace(table, key=key)
    digest = hashlib.sha256(altered.to_bytes()).hexdigest()
    print_ = fingerprint_of(shards.shards, shards.signals, shards.rate, digest)
    publish(dataclasses.replace(shards, sample_table_sha256=digest, fingerprint=print_), altered)
    assert "key 's0-0000' stands in the set more than once" in list(verify(str(tmp_path)))


def test_verify_names_sample_with_another_checksum(make_set: Make, tmp_path: Path) -> None:
    shards = make_set(str(tmp_path / "set"))
    table = read_sample_table(shards)
    table.check["ecg"][5] ^= 1
    digest = hashlib.sha256(table.to_bytes()).hexdigest()
    fingerprint = fingerprint_of(shards.shards, shards.signals, shards.rate, digest)
    publish(dataclasses.replace(shards, sample_table_sha256=digest, fingerprint=fingerprint), table)
    assert list(verify(shards.url)) == [
        "ecg-000001.tar: sample s0-0005 ecg disagrees with its check in the sample table"
    ]
