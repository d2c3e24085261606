"""How far a long command is: a bar on a terminal, a line every tenth elsewhere."""

from __future__ import annotations

import contextlib
import sys
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Counts towards ``total`` on standard error.

    Args:
        total: how many there are.
        unit: of what, in the plural.
        doing: what is done to them.
    """

    def __init__(self, total: int, unit: str, doing: str) -> None:
        self._total, self._unit, self._doing = total, unit, doing
        self._done = self._told = 0
        self._bar = (
            tqdm(total=total, unit=f" {unit}", desc=doing, file=sys.stderr, dynamic_ncols=True, mininterval=0.5)
            if sys.stderr.isatty()
            else None
        )

    def update(self, count: int = 1) -> None:
        """``count`` more are done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._total and (tenths := 10 * self._done // self._total) > self._told:
            self._told = tenths
            # Who listens no longer is no reason to stop the work.
            with contextlib.suppress(OSError):
                print(f"{self._doing}: {self._done} of {self._total} {self._unit}", file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
