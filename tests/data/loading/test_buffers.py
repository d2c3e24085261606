"""Memory of batches."""

from __future__ import annotations

from physio_dist.data.loading.buffers import BufferPool


def test_pool_keeps_no_more_arrays_than_its_size() -> None:
    pool = BufferPool(2)
    acquired = [pool.acquire((1, 1, 4)) for _ in range(5)]
    places = [array.ctypes.data for array, _ in acquired]
    for _, release in acquired:
        release()
    again = [pool.acquire((1, 1, 4))[0] for _ in range(2)]
    assert sorted(array.ctypes.data for array in again) == sorted(places[-2:])
    assert pool.acquire((2, 1, 4))[0].shape == (2, 1, 4)
