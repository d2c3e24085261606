"""What the driver of a run and its ranks tell each other."""

from __future__ import annotations

import asyncio

from physio_dist.ray_backend.coordinator import CoordinatorActor


def test_a_wish_reaches_who_waits_for_it_and_is_granted_by_the_next_commit() -> None:
    async def talk() -> list[bool]:
        coordinator = CoordinatorActor()
        # The listener of ranks that are gone hears it too, and takes it from nobody.
        listeners = [asyncio.create_task(coordinator.wait_for_checkpoint_request()) for _ in range(2)]
        await asyncio.sleep(0)
        wish = asyncio.create_task(coordinator.request_checkpoint(30))
        await asyncio.gather(*listeners)
        assert not wish.done()
        await coordinator.tell_commit()
        granted = await wish
        # Nobody commits: an earlier checkpoint does not count.
        return [granted, await coordinator.request_checkpoint(0.05)]

    assert asyncio.run(talk()) == [True, False]


def test_ranks_that_were_ended_are_not_at_work() -> None:
    async def talk() -> None:
        coordinator = CoordinatorActor()
        await coordinator.join(0)
        await coordinator.tell_resize(3, True)
        assert (await coordinator.read()).ranks == {0}
        await coordinator.tell_ended()
        now = await coordinator.read()
        assert not now.ranks
        assert not now.losses
        assert now.notes == ["room for 3 rank(s): they start again after saving"]

    asyncio.run(talk())
