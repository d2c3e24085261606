"""Profiling of a window of steps with torch's profiler (``train.profile``)."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

from physio_dist.training.callbacks import Callback


class Profiler(Callback):
    """Profiles the steps ``first`` to ``last`` of this process and hands over one trace.

    Args:
        window: ``[first, last]``; empty for none.
        save: takes the trace, JSON that chrome://tracing and Perfetto read.
    """

    def __init__(self, window: list[int], save: Callable[[bytes], None]) -> None:
        self._window, self._save = window, save
        self._profile: profile | None = None

    def on_step_begin(self, step: int) -> None:
        if not self._window:
            return
        if self._profile is None and step == self._window[0]:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profile = profile(activities=activities)
            self._profile.start()
        elif step == self._window[1] + 1:
            self._end()

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._profile is None:
            return
        finished, self._profile = self._profile, None
        finished.stop()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "trace.json")
            finished.export_chrome_trace(str(file))
            self._save(file.read_bytes())
