"""Experiment trackers (``train.tracker``): MLflow or Weights & Biases, through their own libraries.

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
    """Interface of an experiment tracker."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Log the metrics of a step."""

    def close(self) -> None:
        """End the tracker's run."""


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
    earlier = _earlier_run(run_dir, kind)
    try:
        inner = (_MLflow if kind == "mlflow" else _Wandb)(library, options, earlier)
    except Exception as error:
        # An address may hold a password.
        why = re.sub(r"://[^/@\s]+@", "://", f"{type(error).__name__}: {error}")[:300]
        raise UserError(f"train.tracker={kind} cannot be opened ({why}); train.tracker=none does without") from None
    if earlier is None:
        storage.write_json(run_dir.file(_NOTE), {"tracker": kind, "run": inner.run})
    return _Lenient(inner, kind, say)


def _earlier_run(run_dir: RunDir, kind: str) -> str | None:
    try:
        note = storage.read_json(run_dir.file(_NOTE))
    except storage.NotFoundError:
        return None
    return str(note["run"]) if note.get("tracker") == kind else None


class _Lenient:
    """Keeps the run going when a tracker fails; warns once."""

    def __init__(self, inner: Tracker, kind: str, say: Callable[[str], None]) -> None:
        self._inner, self._kind, self._say, self._warned = inner, kind, say, False

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if not self._warned:
                # Not its message, which may hold what only the tracker's own log should.
                self._say(f"warning: {self._kind} takes no metrics ({type(error).__name__}); the run goes on without")
            self._warned = True

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._try(lambda: self._inner.log(numbers, step))

    def close(self) -> None:
        self._try(self._inner.close)


class _MLflow:
    def __init__(self, library: Any, options: PretrainConfig, earlier: str | None) -> None:
        self._library = library
        if earlier is None:
            library.set_experiment("physio-dist")
            self.run = str(library.start_run(run_name=options.run.name).info.run_id)
            library.log_params(flatten(options))
        else:
            self.run = earlier
            library.start_run(run_id=earlier)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._library.log_metrics(numbers, step=step, synchronous=False)

    def close(self) -> None:
        self._library.end_run()


class _Wandb:
    def __init__(self, library: Any, options: PretrainConfig, earlier: str | None) -> None:
        self.run = earlier or library.util.generate_id()
        self._run = library.init(
            project="physio-dist", name=options.run.name, id=self.run, resume="allow", config=flatten(options)
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def close(self) -> None:
        self._run.finish()
