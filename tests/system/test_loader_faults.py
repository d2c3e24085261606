"""Whole runs whose shards come through a faulty network or lie in a damaged cache.

The set has two samples a shard and the cache room for a tenth of it, so that a run fetches up to its end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from physio_dist.data.format.index import SPLITS, ShardSet, open_set
from physio_dist.data.format.sample_table import read_sample_table
from tests.conftest import Proxied
from tests.system.launching import Run, end_session, physio
from tests.system.test_bad_input import told

Start = Callable[..., tuple[Run, "subprocess.Popen[bytes]"]]

# Four epochs.
STEPS = ("train.steps=40", "train.save_every=100")
SMALL_CACHE = "data.cache_gb=0.001"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A set of 90 shards of 100 kB."""
    out = str(tmp_path_factory.mktemp("pairs") / "set")
    done = physio("shard", "simulate", "people=30,windows=6,seed=3", "--out", out, "samples_per_shard=2")
    assert done.returncode == 0, done.stderr
    return open_set(out)


@pytest.fixture(scope="module")
def reference(pairs: ShardSet, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run on the local set, which nothing disturbed."""
    run = Run(tmp_path_factory.mktemp("reference"), "run", pairs.url, STEPS)
    assert run() == 0, run.said()
    return run


@pytest.fixture()
def run(pairs: ShardSet, proxied: Proxied, tmp_path: Path) -> Run:
    """A run that reads the same set out of the bucket, through the proxy."""
    shutil.copytree(pairs.url, proxied.folder / "set")
    return Run(tmp_path, "run", f"{proxied.bucket}/set", (*STEPS, SMALL_CACHE), proxied.env)


def same(run: Run, reference: Run) -> None:
    """Trained on the same samples, with the same bytes in them."""
    assert run.trace() == reference.trace()
    ours, theirs = run.metrics(), reference.metrics()
    assert [line["loss"] for line in ours.values()] == [line["loss"] for line in theirs.values()]


def trained_shards(shards: ShardSet) -> list[int]:
    """Shards with nothing but samples to train on."""
    ours = np.split(read_sample_table(shards).split, shards.shard_starts()[1:-1])
    return [number for number, split in enumerate(ours) if (split == SPLITS.index("train")).all()]


def test_transient_storage_faults_change_no_loss(run: Run, proxied: Proxied, reference: Run) -> None:
    """One silence is as long as the client waits for a byte, and longer."""
    inject = proxied.proxy.inject
    rules = [inject("stall", times=1, stall_s=5.0), inject("stall", times=1, stall_s=35.0)]
    rules += [inject(fault, times=times) for fault, times in ((503, 8), ("reset", 4), (429, 4), ("short", 4))]
    # Of any shard: one that is named may be in the cache already when the other faults have had their turn.
    rules += [inject("flip", times=3)]
    process = run.start()
    try:
        run.wait_for_step(process, 10)
        rules += [inject(fault, times=4) for fault in (503, "reset", 429, "short")]
        assert process.wait(timeout=150) == 0, run.said()
    finally:
        end_session(process)
    for rule in rules:
        assert rule.met == rule.times, rule
    same(run, reference)


def test_run_survives_server_down_for_20_s(run: Run, proxied: Proxied, reference: Run) -> None:
    process = run.start()
    try:
        run.wait_for_step(process, 10)
        proxied.server.stop()
        before = len(proxied.proxy.seen)
        time.sleep(20)
        assert process.poll() is None, run.said()
        assert any(seen.path.endswith(".tar") for seen in proxied.proxy.seen[before:]), "nothing was asked for"
        proxied.server.start()
        assert process.wait(timeout=120) == 0, run.said()
    finally:
        end_session(process)
    same(run, reference)


def test_revoked_credentials_end_run_and_name_shard(run: Run, proxied: Proxied) -> None:
    process = run.start(launcher="deepspeed")
    try:
        run.wait_for_step(process, 10)
        proxied.proxy.inject(403, "")
        assert process.wait(timeout=60) == 2, run.said()
    finally:
        end_session(process)
    assert not run.ranks()
    told(run, 2, f"{run.index}/ecg-0", "access denied", "AWS_SECRET_ACCESS_KEY")


def test_missing_shard_ends_run_and_is_named(run: Run, proxied: Proxied, pairs: ShardSet) -> None:
    process = run.start(launcher="deepspeed")
    try:
        run.wait_for_step(process, 10)
        # All of them, because a single one may stay in the cache to the end.
        for number in trained_shards(pairs):
            (proxied.folder / "set" / pairs.shards[number].url).unlink()
        assert process.wait(timeout=60) == 3, run.said()
    finally:
        end_session(process)
    assert not run.ranks()
    told(run, 3, f"{run.index}/ecg-0", "not in storage")


def test_damaged_cached_shards_are_fetched_again(run: Run, proxied: Proxied, pairs: ShardSet, reference: Run) -> None:
    run.options = STEPS
    cut, flipped = trained_shards(pairs)[:2]
    files = {n: run.folder / "cache" / "shards" / f"{pairs.shards[n].sha256}.tar" for n in (cut, flipped)}
    process = run.start()
    try:
        # More than an epoch: all shards are there, and are needed again.
        run.wait_for_step(process, 12)
        os.truncate(files[cut], 1000)
        with files[flipped].open("r+b") as file:
            for sample in range(*pairs.shard_starts()[flipped : flipped + 2]):
                place = int(read_sample_table(pairs).offset["ecg"][sample]) + 2001
                file.seek(place)
                (byte,) = file.read(1)
                file.seek(place)
                file.write(bytes([byte ^ 0x40]))
        assert process.wait(timeout=120) == 0, run.said()
    finally:
        end_session(process)
    same(run, reference)
    for number in (cut, flipped):
        assert proxied.proxy.sent()[pairs.shards[number].url] > pairs.shards[number].filesize
