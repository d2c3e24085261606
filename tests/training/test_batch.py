"""Pure parts of a step: shares, schedule, scaling, seeds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from physio_dist.config import TrainOptions
from physio_dist.data.loading.dataset import Batch
from physio_dist.data.loading.order import rank_slice
from physio_dist.objectives.dual_mask import MaskConfig
from physio_dist.runtime.distributed import split_share
from physio_dist.training.batch import learning_rate, prepare_batch, seed_dropout, to_device


@given(st.integers(1, 3000), st.integers(1, 64), st.integers(1, 256))
def test_split_share_covers_slice_of_every_rank(batch: int, world: int, most: int) -> None:
    world = min(world, batch)
    micro, passes = split_share(batch, world, most)
    widest = max(rank_slice(batch, r, world)[1] - rank_slice(batch, r, world)[0] for r in range(world))
    assert micro <= most
    assert widest <= micro * passes < widest + passes + 1


def test_learning_rate_warms_up_and_ends_at_minimum() -> None:
    train = TrainOptions(steps=100, warmup_steps=10, lr=1e-3, min_lr=1e-5)
    rates = [learning_rate(step, train) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9] == pytest.approx(1e-3)
    assert rates[54] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[-1] == pytest.approx(1e-5)
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert learning_rate(1, TrainOptions(steps=1, warmup_steps=0, lr=1e-3)) > 0


def batch_of(signal: np.ndarray, valid: np.ndarray, scale: float) -> Batch:
    n = len(signal)
    ids = np.arange(n, dtype=np.int64)
    return Batch(
        0, signal, np.full(n, scale, np.float32), valid, np.ones(n, np.float32), ids, (np.zeros(n, np.int64), ids)
    )


def test_to_device_converts_int16_to_patches_in_100_uv() -> None:
    signal = np.arange(2 * 3 * 400, dtype=np.int16).reshape(2, 3, 400)
    valid = np.ones((2, 3), dtype=bool)
    prepared = prepare_batch(batch_of(signal, valid, 0.5), MaskConfig(0.5, 0.3), [[0], [1], [2]], 0, "train")
    assert prepared.signal.dtype == torch.int16
    micro = to_device(prepared, slice(1, 2), torch.device("cpu"))
    assert micro.valid is None
    np.testing.assert_allclose(micro.x[0, 2, 1].numpy(), signal[1, 2, 200:] * 0.005)
    valid[1, 2] = False
    micro = to_device(
        prepare_batch(batch_of(signal, valid, 0.5), MaskConfig(0.5, 0.3), [[0], [1], [2]], 0, "train"),
        slice(1, 2), torch.device("cpu"),
    )  # fmt: skip
    assert micro.valid is not None
    assert micro.valid[0].tolist() == [[True, True], [True, True], [False, False]]


def test_prepare_batch_marks_dropped_leads_invalid() -> None:
    signal, valid = np.ones((64, 3, 2000), np.int16), np.ones((64, 3), dtype=bool)
    valid[:, 2] = False
    mask = MaskConfig(0.5, 0.3, lead_dropout=0.5, layouts=(((0,), (1,), (2,)),))
    prepared = prepare_batch(batch_of(signal, valid, 1), mask, [[0], [1], [2]], 0, "train")
    alone = prepared.valid.sum(1) == 1
    assert 0.2 < alone.double().mean() < 0.5 and not prepared.all_valid
    assert (prepared.valid.sum(1) >= 1).all(), "no sample is shown with an invalid lead alone"
    asked = (prepared.intra | prepared.inter) & prepared.valid[:, :, None]
    assert asked.any(2).any(1).all()
    assert not prepared.inter[alone].any()


def test_prepare_batch_masks_depend_on_position_only() -> None:
    signal, valid = np.zeros((6, 3, 2000), np.int16), np.ones((6, 3), dtype=bool)
    whole = prepare_batch(batch_of(signal, valid, 1), MaskConfig(0.5, 0.3), [[0], [1], [2]], 5, "train")
    part = batch_of(signal[:2], valid[:2], 1)
    moved = Batch(0, part.signal, part.scale, part.valid, part.weight, np.array([4, 2]), part.samples)
    drawn = prepare_batch(moved, MaskConfig(0.5, 0.3), [[0], [1], [2]], 5, "train")
    assert torch.equal(drawn.intra, whole.intra[[4, 2]])
    assert torch.equal(drawn.inter, whole.inter[[4, 2]])
    other = prepare_batch(moved, MaskConfig(0.5, 0.3), [[0], [1], [2]], 5, "val")
    assert not torch.equal(drawn.intra, other.intra)


def test_seed_dropout_depends_on_seed_step_micro_step_and_rank() -> None:
    def draw(*numbers: int) -> list[float]:
        seed_dropout(*numbers)
        values: list[float] = torch.rand(4).tolist()
        return values

    assert draw(0, 1, 2, 3) == draw(0, 1, 2, 3)
    draws = [draw(*numbers) for numbers in [(0, 1, 2, 3), (1, 1, 2, 3), (0, 2, 2, 3), (0, 1, 3, 3), (0, 1, 2, 4)]]
    assert len({tuple(values) for values in draws}) == 5
