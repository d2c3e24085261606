"""Simulated traffic of a node against a direct walk through the sample order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from physio_dist.data.loading import order
from physio_dist.data.loading.order import Mixture, mixture, node_slice, rank_slice
from physio_dist.planning.traffic import Traffic, node_traffic

SHARD = 48_000_000


def whole(order_: Mixture, sizes: np.ndarray, nodes: int, gpus: int, cache: float, epochs: int = 1) -> list[Traffic]:
    world, steps = nodes * gpus, epochs * order_.sets[0].steps_per_epoch
    slots = [node_slice(order_.batch, node * gpus, (node + 1) * gpus, world) for node in range(nodes)]
    return [node_traffic(order_, [sizes], 48_000, mine, cache, steps) for mine in slots]


@pytest.mark.parametrize("batch", [1024, 4096])
def test_thousand_ranks_fetch_ten_thousand_shards_about_once(batch: int) -> None:
    sizes = np.full(10_000, SHARD)
    run = mixture([np.full(10_000, 1000)], [1.0], ["set"], batch, 0)
    nodes = whole(run, sizes, 128, 8, 50e9, epochs=2)
    for epoch in (0, 1):
        assert sum(node.epochs[epoch] for node in nodes) <= 1.1 * sizes.sum()
    assert max(node.cache_needed for node in nodes) < 1e9
    assert sum(node.singles for node in nodes) == 0


def test_large_cache_fetches_each_shard_once_per_run() -> None:
    sizes = np.arange(40, 80) * 1000
    run = mixture([np.full(40, 50)], [1.0], ["set"], 16, 0)
    (node,) = whole(run, sizes, 1, 2, 1e9, epochs=3)
    assert node.epochs == (int(sizes.sum()), 0, 0)
    assert (node.shards, node.singles) == (40, 0)


def test_nodes_fetch_missing_shards_in_later_epochs() -> None:
    sizes = np.full(64, SHARD)
    run = mixture([np.full(64, 1000)], [1.0], ["set"], 128, 0)
    nodes = whole(run, sizes, 2, 4, 1e12, epochs=12)
    first = [sum(node.epochs[0] for node in nodes) / SHARD for node in nodes]
    assert 64 <= first[0] <= 66
    assert 0 < sum(node.epochs[1] for node in nodes) < 0.75 * 64 * SHARD
    assert sum(sum(node.epochs) for node in nodes) <= 2 * 64 * SHARD


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=3, max_size=40), st.integers(1, 12), st.data())
def test_traffic_matches_shards_visited_by_order(counts: list[int], batch: int, data: st.DataObject) -> None:
    batch = min(batch, sum(counts))
    world = data.draw(st.integers(1, batch), "world")
    rank = data.draw(st.integers(0, world - 1), "rank")
    sizes = np.arange(len(counts)) * 7 + 100
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW", 64)
        run = mixture([np.array(counts)], [1.0], ["set"], batch, 3)
        low, high = rank_slice(batch, rank, world)
        steps = run.sets[0].steps_per_epoch
        told = node_traffic(run, [sizes], 10, (low, high), 1e9, steps)
        visited = np.concatenate([run.take(step)[1][low:high] for step in range(steps)])
    touched = np.unique(np.searchsorted(np.cumsum(counts), visited, side="right"))
    # A shard of which a rank that shares its lane may need few samples is foreseen and perhaps not met.
    assert told.epochs[0] >= sizes[touched].sum()
    # Which samples an epoch leaves out is not foreseen.
    left = sum(counts) - steps * batch
    spared = [size for count, size in zip(counts, sizes.tolist(), strict=True) if count <= left]
    if world == 1:
        assert told.epochs[0] <= sizes[touched].sum() + sum(spared)


def test_small_cache_reads_single_samples_and_reports_needed_size() -> None:
    sizes = np.full(100, SHARD)
    run = mixture([np.full(100, 1000)], [1.0], ["set"], 128, 0)
    (node,) = whole(run, sizes, 1, 8, 20 * SHARD)
    assert node.singles > 10_000
    assert node.epochs[0] < 1.1 * sizes.sum()
    assert node.cache_needed > 50 * SHARD
    (roomy,) = whole(run, sizes, 1, 8, node.cache_needed)
    assert roomy.singles == 0
    assert roomy.epochs == (int(sizes.sum()),)


def test_cache_evicts_shard_needed_last(monkeypatch: pytest.MonkeyPatch) -> None:
    # One lane in blocks of two shards; a cache of half the set keeps what comes first in the next epoch.
    monkeypatch.setattr(order, "WINDOW", 20)
    sizes = np.full(20, 1000)
    run = mixture([np.full(20, 10)], [1.0], ["set"], 1, 0)
    (node,) = whole(run, sizes, 1, 1, 12_500, epochs=3)
    assert node.singles == 0
    assert node.epochs[0] == 20_000
    assert all(8_000 <= later < 18_000 for later in node.epochs[1:])
