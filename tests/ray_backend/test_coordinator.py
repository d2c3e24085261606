"""State shared by the driver of a run and its ranks."""

from __future__ import annotations

import asyncio

from physio_dist.ray_backend.coordinator import CoordinatorActor


def test_checkpoint_request_notifies_all_listeners_and_returns_at_next_commit() -> None:
    async def scenario() -> list[bool]:
        coordinator = CoordinatorActor()
        # A listener of ranks that are gone does not consume the request.
        listeners = [asyncio.create_task(coordinator.wait_for_checkpoint_request()) for _ in range(2)]
        await asyncio.sleep(0)
        request = asyncio.create_task(coordinator.request_checkpoint(30))
        await asyncio.gather(*listeners)
        assert not request.done()
        await coordinator.record_commit()
        committed = await request
        # No commit follows: an earlier checkpoint does not count.
        return [committed, await coordinator.request_checkpoint(0.05)]

    assert asyncio.run(scenario()) == [True, False]


def test_shutdown_clears_ranks_and_records_no_loss() -> None:
    async def scenario() -> None:
        coordinator = CoordinatorActor()
        await coordinator.join(0)
        await coordinator.record_resize(3, True)
        assert (await coordinator.read()).ranks == {0}
        await coordinator.record_shutdown()
        state = await coordinator.read()
        assert not state.ranks
        assert not state.losses
        assert state.notes == ["room for 3 rank(s): they start again after saving"]

    asyncio.run(scenario())
