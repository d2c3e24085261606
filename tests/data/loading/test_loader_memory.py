"""What a rank holds in memory does not grow with time, nor with the number of shards."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.conftest import build

pytestmark = pytest.mark.integration

CHANNELS, SAMPLES = 12, 2000
CODE = """
import re, sys
from pathlib import Path
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.handle import open_dataset
from physio_dist.data.loading.loader import LoaderPlan, PrefetchLoader

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) / 1024

source = open_dataset([(sys.argv[1], 1.0)], "ecg", ShardCache(sys.argv[2], 1e9))
order = source.order("train", 64, 0)
epoch = order.sets[0].steps_per_epoch
with PrefetchLoader(source, LoaderPlan(order, "train", 64, 0, 20 * epoch), lambda batch: batch) as feed:
    for batch in feed:
        batch.release()
        if (batch.step + 1) % epoch == 0:
            print(anonymous(), flush=True)
"""


def held(url: str, cache: Path) -> list[float]:
    """Anonymous memory in MB after each of 20 epochs."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, url, str(cache)], capture_output=True, text=True, timeout=300, check=True
    )
    return [float(line) for line in done.stdout.split()]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_loader_memory_is_constant_over_epochs_and_shards(
    where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    base = str(tmp_path) if where == "local" else request.getfixturevalue("s3_here").bucket
    told = []
    for shards in (1, 50):
        # 120 samples of 48 kB a shard: 50 of them take three times the limit.
        url = f"{base}/set{shards}"
        build(url, sizes=(120,) * shards, length=SAMPLES, every=10**6, channels=CHANNELS)
        told.append(held(url, tmp_path / f"cache{shards}"))
    for epochs in told:
        assert len(epochs) == 20
        assert max(epochs) - min(epochs) < 100
    assert abs(told[1][-1] - told[0][-1]) < 100
