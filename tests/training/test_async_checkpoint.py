"""Phases and errors of checkpoints written in the background."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from physio_dist.storage import StorageError
from physio_dist.training.async_checkpoint import AsyncCheckpointer


class FakeSnapshot:
    """Notes what happens to it; waits in each phase until it is released."""

    def __init__(self, step: int, events: list[tuple[str, int]], gate: threading.Event) -> None:
        self.step, self.events, self.gate = step, events, gate

    def upload(self) -> None:
        assert self.gate.wait(10)
        self.events.append(("upload", self.step))

    def commit(self) -> None:
        assert self.gate.wait(10)
        self.events.append(("commit", self.step))

    def on_commit(self) -> None:
        self.events.append(("on_commit", self.step))


class Saving:
    """A checkpointer with what happens in it."""

    def __init__(self, first: bool = True, blocked: bool = False) -> None:
        self.events: list[tuple[str, int]] = []
        self.gate = threading.Event()
        if not blocked:
            self.gate.set()
        self.checkpointer = AsyncCheckpointer(first, lambda step: FakeSnapshot(step, self.events, self.gate))

    def wait_for(self, status: tuple[bool, bool]) -> None:
        until(lambda: self.checkpointer.local_status() == status)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_idle_checkpointer_has_nothing_to_report() -> None:
    saving = Saving()
    assert saving.checkpointer.local_status() == (False, False)
    saving.checkpointer.update(False, False)
    saving.checkpointer.finish()
    assert saving.events == []


def test_first_rank_uploads_then_commits_when_all_ranks_have_uploaded() -> None:
    saving = Saving()
    saving.checkpointer.save(5)
    saving.wait_for((True, False))
    assert saving.events == [("upload", 5)]
    saving.checkpointer.update(False, False)
    assert saving.events == [("upload", 5)]
    saving.checkpointer.update(True, False)
    saving.wait_for((False, True))
    assert saving.events == [("upload", 5), ("commit", 5)]
    saving.checkpointer.update(False, True)
    assert saving.events == [("upload", 5), ("commit", 5), ("on_commit", 5)]
    assert saving.checkpointer.local_status() == (False, False)


def test_other_ranks_upload_and_never_commit() -> None:
    saving = Saving(first=False)
    saving.checkpointer.save(5)
    saving.wait_for((True, False))
    saving.checkpointer.update(True, False)
    assert saving.checkpointer.local_status() == (False, False)
    saving.checkpointer.update(False, True)
    assert saving.events == [("upload", 5), ("on_commit", 5)]


def test_save_does_not_wait_for_upload() -> None:
    saving = Saving(blocked=True)
    saving.checkpointer.save(5)
    assert saving.checkpointer.local_status() == (False, False)
    saving.gate.set()
    saving.checkpointer.finish()
    assert saving.events == [("upload", 5), ("commit", 5), ("on_commit", 5)]


def test_save_waits_for_checkpoint_in_flight() -> None:
    saving = Saving(blocked=True)
    saving.checkpointer.save(5)
    threading.Timer(0.05, saving.gate.set).start()
    saving.checkpointer.save(6)
    assert saving.events[:3] == [("upload", 5), ("commit", 5), ("on_commit", 5)]
    assert saving.checkpointer.blocked_s >= 0.04
    saving.checkpointer.finish()
    assert saving.events[3:] == [("upload", 6), ("commit", 6), ("on_commit", 6)]


@pytest.mark.parametrize("phase", ["upload", "commit"])
@pytest.mark.parametrize("asked_by", ["local_status", "finish", "save"])
def test_error_in_thread_is_raised_in_loop(monkeypatch: pytest.MonkeyPatch, phase: str, asked_by: str) -> None:
    def fail(_: FakeSnapshot) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(FakeSnapshot, phase, fail)
    saving = Saving()
    saving.checkpointer.save(5)
    if phase == "commit" and asked_by == "local_status":
        saving.wait_for((True, False))
        saving.checkpointer.update(True, False)
    with pytest.raises(StorageError, match="disk is full"):
        if asked_by == "local_status":
            until(lambda: any(saving.checkpointer.local_status()))
        elif asked_by == "save":
            saving.checkpointer.save(6)
        else:
            saving.checkpointer.finish()
    assert ("on_commit", 5) not in saving.events


def test_abandon_waits_for_thread_and_swallows_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    saving = Saving(blocked=True)
    saving.checkpointer.save(5)
    threading.Timer(0.05, saving.gate.set).start()
    saving.checkpointer.abandon()
    assert saving.events == [("upload", 5)]
