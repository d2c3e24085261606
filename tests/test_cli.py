"""The command line: every mistake is one clear line and the documented status."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def small(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of three people."""
    out = tmp_path_factory.mktemp("small") / "set"
    done = cli("shard", "simulate", "people=3,windows=1", "--out", out, "workers=1")
    assert done.returncode == 0, done.stderr
    return out


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """Message of a refused command: one line, no traceback, status 2."""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("physio-dist: wrong input or configuration: ")
    assert done.stderr.endswith(" (exit status 2)\n")
    return done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "the following arguments are required: VERB"),
        (["shrad"], "there is no verb 'shrad': did you mean 'shard'?"),
        (["shard"], "the following arguments are required: READER, INPUT, --out"),
        (["shard", "wfdb", "/in"], "the following arguments are required: --out"),
        (["shard", "wfdb", "/in", "--otu", "x"], "there is no option '--otu' here: did you mean '--out'?"),
        (["shard", "wfdb", "/in", "--ou", "x"], "there is no option '--ou' here: did you mean '--out'?"),
        (["shard", "wfbd", "/in", "--out", "x"], "there is no reader 'wfbd'; did you mean 'wfdb'?"),
        (["shard", "simulate", "people=x", "--out", "x"], "people=x is not a whole number"),
        (["shard", "simulate", "peple=2", "--out", "x"], "unknown key 'peple'"),
        (
            ["shard", "simulate", "", "--out", "x", "unusble=keep"],
            "unknown option 'unusble' (command line): did you mean",
        ),
        (
            ["shard", "simulate", "", "unusble=keep", "--out", "x"],
            "unknown option 'unusble' (command line): did you mean",
        ),
        (["shard", "simulate", "", "--out", "x", "label"], "does not take 'label'"),
        (["shard", "wfdb", "/no/where", "--out", "x"], "/no/where: no such folder"),
        (["verify", "/no/where"], "/no/where holds no index.json"),
        (["verify", "/no/where", "a=b"], "physio-dist verify does not take 'a=b'"),
        (["verify", "nonsense://x"], "no way to open nonsense:// URLs"),
        (["index", "/no/where", "channels=I"], "/no/where holds no .tar files; it has: nothing"),
        (["index", "/no/where", "channels=I,,II"], "channels=I,,II: it must name every row of the arrays, each only"),
        (["inspect", "/no/where", "--plot", "3"], "argument --plot: expected 2 arguments"),
        (["report"], "the following arguments are required: RUN"),
    ],
)
def test_mistake_gives_one_line_with_nearest_name(cli: Cli, tmp_path: Path, words: list[str], told: str) -> None:
    done = cli(*words, cwd=tmp_path)
    assert told in refused(done)
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "words", "told"),
    [
        ("-m physio_dist.launch", ["--conf", "x.yaml"], "the following arguments are required: --config; `python -m"),
        ("-m physio_dist.tune", ["--config"], "--config: expected one argument; `python -m physio_dist.tune --help`"),
        # The DeepSpeed launcher puts the rank before everything else.
        ("physio_dist/pretrain.py", ["--local_rank=0", "a=b"], "required: --config; `pretrain.py --help` tells more"),
        ("physio_dist/pretrain.py", ["--local_rank=0", "a=b", "--config=/x.yaml", "c=d"], "/x.yaml does not exist"),
    ],
)
def test_mistake_in_entry_point_gives_one_line(program: str, words: list[str], told: str) -> None:
    command = [sys.executable, *program.split(), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert told in refused(done)
    assert done.stdout == ""


def test_shard_of_folder_without_recordings_names_suffixes(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "the folder is empty" in refused(cli("shard", "wfdb", tmp_path / "in", "--out", tmp_path / "out"))
    (tmp_path / "in" / "photo.jpg").write_bytes(b"")
    told = refused(cli("shard", "wfdb", tmp_path / "in", "--out", tmp_path / "out"))
    assert "no records found" in told
    assert "1 .jpg" in told
    assert not (tmp_path / "out").exists()


def test_shard_options_may_precede_or_follow_target(cli: Cli, tmp_path: Path, small: Path) -> None:
    before = cli("shard", "simulate", "people=3,windows=1", "workers=1", "--out", tmp_path / "a", "split.val=0")
    first = cli("shard", "--out", tmp_path / "b", "simulate", "people=3,windows=1", "workers=1", "split.val=0")
    equals = cli("shard", "simulate", "people=3,windows=1", f"--out={tmp_path / 'c'}", "workers=1", "split.val=0")
    assert [done.returncode for done in (before, first, equals)] == [0, 0, 0], before.stderr
    indexes = {(tmp_path / name / "index.json").read_bytes() for name in "abc"}
    assert len(indexes) == 1
    assert indexes != {(small / "index.json").read_bytes()}


def test_shard_summary_marks_simulated_signals(cli: Cli, tmp_path: Path) -> None:
    done = cli("shard", "simulate", "people=3,windows=2", "--out", tmp_path, "workers=1", "unusable=keep")
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("6 windows of 3 people from 3 records in 1 shards (")
    assert first.endswith("- SIMULATED signals")
    assert last == f"{tmp_path}/index.json"


def test_progress_without_terminal_prints_at_most_ten_lines(cli: Cli, tmp_path: Path) -> None:
    done = cli("shard", "simulate", "people=400,windows=1", "--out", tmp_path, "workers=2", "samples_per_shard=10")
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr
    assert len([line for line in lines if line.startswith("reading: ")]) <= 10
    assert len([line for line in lines if line.startswith("writing: ")]) <= 10
    assert "reading: 400 of 400 records" in lines


def test_progress_on_terminal_is_a_bar(tmp_path: Path) -> None:
    leader, follower = os.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    words = [sys.executable, "-m", "physio_dist.cli", "shard", "simulate", "people=3,windows=1", "--out", str(tmp_path)]
    process = subprocess.Popen([*words, "workers=1"], stdout=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            piece = os.read(leader, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(leader)
    assert process.wait(60) == 0
    assert b"3/3" in shown
    assert b"\r" in shown


def test_closed_pipe_prints_no_error(small: Path) -> None:
    words = [sys.executable, "-m", "physio_dist.cli", "inspect", str(small)]
    # Python buffers what goes into a pipe, so that the pipe is found closed at the end; or at once, if told not to.
    for unbuffered in ("", "1"):
        env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 1
        process.stderr.close()


def test_help_lists_verbs_arguments_and_options(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("physio-dist 0.")
    for words in (["--help"], ["shard", "--help"], ["shard", "-h"]):
        done = cli(*words)
        assert (done.returncode, done.stderr) == (0, "")
    text = cli("shard", "--help").stdout
    assert "cpsc2018, dreamer, edf, simulate, wfdb" in text
    assert '  unusable ("drop")\n      keep unusable windows' in text


def test_console_script_runs_same_program(small: Path) -> None:
    script = Path(sys.executable).with_name("physio-dist")
    done = subprocess.run([script, "verify", small], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_report_of_missing_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    done = cli("report", tmp_path / "none")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
