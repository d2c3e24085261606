"""Lease that keeps a run to one writer: a file in the run's directory, renewed by heartbeats.

It compares nobody's clock: a holder on this host is looked up in the process table, one elsewhere is alive as long as
its beat is seen to change. Its counter of attempts is what orders the starts of a run.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from physio_dist import storage
from physio_dist.errors import UserError

NAME = "lease.json"
_BEAT_S = 10.0
# For a beat of a holder on another host. One on this host, whose launcher was just ended, may still be saving.
_REMOTE_WAIT_S = 30.0
_LOCAL_WAIT_S = 15.0


def _host() -> str:
    try:
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        namespace = ""
    return f"{socket.gethostname()} {namespace}".strip()


def wait_until_free(run: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Wait until a run's lease is released or its holder is dead.

    Returns:
        The last holder's document, empty where there is none.

    Raises:
        UserError: it lives.
    """
    url = storage.join(run, NAME)
    first = _read(url)
    logged = False
    began = time.monotonic()
    while True:
        now = _read(url)
        if not now or now.get("released") or _is_dead_here(now):
            return now
        elsewhere = now.get("host") != _host()
        if elsewhere and now.get("beat") != first.get("beat"):
            raise UserError(_refusal(run, now))
        if time.monotonic() - began > (_REMOTE_WAIT_S if elsewhere else _LOCAL_WAIT_S):
            if elsewhere:
                return now
            raise UserError(_refusal(run, now))
        if not logged:
            say(f"waiting for the run's other process to end (pid {now.get('pid')} on {now.get('host')})")
            logged = True
        time.sleep(0.5)


def _is_dead_here(document: dict[str, Any]) -> bool:
    if document.get("host") != _host():
        return False
    try:
        process = psutil.Process(int(document["pid"]))
        return process.create_time() != document["started"] or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _refusal(run: str, document: dict[str, Any]) -> str:
    return (
        f"the run at {run} is live: process {document.get('pid')} on "
        f"{document.get('host')} is writing it; end that one or choose another run.name"
    )


def _read(url: str) -> dict[str, Any]:
    try:
        document = storage.read_json(url)
    except storage.NotFoundError:
        return {}
    return document if isinstance(document, dict) else {}


class Lease:
    """The right to write a run, held by one process (rank 0).

    Args:
        url: of the run.
        on_loss: called from a thread when another process turns out to hold it.

    Raises:
        UserError: another live process holds it.
    """

    def __init__(self, url: str, on_loss: Callable[[str], None], say: Callable[[str], None]) -> None:
        self._url = storage.join(url, NAME)
        self._on_loss = on_loss
        self._token = uuid.uuid4().hex
        self._ended = threading.Event()
        previous = wait_until_free(url, say)
        self.attempt = int(previous.get("attempt", 0)) + 1
        self._beat = 0
        self._write(released=False)
        # Two that start at once both write; the later write stands, and both look again.
        time.sleep(0.3 if storage.is_local(self._url) else 1.5)
        if _read(self._url).get("token") != self._token:
            raise UserError(f"another process has just started this run ({url}); only one can write it")
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Make sure, right before something is committed, that the run is still this process's.

        Raises:
            UserError: another process has taken it over.
        """
        if _read(self._url).get("token") != self._token:
            raise UserError(f"another process has taken this run over ({self._url}); nothing more is written here")

    def release(self) -> None:
        """Give the run back, so that the next start need not wait."""
        self._ended.set()
        self._thread.join(timeout=_BEAT_S)
        # With storage away the lease cannot be given back; it lapses, and the error that ends the run is the one told.
        with contextlib.suppress(storage.StorageError):
            if _read(self._url).get("token") == self._token:
                self._write(released=True)

    def _write(self, released: bool) -> None:
        process = psutil.Process()
        storage.write_json(
            self._url,
            {
                "token": self._token, "attempt": self.attempt, "beat": self._beat, "released": released,
                "host": _host(), "pid": process.pid, "started": process.create_time(),
            },
        )  # fmt: skip

    def _renew(self) -> None:
        while not self._ended.wait(_BEAT_S):
            try:
                if _read(self._url).get("token") != self._token:
                    self._on_loss("another process has taken this run over")
                    return
                self._beat += 1
                self._write(released=False)
            except storage.StorageError:
                # An outage may be this host's alone, and another may have taken over: see check().
                continue


def end_process(why: str, status: int) -> None:
    """End at once; for threads that find that the process must not write any more."""
    print(f"physio-dist: {why}", flush=True)
    os._exit(status)
