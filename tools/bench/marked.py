"""What ``submit.py`` submits: ``physio_dist.launch`` that notes into a folder when it got how far.

``marked.py FOLDER``, then the options of ``physio_dist.launch``.
"""

from __future__ import annotations

import time

BEGAN = time.time(), time.process_time()

import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

FOLDER = sys.argv.pop(1)


def note(name: str, when: tuple[float, float] | None = None, folder: str = FOLDER) -> None:
    """A line of this process: what it has reached, when, and at how many seconds of its CPU time."""
    clock, used = when or (time.time(), time.process_time())
    with (Path(folder) / f"{os.getpid()}.jsonl").open("a") as file:
        file.write(json.dumps({"name": name, "time": clock, "cpu": used}) + "\n")


note("driver runs", BEGAN)

from physio_dist.ray_backend import cluster, train_driver  # noqa: E402
from physio_dist.runtime import exit_status  # noqa: E402

note("its imports")
CONNECT, PREFLIGHT = cluster.connect, train_driver.PreflightTorchConfig


def connect(*given: Any) -> None:
    CONNECT(*given)
    note("connected")


class MarkedPreflight(PREFLIGHT):
    """Notes on every worker."""

    @property
    def backend_cls(self) -> type:
        class Backend(super().backend_cls):  # type: ignore[misc]
            def on_start(self, workers: Any, config: Any) -> None:
                workers.execute(note, "workers started")
                super().on_start(workers, config)
                workers.execute(note, "process group up")

        return Backend


def rank_of(given: dict[str, Any]) -> None:
    """``train_one_rank`` with notes in it."""
    from physio_dist.ray_backend import train_driver
    from physio_dist.runtime.distributed import choose_accelerator

    choose_accelerator()
    from physio_dist.training import source
    from physio_dist.training.callbacks import MetricsCallback
    from physio_dist.training.trainer import Trainer

    note("rank's imports")
    open_dataset, fit, on_metrics = source.open_dataset, Trainer.fit, MetricsCallback.on_metrics

    def opened(*args: Any) -> Any:
        dataset = open_dataset(*args)
        note("data opened")
        return dataset

    def marked_fit(self: Any, start: int) -> None:
        note("engine built")
        fit(self, start)

    def logged(self: Any, step: int, line: dict[str, Any]) -> None:
        on_metrics(self, step, line)
        if step == 1:
            note("first step done")

    source.open_dataset, Trainer.fit, MetricsCallback.on_metrics = opened, marked_fit, logged  # type: ignore[misc]
    train_driver.train_one_rank(given)


if __name__ == "__main__":
    cluster.connect, train_driver.PreflightTorchConfig = connect, MarkedPreflight
    train_driver.train_one_rank = rank_of
    exit_status.end_rank(exit_status.status_of(train_driver.main))
