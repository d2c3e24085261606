"""Batches of one rank, in the run's order, prefetched.

Everything is read by threads of this process: no worker process has to be forked, fed or resumed, and the S3 client's
event loop stays in one place.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from physio_dist import storage
from physio_dist.data.loading.dataset import Batch, ShardDataset
from physio_dist.data.loading.order import Mixture, node_slice, rank_slice
from physio_dist.data.loading.schedule import Schedule
from physio_dist.runtime.arrays import Int64Array
from physio_dist.runtime.seeding import permutation

T = TypeVar("T")

# Batches made ahead of the training step.
_PREFETCHED_BATCHES = 3
# Shards that are fetched at once, and those that have been requested and are not there yet.
_FETCH_THREADS = 4
_PENDING_SHARDS = 16
# Steps ahead for which files of a local set are verified.
_LOOKAHEAD_STEPS = 64


def rank_batch(
    order: Mixture, members: Sequence[Int64Array], step: int, rank: int, world: int
) -> tuple[Int64Array, Int64Array, Int64Array]:
    """A rank's samples of global batch ``step``: (set, sample, position in the run) of each."""
    low, high = rank_slice(order.batch, rank, world)
    sets, ordinals = order.take(step)
    # A batch is in the order of the lanes, which is that of neighbouring shards; within a rank's slice it need not be.
    slots = low + permutation(high - low, order.sets[0].seed, "slice", step)
    sets, ordinals = sets[slots], ordinals[slots]
    ids = np.empty(high - low, dtype=np.int64)
    for i, samples in enumerate(members):
        of_set = sets == i
        ids[of_set] = samples[ordinals[of_set]]
    return sets, ids, slots + step * order.batch


@dataclass(frozen=True)
class LoaderPlan:
    """The batches that a loader makes.

    Attributes:
        order: of the run, over all ranks.
        split: of the samples, as the order has it.
        size: samples in each of this rank's batches, padding included.
        start, stop: steps, half-open, from 0.
        rank, world: of this process.
        node: the ranks that share this one's cache, half-open; None for this one alone.
    """

    order: Mixture
    split: str
    size: int
    start: int
    stop: int
    rank: int = 0
    world: int = 1
    node: tuple[int, int] | None = None

    @property
    def steps(self) -> range:
        """The steps of the batches."""
        return range(self.start, self.stop)

    @property
    def node_ranks(self) -> tuple[int, int]:
        """The ranks that share the cache, half-open."""
        return self.node or (self.rank, self.rank + 1)


class _ShardPrefetch:
    """Opens shards before they are needed, in the order of need, as far ahead as the cache has room.

    Args:
        dataset: of the shards.
        plan: of the batches.
        budget: bytes of shards that this rank may fetch before they are needed.
        pool: threads that fetch.
    """

    def __init__(self, dataset: ShardDataset, plan: LoaderPlan, budget: float, pool: ThreadPoolExecutor) -> None:
        self._dataset, self._budget, self._pool = dataset, budget, pool
        self._stop = plan.stop
        schedule = Schedule(plan.order, *rank_slice(plan.order.batch, plan.rank, plan.world))
        self._coming = schedule.coming(plan.start)
        self._next = next(self._coming)
        # (set, shard) -> last step of need, bytes.
        self._requested: dict[tuple[int, int], tuple[int, int]] = {}
        self._pending: list[Future[object]] = []

    def advance(self, step: int) -> None:
        """Request what ``step`` and those after it need."""
        self._requested = {key: use for key, use in self._requested.items() if use[0] >= step}
        self._pending = [future for future in self._pending if not future.done()]
        taken = sum(size for _, size in self._requested.values())
        while (use := self._next).first < self._stop and len(self._pending) < _PENDING_SHARDS:
            shards, key = self._dataset.sets[use.set], (use.set, use.shard)
            size, local = shards.shards[use.shard].filesize, storage.is_local(shards.data_url)
            if use.first > step + _LOOKAHEAD_STEPS if local else taken + size > self._budget:
                break
            last, _ = self._requested.get(key, (-1, 0))
            if last < 0:
                # An error of a fetch ahead of need is raised when the shard is needed.
                self._pending.append(self._pool.submit(self._dataset.cache.open, shards, use.shard, True))
                taken += size
            self._requested[key] = max(last, use.last), size
            self._next = next(self._coming)


class PrefetchLoader(Generic[T]):
    """Iterates over a rank's batches, made ahead in a thread.

    Args:
        dataset: opened shard sets.
        plan: which batches.
        prepare: applied to every batch in the reading thread.

    Errors of the reading thread are raised by the iteration. Batches are the consumer's: it may keep them, and calls
    :attr:`Batch.release` on those that it has done with.
    """

    def __init__(self, dataset: ShardDataset, plan: LoaderPlan, prepare: Callable[[Batch], T]) -> None:
        self._dataset, self._plan, self._prepare = dataset, plan, prepare
        self._members = dataset.members(plan.split)
        low, high = plan.node_ranks
        self._node = Schedule(plan.order, *node_slice(plan.order.batch, low, high, plan.world))
        # What this rank may fill with shards that are not needed yet.
        self._budget = dataset.cache.limit_bytes / (high - low)
        self._step = plan.start
        self._queue: queue.Queue[T | BaseException] = queue.Queue(_PREFETCHED_BATCHES)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="feed", daemon=True)

    def __enter__(self) -> PrefetchLoader[T]:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join(timeout=10)

    def __iter__(self) -> Iterator[T]:
        for _ in self._plan.steps:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def _next_use(self) -> tuple[int, dict[str, int]]:
        step, sets = self._step, self._dataset.sets
        first_step: dict[str, int] = {}
        for (i, shard), first in self._node.next_use(step).items():
            # A set may stand in a mixture twice.
            sha256 = sets[i].shards[shard].sha256
            first_step[sha256] = min(first, first_step.get(sha256, first))
        return step, first_step

    def _produce(self) -> None:
        plan, dataset = self._plan, self._dataset
        dataset.cache.next_use = self._next_use
        with ThreadPoolExecutor(_FETCH_THREADS, thread_name_prefix="fetch") as pool:
            try:
                prefetch = _ShardPrefetch(dataset, plan, self._budget, pool)
                for step in plan.steps:
                    self._step = step
                    prefetch.advance(step)
                    sets, ids, positions = rank_batch(plan.order, self._members, step, plan.rank, plan.world)
                    self._put(self._prepare(dataset.read_batch(step, sets, ids, positions, plan.size)))
                    if self._closed.is_set():
                        break
            except BaseException as error:
                self._put(error)
            finally:
                dataset.cache.next_use = None
                pool.shutdown(wait=False, cancel_futures=True)

    def _put(self, item: T | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue
