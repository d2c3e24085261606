"""Exit of our processes: one message and the documented status."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from physio_dist.errors import EXIT_DONE, EXIT_FAULT, EXIT_STOPPED, EXIT_USER, PhysioError

_EXTRAS = {
    "deepspeed": "train", "tensorboard": "train", "webdataset": "train", "ray": "ray", "wfdb": "readers",
    "h5py": "readers", "edfio": "readers", "matplotlib": "report", "jinja2": "report", "optuna": "optuna",
}  # fmt: skip
"""Library -> the extra of pyproject.toml that installs it."""

# Their extra has the libraries that they share with training, too.
_RAY_COMMANDS = ("python -m physio_dist.launch", "python -m physio_dist.tune")

_WORDS = {0: "done", 1: "failed", 2: "wrong input or configuration", 3: "data failed verification", 75: "stopped"}


def status_of(action: Callable[[], None]) -> int:
    """Run ``action``, print what went wrong, and return the exit status."""
    try:
        action()
        sys.stdout.flush()
        return EXIT_DONE
    except PhysioError as error:
        _print_once(str(error), error.exit_status)
        return error.exit_status
    except ModuleNotFoundError as error:
        library = (error.name or "").partition(".")[0]
        if library not in _EXTRAS:
            return _internal_error()
        command = _command()
        extra = "ray" if command in _RAY_COMMANDS else _EXTRAS[library]
        _print_once(f"{command} needs {library}, which is not installed: pip install 'physio-dist[{extra}]'", EXIT_USER)
        return EXIT_USER
    except SystemExit as end:
        # argparse has said what it had to say.
        return end.code if isinstance(end.code, int) else EXIT_FAULT
    except KeyboardInterrupt:
        _print_once("interrupted; the same command goes on where it can", EXIT_STOPPED)
        return EXIT_STOPPED
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does. What is still buffered must not be tried again at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAULT
    except Exception:
        return _internal_error()


def _internal_error() -> int:
    traceback.print_exc()
    _print_once("this is a fault of physio-dist: please report it with the lines above", EXIT_FAULT)
    return EXIT_FAULT


def _command() -> str:
    """The command of this process as somebody would type it, for example ``physio-dist report``."""
    name = Path(sys.argv[0]).stem
    if name in ("physio-dist", "cli", "__main__"):
        return " ".join(["physio-dist", *sys.argv[1:2]])
    return f"python -m physio_dist.{name}"


def interrupt_on_sigterm() -> None:
    """Let SIGTERM end a command as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def end_rank(status: int) -> None:
    """End a rank of a distributed job at once.

    Communication libraries leave threads behind that abort an interpreter that shuts down in order, and would turn a
    finished run into a failed one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _print_once(message: str, status: int) -> None:
    """Print a message; of the ranks of one launcher on one host only the first does."""
    claim = _claim_message()
    if claim is not None:
        word = _WORDS.get(status, "failed")
        # What workers logged comes before it, where both go to one file.
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        print(f"physio-dist: {word}: {message} (exit status {status})", file=sys.stderr, flush=True)
    if "RANK" in os.environ:
        # The launcher ends the other ranks when it sees one go; the one that speaks needs to be heard first.
        time.sleep(2.0 if claim is not None else 3.0)


_claims: list[socket.socket] = []


def _claim_message() -> object | None:
    """A claim, unless a sibling rank has printed; it ends with this process and leaves no file."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or not sys.platform.startswith("linux"):
        return True
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with contextlib.suppress(OSError):
        claim.bind(f"\0physio-dist-told-{os.getppid()}-{os.environ.get('MASTER_PORT', '')}")
        _claims.append(claim)
        return claim
    claim.close()
    return None
