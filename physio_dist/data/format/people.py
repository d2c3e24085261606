"""Pseudonyms of people, and the split that each belongs to."""

from __future__ import annotations

import hashlib


def split_of(person: int, val: float, test: float) -> int:
    """Split of a person (position in ``SPLITS``): by hash, so that it is the same in every set and for ever."""
    digest = hashlib.sha256(b"physio-dist split %d" % person).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    if u < test:
        return 2
    return 1 if u < test + val else 0


def pseudonym(source: str, person: str) -> int:
    """64-bit pseudonym of a person of a corpus.

    It hides the id from a reader of the shards, not from anyone who holds the list of ids.
    """
    digest = hashlib.sha256(f"physio-dist person {source}\n{person}".encode()).digest()
    return int.from_bytes(digest[:8], "big")
