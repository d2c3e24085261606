"""Pseudonyms and splits of people."""

from __future__ import annotations

import numpy as np

from physio_dist.data.format.people import pseudonym, split_of

PINNED_SPLITS = [
    0, 0, 0, 2, 2, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0, 2, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0,
]  # fmt: skip
PINNED_PERSON = "891039d22694c0b3"


def test_split_of_never_changes_and_keeps_the_shares() -> None:
    assert [split_of(person, 0.1, 0.1) for person in range(40)] == PINNED_SPLITS
    codes = np.bincount([split_of(person, 0.2, 0.1) for person in range(20_000)], minlength=3) / 20_000
    np.testing.assert_allclose(codes, [0.7, 0.2, 0.1], atol=0.01)
    assert {split_of(person, 0, 0) for person in range(500)} == {0}
    assert {split_of(person, 1, 0) for person in range(500)} == {1}
    assert {split_of(person, 0, 1) for person in range(500)} == {2}


def test_split_of_larger_share_keeps_test_people() -> None:
    small = {person for person in range(2000) if split_of(person, 0.1, 0.1) == 2}
    assert small < {person for person in range(2000) if split_of(person, 0.1, 0.3) == 2}


def test_pseudonym_never_changes_and_differs_between_corpora() -> None:
    assert f"{pseudonym('ptb', 'patient001'):016x}" == PINNED_PERSON
    assert len({pseudonym(source, person) for source in "abc" for person in ("1", "2", "a\n1")}) == 9
