"""Exit statuses and messages of commands that end with an exception."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from physio_dist.errors import EXIT_FAULT, EXIT_USER, DataError, Stopped, UserError
from physio_dist.runtime.exit_status import status_of


@pytest.mark.parametrize(
    ("library", "argv", "words"),
    [
        ("ray", ["/src/physio_dist/tune.py"], ("python -m physio_dist.tune", "'physio-dist[ray]'")),
        ("deepspeed", ["/src/physio_dist/launch.py"], ("python -m physio_dist.launch", "'physio-dist[ray]'")),
        ("matplotlib", ["/bin/physio-dist", "report", "RUN"], ("physio-dist report", "'physio-dist[report]'")),
        ("wfdb", ["/src/physio_dist/__main__.py", "shard"], ("physio-dist shard", "'physio-dist[readers]'")),
    ],
)
def test_status_of_names_command_and_extra_when_a_library_is_missing(
    library: str,
    argv: list[str],
    words: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setitem(sys.modules, library, None)

    assert status_of(lambda: __import__(library)) == EXIT_USER

    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(word in message for word in words)


def test_status_of_reports_a_fault_when_a_library_of_no_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)

    assert status_of(lambda: __import__("safetensors")) == EXIT_FAULT


def raising(error: BaseException) -> Callable[[], None]:
    def act() -> None:
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("the file x"), 2, "physio-dist: wrong input or configuration: the file x (exit status 2)\n"),
        (DataError("shard y"), 3, "physio-dist: data failed verification: shard y (exit status 3)\n"),
        (Stopped("step 5 is saved"), 75, "physio-dist: stopped: step 5 is saved (exit status 75)\n"),
        (KeyboardInterrupt(), 75, "physio-dist: stopped: interrupted; the same command goes on where it can (exit"),
    ],
)
def test_status_of_exception_gives_status_and_one_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert status_of(raising(error)) == status
    assert capfd.readouterr().err.startswith(said)


def test_status_of_broken_pipe_is_silent_and_drops_buffered_output(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The process's standard output leads nowhere afterwards: a file of the test's own here, not pytest's.
    with (tmp_path / "out").open("w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        out.write("buffered")
        assert status_of(raising(BrokenPipeError())) == EXIT_FAULT
    assert (tmp_path / "out").read_text() == ""
    assert capfd.readouterr().err == ""


def test_status_of_internal_fault_keeps_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert status_of(raising(ZeroDivisionError("x"))) == 1
    told = capfd.readouterr().err
    assert "Traceback" in told
    assert "ZeroDivisionError: x" in told
    assert "this is a fault of physio-dist: please report it" in told
    assert status_of(lambda: None) == 0


@pytest.mark.integration
def test_status_of_ranks_of_one_launcher_prints_message_once() -> None:
    code = (
        "import os, sys\nfrom physio_dist.runtime import exit_status\nfrom physio_dist.errors import UserError\n"
        "def act(): raise UserError('wrong')\n"
        "if 'RANK' in os.environ: sys.exit(exit_status.status_of(act))\n"
        "import subprocess\n"
        "words = [sys.executable, sys.argv[0]]\n"
        "ranks = [subprocess.Popen(words, env={**os.environ, 'RANK': str(i), 'WORLD_SIZE': '3'}) for i in range(3)]\n"
        "print([rank.wait() for rank in ranks])\n"
    )
    script = Path(os.environ.get("TMPDIR", "/tmp")) / f"ranks-{os.getpid()}.py"
    script.write_text(code)
    try:
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, timeout=60)
    finally:
        script.unlink()
    assert done.stdout == "[2, 2, 2]\n"
    assert done.stderr == "physio-dist: wrong input or configuration: wrong (exit status 2)\n"


@pytest.mark.integration
def test_message_comes_after_unflushed_lines_in_a_common_file(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom physio_dist.errors import UserError\nfrom physio_dist.runtime.exit_status import status_of\n"
        "def act():\n    print('a line of a worker')\n    raise UserError('wrong')\nsys.exit(status_of(act))\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with (tmp_path / "log").open("wb") as log:
        done = subprocess.run([sys.executable, "-c", code], stdout=log, stderr=log, env=env, timeout=60)
    assert done.returncode == EXIT_USER
    worker, message = (tmp_path / "log").read_text().splitlines()
    assert worker == "a line of a worker" and message.startswith("physio-dist: wrong input")
