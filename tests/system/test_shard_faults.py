"""Full disks, altered buckets and other faults around a shard set, seen from the command line."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import S3
from tests.tiers import require_root

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

WORDS = ["shard", "simulate", "people=40,windows=2,seed=9", "unusable=keep", "workers=2", "samples_per_shard=20"]


def one_line(done: subprocess.CompletedProcess[str], status: int) -> str:
    """The one line that a command said beside its progress, with its status."""
    assert done.returncode == status, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith(("reading: ", "writing: "))]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.fixture()
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a disk of a size, and changes it."""
    require_root()
    folder = tmp_path / "disk"

    def sized(size: str) -> Path:
        remount = "remount," if folder.exists() else ""
        folder.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"{remount}size={size}", "tmpfs", str(folder)], check=True)
        return folder

    yield sized
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture()
def in_bucket(s3: S3, cli: Cli, tmp_path: Path) -> Iterator[S3]:
    """A bucket with a set of four shards."""
    done = cli(*WORDS, "--out", s3.bucket, env={**s3.env, "XDG_CACHE_HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    yield s3


@pytest.mark.parametrize("size", ["1m", "4600k", "6m"])
def test_full_disk_is_named_and_conversion_resumes_with_space(disk: Callable[[str], Path], cli: Cli, size: str) -> None:
    # The parts take 4 MB, and so do the shards, written beside them and then put in place: the disk is full while
    # reading, while writing, and while putting in place.
    out = disk(size) / "set"
    told = one_line(cli(*WORDS, "--out", out), 2)
    assert str(out) in told
    assert "the disk is full; free some space and start again" in told
    assert not (out / "index.json").exists()
    disk("30m")
    done = cli(*WORDS, "--out", out)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"ecg-{n:06d}.tar" for n in range(4)), "index.json", "rejects.jsonl", "samples.safetensors",
    ]  # fmt: skip
    assert cli("verify", out).returncode == 0


def test_full_spool_disk_is_named_for_bucket_target(disk: Callable[[str], Path], s3: S3, cli: Cli) -> None:
    told = one_line(cli(*WORDS, "--out", s3.bucket, env={**s3.env, "XDG_CACHE_HOME": str(disk("1m"))}), 2)
    assert "/disk/physio-dist/convert/" in told
    assert "the disk is full" in told


def test_read_only_target_is_refused_before_reading(disk: Callable[[str], Path], cli: Cli) -> None:
    folder = disk("1m")
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    done = cli(*WORDS, "--out", folder / "set")
    assert "cannot write" in one_line(done, 2)
    assert "Read-only file system" in done.stderr
    assert "reading:" not in done.stderr


def test_file_as_target_is_refused(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    assert f"cannot write {tmp_path}/file/_writing.json" in one_line(cli(*WORDS, "--out", tmp_path / "file"), 2)
    assert (tmp_path / "file").read_bytes() == b"kept"


def test_unreachable_bucket_is_refused_before_reading(s3: S3, cli: Cli, tmp_path: Path) -> None:
    env = {**s3.env, "XDG_CACHE_HOME": str(tmp_path), "PHYSIO_DIST_STORAGE_FIRST_CONTACT_S": "1"}
    for change, told in (
        ({"AWS_SECRET_ACCESS_KEY": "wrong"}, "check the credentials"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "check AWS_ENDPOINT_URL and that the server is up"),
    ):
        done = cli(*WORDS, "--out", s3.bucket, env={**env, **change})
        assert told in one_line(done, 2)
        assert "reading:" not in done.stderr
        assert S3.secret not in done.stderr
    done = cli(*WORDS, "--out", "s3://nobucket/x", env=env)
    assert "there is no bucket 'nobucket'" in one_line(done, 2)


def test_verify_names_faulty_shards_in_bucket_with_status_3(in_bucket: S3, cli: Cli) -> None:
    clean = cli("verify", in_bucket.bucket, env=in_bucket.env)
    assert (clean.returncode, clean.stderr) == (0, "")
    flipped = in_bucket.folder / "ecg-000000.tar"
    data = bytearray(flipped.read_bytes())
    data[5000] ^= 1
    flipped.write_bytes(data)
    os.truncate(in_bucket.folder / "ecg-000001.tar", 3000)
    (in_bucket.folder / "ecg-000002.tar").unlink()
    done = cli("verify", in_bucket.bucket, env=in_bucket.env)
    assert done.returncode == 3
    told = done.stdout.splitlines()
    assert "ecg-000000.tar: its sha256 disagrees with the index" in told
    assert any(line.startswith("ecg-000001.tar: 3000 bytes, the index says") for line in told)
    assert "ecg-000002.tar: missing" in told
    assert not any("ecg-000003" in line for line in told)


def test_inspect_plots_bucket_set(in_bucket: S3, cli: Cli) -> None:
    done = cli("inspect", in_bucket.bucket, "--plot", 2, in_bucket.bucket + "/plots/two.png", env=in_bucket.env)
    assert done.returncode == 0, done.stderr
    assert "SIMULATED signals" in done.stdout
    assert (in_bucket.folder / "plots" / "two.png").read_bytes().startswith(b"\x89PNG")


def test_index_of_existing_webdataset_in_bucket(s3: S3, cli: Cli, tmp_path: Path) -> None:
    import numpy as np
    import webdataset

    with webdataset.TarWriter(str(s3.folder / "theirs.tar")) as out:
        for i in range(5):
            values = np.random.default_rng(i).integers(-99, 99, (2, 400)).astype(np.int16)
            out.write({"__key__": f"k{i}", "ecg.npy": values, "json": {"person": i // 2}})
    done = cli("index", s3.bucket, "channels=I,II", env=s3.env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("5 samples of 3 people in 1 shards")
    assert cli("verify", s3.bucket, env=s3.env).returncode == 0
