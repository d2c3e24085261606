"""Run directory: files that grow by lines, and the configuration compared on resume.

Objects in a bucket cannot be appended to, so for a remote run the growing files are spooled on the node and sent when
:meth:`RunDir.sync` is called, which is before each checkpoint is committed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any, TextIO

from physio_dist import storage
from physio_dist.config import PretrainConfig, refuse_another, to_yaml
from physio_dist.config.cluster import ClusterOptions
from physio_dist.config.options import map_urls
from physio_dist.errors import UserError
from physio_dist.storage.user_cache import user_cache_dir

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
# Pseudonyms of the people that a run trained on; an export carries the file along.
PEOPLE_FILE = "people.json"
# Options that say where and how fast a run trains, not what it computes; and which steps count as gone wrong, because
# leaving spikes out is what a run that suffers from them is told to go on with.
_TRAIN_MAY_DIFFER = (
    "micro_batch", "precision", "log_every", "save_every", "keep_checkpoints", "log_sample_keys", "threads",
    "spike_factor", "skip_spikes",
    "hang_timeout_s", "profile", "tracker",
)  # fmt: skip
MAY_DIFFER = frozenset(
    [
        # The run is where it is found, whatever the path to it is called today.
        "run.dir",
        "resume", "zero.stage", "data.cache_dir", "data.cache_gb", *(f"train.{name}" for name in _TRAIN_MAY_DIFFER),
        *(f"cluster.{item.name}" for item in fields(ClusterOptions)),
    ]
)  # fmt: skip


def _absolute(url: str, _: str) -> str:
    return storage.absolute(url)


class RunDir:
    """A run's directory as one rank sees it.

    Args:
        url: ``run.dir/run.name``.
        rank: of this process.
    """

    def __init__(self, url: str, rank: int) -> None:
        self.url = storage.absolute(url)
        self.rank = rank
        self._local = storage.is_local(self.url)
        self.spool = storage.local_path(self.url) if self._local else Path()
        self._growing: dict[str, TextIO] = {}
        self._sent: dict[Path, tuple[int, float]] = {}
        # Checkpoints send from a thread of their own.
        self._sending = threading.Lock()

    def begin(self, attempt: int) -> None:
        """Choose the spool of this attempt and drop those of earlier ones; only for who holds the run's lease.

        The bucket is the truth: what an interrupted attempt had not sent is of steps behind the newest checkpoint.
        """
        if self._local:
            return
        of_run = user_cache_dir("runs", hashlib.sha256(self.url.encode()).hexdigest()[:16])
        self.spool = of_run / f"rank-{self.rank}" / str(attempt)
        shutil.rmtree(self.spool.parent, ignore_errors=True)

    def file(self, *parts: str) -> str:
        """URL of a file of the run."""
        return storage.join(self.url, *parts)

    def open_lines(self, name: str, keep_up_to: int | None = None) -> None:
        """Open a growing file of JSON lines, with what it already holds.

        Args:
            name: relative to the run.
            keep_up_to: drop lines of later steps; None keeps all.
        """
        try:
            old = storage.read_bytes(self.file(name)).decode("utf-8", errors="replace")
        except storage.NotFoundError:
            old = ""
        text = "".join(line + "\n" for line in old.splitlines() if _is_current_line(line, keep_up_to))
        path = self.spool / name
        storage.write_bytes(str(path), text.encode())
        self._growing[name] = path.open("a", encoding="utf-8")

    def add_line(self, name: str, line: dict[str, Any]) -> None:
        """Append an object to a growing file, so that a killed process has written it.

        Raises:
            StorageError: the disk is full.
        """
        try:
            self._growing[name].write(json.dumps(line) + "\n")
            self._growing[name].flush()
        except OSError as error:
            raise storage.StorageError(
                f"cannot write {self.spool / name}: {error.strerror}; free some space and start again"
            ) from None

    def sync(self) -> None:
        """Send what has grown to the bucket; nothing to do where the run is local."""
        if self._local:
            return
        with self._sending:
            for path in sorted(self.spool.rglob("*")):
                facts = path.stat()
                if path.is_file() and self._sent.get(path) != (facts.st_size, facts.st_mtime):
                    storage.put_file(path, self.file(path.relative_to(self.spool).as_posix()))
                    self._sent[path] = (facts.st_size, facts.st_mtime)

    def close(self) -> None:
        """Send the rest and drop the spool."""
        for file in self._growing.values():
            file.close()
        self.sync()
        if not self._local:
            shutil.rmtree(self.spool.parent, ignore_errors=True)


def _is_current_line(line: str, up_to: int | None) -> bool:
    """True if a line is complete and of a step up to ``up_to``."""
    try:
        document = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(document, dict) and (up_to is None or int(document.get("step", 0)) <= up_to)


def compare_config(run: RunDir, options: PretrainConfig) -> None:
    """Compare the resolved configuration with that of the run that is there, if one is.

    Raises:
        UserError: an option differs that must not (all of them are named), or ``resume=none`` on an existing run.
    """
    if not options.resume.existing and storage.exists(run.file(CONFIG)):
        raise UserError(f"{run.url} exists already: choose another run.name, or leave out resume=none to go on with it")
    refuse_another(run.file(CONFIG), map_urls(options, _absolute), MAY_DIFFER, grow="train.steps")


def write_config(run: RunDir, options: PretrainConfig) -> None:
    """Write the resolved configuration: from here on the run is there, and other options are refused.

    Local paths are made absolute, because the next start may be from another folder or by another launcher.
    """
    storage.write_bytes(run.file(CONFIG), to_yaml(map_urls(options, _absolute)).encode())
