"""Memory of batches, used again once it is released: fresh pages cost as much as reading into them."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np

from physio_dist.runtime.arrays import Int16Array


class BufferPool:
    """Arrays of released batches.

    An array that is never released is never handed out again, so a consumer that keeps a batch keeps its content.

    Args:
        size: released arrays that are kept; further ones are left to the garbage collector.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: list[Int16Array] = []
        self._lock = threading.Lock()

    def acquire(self, shape: tuple[int, int, int]) -> tuple[Int16Array, Callable[[], None]]:
        """An uninitialized int16 array, and the function that releases it.

        After its first call, which may come from any thread, the function does nothing.
        """
        with self._lock:
            # Arrays of another shape belong to a use of the dataset that is over, or to its last, smaller batch.
            index = next((i for i, array in enumerate(self._free) if array.shape == shape), None)
            array = np.empty(shape, dtype=np.int16) if index is None else self._free.pop(index)
        held = [array]

        def release() -> None:
            with self._lock:
                if held:
                    self._free = [*self._free, held.pop()][-self._size :]

        return array, release
