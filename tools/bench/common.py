"""What the benchmarks share: peers in environments of their own, interleaved repeats, the table, the last line."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from physio_dist.errors import PhysioError

# First and by name: asked for by a peer, torch would come in its newest build with GBs of CUDA libraries.
TORCH = "torch==2.13.0"
# For one command; converting the data is the longest.
_LIMIT_S = 900.0
DEFAULT_ENVS = "~/.cache/physio-dist/bench"


class BenchError(Exception):
    """The bench cannot go on; the message says why and what to do."""


def environment(folder: Path, name: str, requirement: str) -> Path:
    """The Python of an environment that has a peer and nothing of ours, made once.

    Args:
        folder: of all environments.
        name: of this one.
        requirement: the peer at one version, for pip.

    Raises:
        BenchError: it cannot be installed.
    """
    home = folder / name
    python, stamp = home / "bin" / "python", home / "installed.txt"
    wanted = f"{TORCH} {requirement} Python {sys.version_info.major}.{sys.version_info.minor}"
    if python.exists() and stamp.exists() and stamp.read_text() == wanted:
        return python
    say(f"installing {requirement} into {home}")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # Named again beside the peer, so that nothing of the peer's replaces it.
    steps = [[sys.executable, "-m", "venv", "--clear", str(home)], [*pip, TORCH], [*pip, TORCH, requirement, "numpy"]]
    for words in steps:
        done = subprocess.run(words, env=outside(), stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        if done.returncode != 0:
            reason = "\n".join(line for line in done.stderr.splitlines() if "WARNING" not in line)
            raise BenchError(f"{requirement} cannot be installed; leave it out with --peers:\n{reason}")
    stamp.write_text(wanted)
    return python


def outside() -> dict[str, str]:
    """The environment variables of a process that must not see our packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}


class Child:
    """A process that waits for a command, does it and answers in one JSON line; see ``peers/serve.py``.

    Args:
        name: for messages and the name of its log.
        words: the command line.
        env: its environment variables.
        logs: folder of the log.
    """

    def __init__(self, name: str, words: Sequence[object], env: Mapping[str, str], logs: Path) -> None:
        self.name, self._log = name, logs / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(word) for word in words],
                env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        # Its input ends, and so should it: killed, some libraries leave shared memory behind.
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def ask(self, command: str) -> dict[str, Any]:
        """Have one command done.

        Raises:
            BenchError: the process ended instead, or took so long that it was ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        timer = threading.Timer(_LIMIT_S, self._process.kill)
        timer.start()
        line = self._process.stdout.readline()
        timer.cancel()
        if not line:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise BenchError(f"{self.name} ended while it did {command!r}; the end of {self._log}:\n{tail}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def interleave(repeats: int, measures: Mapping[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Take every measure once, then all again, ``repeats`` times: a slow minute of the machine then hits all alike."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for i in range(repeats):
        for name, measure in measures.items():
            found[name].append(measure())
        say(f"repeat {i + 1} of {repeats}: " + ", ".join(f"{name} {values[-1]:,.0f}" for name, values in found.items()))
    return found


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def finish(measure: Callable[[], str]) -> int:
    """Measure and print the last line; what goes wrong is one line on stderr.

    Returns:
        The exit status of the bench.
    """
    try:
        print(measure())
    except (BenchError, PhysioError) as error:
        say(str(error))
        return getattr(error, "exit_status", 1)
    return 0


def say(text: str) -> None:
    """Progress, on stderr: stdout holds the table and the last line."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def table(title: str, unit: str, found: Mapping[str, Sequence[float]]) -> str:
    """Median, smallest and largest of each measure, and the median's ratio to the first measure's."""
    width = max(len(name) for name in found)
    first = statistics.median(next(iter(found.values())))
    lines = [title, f"  {'':{width}}  {'median':>15}  {'smallest':>15}  {'largest':>15}  first to this"]
    for name, values in found.items():
        middle = statistics.median(values)
        numbers = "  ".join(f"{value:15,.0f}" for value in (middle, min(values), max(values)))
        lines.append(f"  {name:{width}}  {numbers}  {first / middle:13.2f}")
    return "\n".join([*lines, f"  in {unit}, {len(next(iter(found.values())))} repeats", ""])


def last_line(
    bench: str, unit: str, repeats: int, ours: float | None, peers: Mapping[str, float], also: Mapping[str, object]
) -> str:
    """The result as one JSON object; more is better in ``unit``."""
    fastest = max(peers, key=lambda name: peers[name], default=None)
    ratio = None if ours is None or fastest is None else round(ours / peers[fastest], 3)
    result = {
        "bench": bench, "ours": rounded(ours), "peers": {name: rounded(value) for name, value in peers.items()},
        "unit": unit, "ratio": ratio, "ratio_to": fastest, "n": repeats, "also": also,
    }  # fmt: skip
    return json.dumps(result)


def rounded(value: float | None) -> float | None:
    """To what a figure of several digits can mean."""
    return None if value is None else round(value, 1)
