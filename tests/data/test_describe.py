"""Summaries and drawings of a shard set, as `inspect` prints them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from physio_dist.data import describe
from physio_dist.data.format.index import ShardSet
from physio_dist.errors import DataError
from tests.data.conftest import signal_of

Make = Callable[..., ShardSet]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def test_inspect_tells_what_a_set_holds(make_set: Make, tmp_path: Path) -> None:
    shards = make_set(str(tmp_path), sizes=(5, 3, 4))
    told = "\n".join(describe.describe(str(tmp_path)))
    for words in (
        "12 windows of 6 people in 3 shards", shards.fingerprint, "train: 9 windows of 6 people",
        "val: 3 windows of 3 people", "test: 0 windows of 0 people", "2 channels x 64 samples at 200 Hz (0.32 s), 2 uV",
        "I 100.0%, II 66.7%", "labels in all windows:", "n: 0 x 6, 1 x 6",
    ):  # fmt: skip
        assert words in told
    make_set(str(tmp_path / "many"), sizes=(2,) * 6)
    assert "labels in the first 8 windows:" in "\n".join(describe.describe(str(tmp_path / "many")))


def test_inspect_draws_windows_spread_over_the_set(make_set: Make, tmp_path: Path, cli: Cli) -> None:
    shards = make_set(str(tmp_path / "set"), sizes=(5, 3, 4))
    _, drawn = describe.some_windows(shards.url, 3)
    assert drawn["ecg"].keys == ["s0-0000", "s0-0005", "s0-0011"]
    np.testing.assert_array_equal(drawn["ecg"].signal[1], signal_of(5) * 2.0)
    assert len(describe.some_windows(shards.url, 99)[1]["ecg"].keys) == 12
    done = cli("inspect", shards.url, "--plot", 2, tmp_path / "out.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    for count in ("0", "-1", "x", "1.5"):
        assert cli("inspect", shards.url, "--plot", count, tmp_path / "no.png").returncode == 2
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize("fault", ["missing", "truncated"])
def test_inspect_of_a_damaged_set_names_the_shard_with_status_3(
    make_set: Make, tmp_path: Path, cli: Cli, fault: str
) -> None:
    make_set(str(tmp_path), sizes=(5, 3))
    where = tmp_path / "ecg-000001.tar"
    where.unlink() if fault == "missing" else os.truncate(where, 600)
    for words in ([], ["--plot", "12", str(tmp_path / "x.png")]):
        done = cli("inspect", tmp_path, *words)
        assert done.returncode == 3
        assert "ecg-000001.tar" in done.stderr
        assert "Traceback" not in done.stderr
    with pytest.raises(DataError, match=r"ecg-000001\.tar"):
        describe.some_windows(str(tmp_path), 12)
