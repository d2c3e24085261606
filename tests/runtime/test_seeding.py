"""Random numbers of a purpose are the same in every release."""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from physio_dist.runtime.seeding import permutation, rng, seed_of, seed_torch, torch_generator


def test_seed_of_is_the_blake2b_hash_of_the_joined_words() -> None:
    digest = hashlib.blake2b(b"dropout/7/3", digest_size=8).digest()
    assert seed_of("dropout", 7, 3) == int.from_bytes(digest, "big")
    assert seed_of("dropout", 7, 3, byteorder="little") == int.from_bytes(digest, "little")


def test_generators_repeat_for_a_purpose_and_differ_between_purposes() -> None:
    assert np.array_equal(rng("a", 1).random(4), rng("a", 1).random(4))
    assert not np.array_equal(rng("a", 1).random(4), rng("a", 2).random(4))
    first, again = (torch.rand(4, generator=torch_generator("a", 1)) for _ in range(2))
    assert torch.equal(first, again)


def test_seed_torch_sets_the_default_generator() -> None:
    with torch.random.fork_rng(devices=[]):
        seed_torch("dropout", 7, 3)
        drawn = torch.rand(4)
        torch.manual_seed(seed_of("dropout", 7, 3, byteorder="little") >> 1)
        assert torch.equal(drawn, torch.rand(4))


def test_permutation_is_that_of_philox_sorted() -> None:
    assert permutation(6, "epoch", 0).tolist() == [3, 1, 5, 0, 2, 4]
