"""The order of samples: for every world size, from every step, for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from physio_dist.data.loading import order
from physio_dist.data.loading.order import Mixture, SetOrder, mixture, rank_slice, shares
from physio_dist.errors import UserError
from physio_dist.runtime.seeding import permutation

WORLDS = (1, 2, 3, 4, 7, 8, 64, 1016, 1024)
BATCHES = (1, 2, 7, 8, 13, 64, 97, 128, 131, 300, 1024, 2048, 4103)

counts_of = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda counts: sum(counts) > 0)


def one(counts: list[int], batch: int, seed: int = 0, name: str = "set") -> Mixture:
    return mixture([np.array(counts)], [1.0], [name], batch, seed)


@pytest.mark.parametrize("batch", BATCHES)
def test_ranks_of_every_world_share_the_batch_exactly(batch: int) -> None:
    for world in (world for world in WORLDS if world <= batch):
        slices = [rank_slice(batch, rank, world) for rank in range(world)]
        assert [place for low, high in slices for place in range(low, high)] == list(range(batch))
        sizes = {high - low for low, high in slices}
        assert max(sizes) - min(sizes) <= 1


def test_rank_slice_raises_on_more_ranks_than_samples() -> None:
    with pytest.raises(UserError, match="8 ranks cannot share a global batch of 7: use at most 7 ranks"):
        rank_slice(7, 0, 8)


@settings(max_examples=150, deadline=None)
@given(counts_of, st.data(), st.integers(0, 2**40))
def test_an_epoch_visits_every_sample_once_but_a_remainder(counts: list[int], data: st.DataObject, seed: int) -> None:
    total = sum(counts)
    batch = data.draw(st.integers(1, total))
    sets = one(counts, batch, seed).sets[0]
    for epoch in (0, 1, 5):
        first = epoch * sets.steps_per_epoch
        visited = np.concatenate([sets.take(first + i) for i in range(sets.steps_per_epoch)])
        assert len(np.unique(visited)) == len(visited)
        assert 0 <= total - len(visited) < batch
        assert visited.min() >= 0
        assert visited.max() < total


@pytest.mark.parametrize(("total", "batch"), [(10_000, 128), (10_007, 97), (9000, 300), (131, 131), (20_000, 2)])
def test_large_epochs_are_whole_with_few_and_with_many_samples_a_lane(total: int, batch: int) -> None:
    counts = [total // 7] * 6 + [total - 6 * (total // 7)]
    sets = one(counts, batch).sets[0]
    visited = np.concatenate([sets.take(step) for step in range(sets.steps_per_epoch)])
    assert len(np.unique(visited)) == len(visited) == total // batch * batch


def test_left_out_samples_change_from_epoch_to_epoch() -> None:
    sets = one([10, 13], 7).sets[0]
    left = []
    for epoch in range(6):
        steps = range(epoch * 3, epoch * 3 + 3)
        left.append(frozenset(range(23)) - set(np.concatenate([sets.take(step) for step in steps]).tolist()))
    assert len(set(left)) > 3


def test_epochs_and_seeds_and_sets_are_shuffled_differently() -> None:
    base = one([50] * 4, 20)
    first = [base.take(step)[1].tolist() for step in range(10)]
    assert first != [base.take(step)[1].tolist() for step in range(10, 20)]
    assert first != [one([50] * 4, 20, seed=1).take(step)[1].tolist() for step in range(10)]
    assert first != [one([50] * 4, 20, name="other").take(step)[1].tolist() for step in range(10)]
    assert sorted(first[0]) != first[0]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.lists(st.integers(0, 300), min_size=1, max_size=30))
def test_take_of_any_step_equals_walking_to_it(batch: int, steps: list[int]) -> None:
    counts = [30, 0, 45, 7]
    walked = one(counts, batch, 3)
    sequence = [walked.take(step)[1] for step in range(max(steps) + 1)]
    jumping = one(counts, batch, 3)
    for step in steps:
        np.testing.assert_array_equal(jumping.take(step)[1], sequence[step])


def test_windows_within_a_lane_do_not_depend_on_where_one_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WINDOW", 16)
    counts = [100, 57, 200]
    walked = one(counts, 11, 3)
    sequence = [walked.take(step)[1] for step in range(2 * walked.sets[0].steps_per_epoch)]
    flat = np.concatenate(sequence[: len(sequence) // 2])
    assert len(np.unique(flat)) == len(flat)
    for step in (40, 3, 31, 33, 5, 4, 60):
        np.testing.assert_array_equal(one(counts, 11, 3).take(step)[1], sequence[step])


@pytest.mark.parametrize("batch", [64, 128, 1000, 1024, 2050])
def test_every_world_trains_on_the_same_batches_and_an_epoch_is_a_permutation(batch: int) -> None:
    counts = np.random.default_rng(batch).integers(20, 300, 60)
    steps = int(counts.sum()) // batch
    told = one(counts.tolist(), batch, 7)
    epoch = [told.take(step)[1] for step in range(2 * steps)]
    for first in (0, steps):
        visited = np.concatenate(epoch[first : first + steps])
        assert len(np.unique(visited)) == len(visited) == steps * batch
    for world in (world for world in WORLDS if world <= batch):
        # Each rank asks for its own slice, and only from some step on, as after a resume.
        ranks = sorted({0, 1, world // 3, world - 2, world - 1} & set(range(world)))
        for rank in ranks:
            low, high = rank_slice(batch, rank, world)
            mine = one(counts.tolist(), batch, 7)
            for step in (steps // 2, steps - 1, steps, 2 * steps - 1):
                np.testing.assert_array_equal(mine.take(step)[1][low:high], epoch[step][low:high])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 2000), st.data())
def test_an_interrupted_run_goes_on_in_any_world_with_nothing_twice(batch: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=20).filter(lambda c: sum(c) >= batch))
    worlds = [world for world in WORLDS if world <= batch]
    steps = 2 * (sum(counts) // batch)
    stops = sorted(data.draw(st.lists(st.integers(0, steps), max_size=3)))
    told = [one(counts, batch, 5).take(step)[1].tolist() for step in range(steps)]
    trained: list[list[int]] = []
    for first, last in zip([0, *stops], [*stops, steps], strict=True):
        world = data.draw(st.sampled_from(worlds))
        walked = one(counts, batch, 5)
        for step in range(first, last):
            whole = walked.take(step)[1]
            slices = [whole[slice(*rank_slice(batch, rank, world))].tolist() for rank in range(world)]
            trained.append([sample for part in slices for sample in part])
    assert trained == told


@pytest.mark.parametrize("batch", [32, 128, 256, 1000, 4096])
def test_a_hundred_shards_are_shuffled_nearly_as_by_a_full_permutation(batch: int) -> None:
    # What a single rank trains on, in its order.
    walked = one([1000] * 100, batch, 11)
    steps = walked.sets[0].steps_per_epoch
    batches = [walked.take(step)[1][permutation(batch, 11, "slice", step)] for step in range(steps)]
    visited = np.concatenate(batches)
    assert abs(np.corrcoef(np.argsort(np.argsort(visited)), np.arange(len(visited)))[0, 1]) < 0.02
    neighbours = np.mean([np.mean(b[1:] // 1000 == b[:-1] // 1000) for b in batches])
    pairs = [np.bincount(b // 1000) for b in batches]
    sharing = np.mean([(n * (n - 1)).sum() / (batch * (batch - 1)) for n in pairs])
    # Of a full permutation 999 in 99,999 are of the same shard.
    assert neighbours <= 2 * 0.01
    assert sharing <= 2 * 0.01


def test_a_run_interrupted_anywhere_and_resumed_in_another_world_trains_on_the_same_samples() -> None:
    batch, steps = 13, 40
    told = [one([31, 40, 20], batch, 5).take(step)[1].tolist() for step in range(steps)]

    def trained(world: int, first: int, last: int) -> list[list[int]]:
        orders = [one([31, 40, 20], batch, 5) for _ in range(world)]
        return [
            [
                sample
                for rank in range(world)
                for sample in orders[rank].take(step)[1][slice(*rank_slice(batch, rank, world))].tolist()
            ]
            for step in range(first, last)
        ]

    for stop, (before, after) in zip(
        (0, 1, 6, 7, 25, 39), ((1, 4), (4, 3), (2, 13), (7, 1), (3, 8), (8, 2)), strict=True
    ):
        assert trained(before, 0, stop) + trained(after, stop, steps) == told


def test_a_mixture_gives_each_set_its_share_of_every_batch_and_epochs_of_its_own() -> None:
    counts = [np.array([40, 20]), np.array([9])]
    mixed = mixture(counts, [3.0, 1.0], ["a", "b"], 8, 1)
    seen: list[list[int]] = [[], []]
    for step in range(20):
        sets, samples = mixed.take(step)
        assert sets.tolist() == [0] * 6 + [1] * 2
        for i in (0, 1):
            seen[i] += samples[sets == i].tolist()
    # 60 samples at 6 a step, 9 at 2 a step: epochs of 10 and of 4 steps.
    assert sorted(seen[0][:60]) == sorted(seen[0][60:]) == list(range(60))
    for epoch in range(5):
        assert len(set(seen[1][8 * epoch : 8 * epoch + 8])) == 8
    assert mixed.epoch(9) == 0
    assert mixed.epoch(10) == 1


def test_the_order_of_a_set_in_a_mixture_is_that_of_the_set_alone() -> None:
    counts = [np.array([40, 20]), np.array([30])]
    mixed = mixture(counts, [1.0, 1.0], ["a", "b"], 8, 1)
    for step in (0, 7, 31):
        np.testing.assert_array_equal(mixed.take(step)[1][:4], one([40, 20], 4, 1, "a").take(step)[1])


def test_the_same_set_twice_is_walked_in_two_orders() -> None:
    counts = [np.array([64])] * 2
    mixed = mixture(counts, [1.0, 1.0], ["a", "a"], 64, 1)
    samples = mixed.take(0)[1]
    assert samples[:32].tolist() != samples[32:].tolist()


@settings(deadline=None)
@given(st.integers(1, 5000), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_shares_add_up_and_are_within_one_of_their_weight(total: int, weights: list[float]) -> None:
    parts = shares(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part - total * weight / sum(weights)) < 1 + 1e-6


def test_equal_weights_round_the_same_way_every_time() -> None:
    assert shares(8, [1, 1, 1]) == [3, 3, 2]
    assert shares(10, [0.1, 0.2, 0.7]) == [1, 2, 7]


def test_mixture_raises_on_weight_without_a_sample() -> None:
    with pytest.raises(UserError, match=r"s3://b/two: its weight 0\.01 leaves it no sample in a global batch of 8"):
        mixture([np.array([50])] * 2, [1.0, 0.01], ["f1", "f2"], 8, 0, ["s3://b/one", "s3://b/two"])


def test_mixture_raises_on_split_smaller_than_its_share() -> None:
    with pytest.raises(UserError, match=r"f2 holds 3 samples, fewer than the 4 that one global batch takes"):
        mixture([np.array([50]), np.array([3])], [1.0, 1.0], ["f1", "f2"], 8, 0)
    assert one([8], 8).take(3)[1].shape == (8,)


def test_a_rank_reads_little_more_than_its_share_of_the_shards() -> None:
    shards, per, batch, world = 64, 100, 128, 8
    walk = one([per] * shards, batch)
    touched = [set[int]() for _ in range(world)]
    for step in range(walk.sets[0].steps_per_epoch):
        samples = walk.take(step)[1]
        for rank in range(world):
            touched[rank] |= set((samples[slice(*rank_slice(batch, rank, world))] // per).tolist())
    assert max(map(len, touched)) <= shards // world + 2


def test_permutation_never_changes_between_versions() -> None:
    assert permutation(10, 0, "shards", 0).tolist() == PINNED_A
    assert permutation(10, 0, "shards", 1).tolist() == PINNED_B
    assert permutation(7, 123456789, "name", "window", 3, 1, 2).tolist() == PINNED_C
    assert permutation(1, "x").tolist() == [0]
    assert permutation(0, "x").tolist() == []


def test_batches_never_change_between_versions() -> None:
    counts = np.array([100, 250, 50])
    walk = SetOrder(counts, 6, 42, "f" * 64)
    assert walk.take(0).tolist() == PINNED_D
    assert walk.take(1000).tolist() == PINNED_E


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(0, 10**6), st.text(max_size=5))
def test_permutation_is_one(n: int, seed: int, name: str) -> None:
    assert sorted(permutation(n, seed, name).tolist()) == list(range(n))


PINNED_A = [0, 6, 9, 5, 8, 3, 7, 4, 2, 1]
PINNED_B = [8, 0, 4, 2, 7, 3, 5, 9, 1, 6]
PINNED_C = [4, 2, 3, 0, 6, 1, 5]
PINNED_D = [40, 124, 143, 227, 270, 375]
PINNED_E = [387, 153, 208, 311, 12, 85]
