"""The errors a person is meant to read, and the exit status each one ends with.

Everything else that is raised is a fault of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAULT = 1
EXIT_USER = 2
EXIT_DATA = 3
EXIT_STOPPED = 75


class PhysioError(Exception):
    """Base of all errors that are told in one message, without a traceback."""

    exit_status = EXIT_FAULT


class UserError(PhysioError):
    """The input or the configuration is wrong; the message says what to do."""

    exit_status = EXIT_USER


class DataError(PhysioError):
    """Data disagrees with the hash, count or shape that was recorded for it."""

    exit_status = EXIT_DATA


class Stopped(PhysioError):
    """A signal asked the process to stop, and it has saved what it had to."""

    exit_status = EXIT_STOPPED


def nearest(word: str, known: Iterable[str]) -> str:
    """A half-sentence naming the known word nearest to ``word``, or the known words."""
    choices = sorted(known)
    return closest(word, choices) or "known: " + ", ".join(choices)


def closest(word: str, known: Iterable[str]) -> str:
    """A half-sentence naming the known word nearest to ``word``; empty where none is near."""
    close = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.55)
    return f"did you mean {close[0]!r}?" if close else ""
