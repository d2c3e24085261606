"""MLflow or Weights & Biases, where a run asks for one (``train.tracker``); each through its own library.

Where they send to and as whom is theirs to know, from their own environment variables (``MLFLOW_TRACKING_URI``,
``WANDB_MODE`` and the like). They get the options and the numbers of the metrics, nothing of the environment.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from typing import Any, Protocol

from physio_dist import storage
from physio_dist.config import PretrainConfig, flatten
from physio_dist.errors import UserError
from physio_dist.runs.run_dir import RunDir

# In the run's folder: the run's name at the tracker, under which a later start goes on.
_NOTE = "tracker.json"


class Tracker(Protocol):
    """Takes numbers."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Of a step."""

    def close(self) -> None:
        """The run, or this start of it, has ended."""


def check_tracker(name: str) -> None:
    """Refuse a tracker whose library is not there.

    Raises:
        UserError: says what to install.
    """
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"train.tracker={name} needs the package {name}: `pip install {name}`, or train.tracker=none")


def open_tracker(options: PretrainConfig, run_dir: RunDir, say: Callable[[str], None]) -> Tracker | None:
    """The tracker that is asked for, going on with the tracker's own run where there is one."""
    kind = options.train.tracker
    if kind == "none":
        return None
    library = importlib.import_module(kind)
    known = _known(run_dir, kind)
    try:
        inner = (_MLflow if kind == "mlflow" else _Wandb)(library, options, known)
    except Exception as error:
        # An address may hold a password.
        why = re.sub(r"://[^/@\s]+@", "://", f"{type(error).__name__}: {error}")[:300]
        raise UserError(f"train.tracker={kind} cannot be opened ({why}); train.tracker=none does without") from None
    if known is None:
        storage.write_json(run_dir.file(_NOTE), {"tracker": kind, "run": inner.run})
    return _Lenient(inner, kind, say)


def _known(run_dir: RunDir, kind: str) -> str | None:
    try:
        note = storage.read_json(run_dir.file(_NOTE))
    except storage.NotFoundError:
        return None
    return str(note["run"]) if note.get("tracker") == kind else None


class _Lenient:
    """A tracker that is away must not end a run; it is said once."""

    def __init__(self, inner: Tracker, kind: str, say: Callable[[str], None]) -> None:
        self._inner, self._kind, self._say, self._told = inner, kind, say, False

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if not self._told:
                # Not its message, which may hold what only the tracker's own log should.
                self._say(f"warning: {self._kind} takes no metrics ({type(error).__name__}); the run goes on without")
            self._told = True

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._try(lambda: self._inner.log(numbers, step))

    def close(self) -> None:
        self._try(self._inner.close)


class _MLflow:
    def __init__(self, library: Any, options: PretrainConfig, known: str | None) -> None:
        self._library = library
        if known is None:
            library.set_experiment("physio-dist")
            self.run = str(library.start_run(run_name=options.run.name).info.run_id)
            library.log_params(flatten(options))
        else:
            self.run = known
            library.start_run(run_id=known)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._library.log_metrics(numbers, step=step, synchronous=False)

    def close(self) -> None:
        self._library.end_run()


class _Wandb:
    def __init__(self, library: Any, options: PretrainConfig, known: str | None) -> None:
        self.run = known or library.util.generate_id()
        self._run = library.init(
            project="physio-dist", name=options.run.name, id=self.run, resume="allow", config=flatten(options)
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
