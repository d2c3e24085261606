"""Progress of a long command: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from tqdm import tqdm


def _print(text: str) -> None:
    # A closed standard error is no reason to stop the work.
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Counts towards ``total`` on standard error.

    Without a terminal, :meth:`update` prints a line at every tenth, and :meth:`report` at every call.

    Args:
        total: number of units.
        unit: name of a unit, in the plural.
        doing: verb for a line, such as ``reading``.
        initial: units that were done before.
        log: prints a line.
    """

    def __init__(
        self, total: int, unit: str, doing: str = "", initial: int = 0, log: Callable[[str], None] = _print
    ) -> None:
        self._total, self._unit, self._doing, self._log = total, unit, doing, log
        self._initial = self._done = initial
        self._tenths = 10 * initial // total if total else 0
        self._start = time.monotonic()
        self._bar: tqdm[Any] | None = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=initial, unit=f" {unit}", desc=doing or None, file=sys.stderr, dynamic_ncols=True,
                mininterval=0.5,
            )  # fmt: skip

    @property
    def is_bar(self) -> bool:
        """True if a terminal shows a bar."""
        return self._bar is not None

    def update(self, count: int = 1) -> None:
        """Count ``count`` more units."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._total and (tenths := 10 * self._done // self._total) > self._tenths:
            self._tenths = tenths
            self._log(f"{self._doing}: {self._done} of {self._total} {self._unit}")

    def report(self, done: int, text: str) -> None:
        """Set the number of units done, and show ``text`` beside it with the time left."""
        self._done = done
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            self._bar.set_postfix_str(text)
            return
        per_unit = (time.monotonic() - self._start) / max(done - self._initial, 1)
        left = time.strftime("%H:%M:%S", time.gmtime(per_unit * (self._total - done)))
        self._log(f"{self._unit} {done}/{self._total}: {text}, ETA {left}")

    def close(self) -> None:
        """Remove the bar's hold on the terminal."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
