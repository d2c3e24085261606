"""When shards are needed: held against a walk through the order itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from physio_dist.data.loading import order
from physio_dist.data.loading.order import Mixture, mixture
from physio_dist.data.loading.schedule import Schedule

counts_of = st.lists(st.integers(0, 30), min_size=1, max_size=40).filter(lambda counts: sum(counts) >= 8)


def needed(mixed: Mixture, counts: list[list[int]], step: int, low: int, high: int) -> set[tuple[int, int]]:
    """The (set, shard) pairs that slots of a batch lie in."""
    sets, samples = (values[low:high].tolist() for values in mixed.take(step))
    ends = [np.cumsum(of_set) for of_set in counts]
    return {(i, int(np.searchsorted(ends[i], sample, side="right"))) for i, sample in zip(sets, samples, strict=True)}


@settings(max_examples=60, deadline=None)
@given(counts_of, counts_of, st.data(), st.sampled_from([16, 64, 200, 524_288]))
def test_schedule_lists_exactly_the_shards_that_steps_need(
    one: list[int], other: list[int], data: st.DataObject, window: int
) -> None:
    batch = data.draw(st.integers(2, 8), "batch")
    low = data.draw(st.integers(0, batch - 1), "low")
    high = data.draw(st.integers(low + 1, batch), "high")
    counts = [one, other]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW", window)
        mixed = mixture([np.array(one), np.array(other)], [2.0, 1.0], ["a", "b"], batch, 5)
        schedule = Schedule(mixed, low, high)
        steps = range(2 * mixed.sets[0].steps_per_epoch)
        uses = list(itertools.takewhile(lambda use: use.first < steps.stop, schedule.coming(0)))
        assert [use.first for use in uses] == sorted(use.first for use in uses)
        walked = [needed(mixed, counts, step, low, high) for step in steps]
        for step in steps:
            foreseen = {(use.set, use.shard) for use in uses if use.first <= step <= use.last}
            assert walked[step] <= foreseen
        assert all(counts[use.set][use.shard] for use in uses)


@settings(max_examples=40, deadline=None)
@given(counts_of, st.data())
def test_next_use_is_never_later_than_the_real_use(one: list[int], data: st.DataObject) -> None:
    batch = data.draw(st.integers(1, 8), "batch")
    high = data.draw(st.integers(1, batch), "high")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(order, "WINDOW", 32)
        mixed = mixture([np.array(one)], [1.0], ["a"], batch, 5)
        schedule = Schedule(mixed, 0, high)
        epoch = mixed.sets[0].steps_per_epoch
        step = data.draw(st.integers(0, 2 * epoch), "step")
        soonest = schedule.next_use(step)
        end = (step // epoch + 2) * epoch
        for later in range(step, end):
            for key in needed(mixed, [one], later, 0, high):
                assert step <= soonest[key] <= later


def test_coming_starts_at_the_given_step() -> None:
    mixed = mixture([np.full(40, 10)], [1.0], ["a"], 4, 1)
    schedule = Schedule(mixed, 0, 4)
    later = list(itertools.takewhile(lambda use: use.first < 150, schedule.coming(120)))
    assert min(use.last for use in later) >= 120
    assert {use.shard for use in later if use.first < 200} == set(range(40))
