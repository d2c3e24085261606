"""The command line: every mistake is one clear line and the documented status."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from physio_dist.errors import DataError, Stopped, UserError
from physio_dist.runtime import exit_status, processes

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
def test_mistakes_are_told_in_one_line_with_the_nearest_right_word(
    cli: Cli, tmp_path: Path, words: list[str], told: str
) -> None:
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
def test_mistakes_of_what_launchers_start_are_told_in_the_same_way(program: str, words: list[str], told: str) -> None:
    command = [sys.executable, *program.split(), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert told in refused(done)
    assert done.stdout == ""


def test_folders_without_recordings_say_what_was_looked_for(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    assert "the folder is empty" in refused(cli("shard", "wfdb", tmp_path / "in", "--out", tmp_path / "out"))
    (tmp_path / "in" / "photo.jpg").write_bytes(b"")
    told = refused(cli("shard", "wfdb", tmp_path / "in", "--out", tmp_path / "out"))
    assert "no records found" in told
    assert "1 .jpg" in told
    assert not (tmp_path / "out").exists()


def test_options_may_stand_before_and_after_the_target(cli: Cli, tmp_path: Path, small: Path) -> None:
    before = cli("shard", "simulate", "people=3,windows=1", "workers=1", "--out", tmp_path / "a", "split.val=0")
    first = cli("shard", "--out", tmp_path / "b", "simulate", "people=3,windows=1", "workers=1", "split.val=0")
    equals = cli("shard", "simulate", "people=3,windows=1", f"--out={tmp_path / 'c'}", "workers=1", "split.val=0")
    assert [done.returncode for done in (before, first, equals)] == [0, 0, 0], before.stderr
    indexes = {(tmp_path / name / "index.json").read_bytes() for name in "abc"}
    assert len(indexes) == 1
    assert indexes != {(small / "index.json").read_bytes()}


def test_the_summary_names_what_was_made_and_says_simulated(cli: Cli, tmp_path: Path) -> None:
    done = cli("shard", "simulate", "people=3,windows=2", "--out", tmp_path, "workers=1", "unusable=keep")
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("6 windows of 3 people from 3 records in 1 shards (")
    assert first.endswith("- SIMULATED signals")
    assert last == f"{tmp_path}/index.json"


def test_progress_on_no_terminal_is_at_most_a_line_a_tenth(cli: Cli, tmp_path: Path) -> None:
    done = cli("shard", "simulate", "people=400,windows=1", "--out", tmp_path, "workers=2", "samples_per_shard=10")
    lines = done.stderr.splitlines()
    assert "\r" not in done.stderr
    assert len([line for line in lines if line.startswith("reading: ")]) <= 10
    assert len([line for line in lines if line.startswith("writing: ")]) <= 10
    assert "reading: 400 of 400 records" in lines


def test_progress_on_a_terminal_is_a_bar(tmp_path: Path) -> None:
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


def test_a_reader_that_closes_the_pipe_early_hears_no_complaint(small: Path) -> None:
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


def test_help_and_version_are_told(cli: Cli) -> None:
    assert cli("--version").stdout.startswith("physio-dist 0.")
    for words in (["--help"], ["shard", "--help"], ["shard", "-h"]):
        done = cli(*words)
        assert (done.returncode, done.stderr) == (0, "")
    assert "cpsc2018, dreamer, edf, simulate, wfdb" in cli("shard", "--help").stdout


def test_the_console_script_is_the_same_program(small: Path) -> None:
    script = Path(sys.executable).with_name("physio-dist")
    done = subprocess.run([script, "verify", small], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_report_of_no_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    done = cli("report", tmp_path / "none")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


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
        (BrokenPipeError(), 1, ""),
    ],
)
def test_each_end_has_its_status_and_its_line(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, said: str
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    # A closed pipe makes the process forget its standard output, which is pytest's here.
    saved = os.dup(1)
    try:
        assert exit_status.status_of(raising(error)) == status
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    told = capfd.readouterr().err
    assert told.startswith(said)
    assert bool(told) == bool(said)


def test_a_fault_of_ours_keeps_its_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    assert exit_status.status_of(raising(ZeroDivisionError("x"))) == 1
    told = capfd.readouterr().err
    assert "Traceback" in told
    assert "ZeroDivisionError: x" in told
    assert "this is a fault of physio-dist: please report it" in told
    assert exit_status.status_of(lambda: None) == 0


def test_of_the_ranks_of_one_launcher_one_speaks() -> None:
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


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has), within a while."""
    for _ in range(200):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


CHILD = (
    "import os, sys, time\nfrom physio_dist.runtime import processes\n"
    "processes.die_with_parent(parent={parent})\nprint(os.getpid(), flush=True)\ntime.sleep(100)\n"
)


def test_a_child_ends_with_its_parent_however_that_ends() -> None:
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {CHILD.format(parent='None')!r}]).wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert gone(child)
    parent.stdout.close()


def test_a_child_whose_parent_had_ended_already_ends_too() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD.format(parent=1)], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-9, b"")
    code = CHILD.format(parent="os.getppid()").replace("time.sleep(100)", "")
    assert (
        subprocess.run([sys.executable, "-c", code], timeout=60, check=False, stdout=subprocess.DEVNULL).returncode == 0
    )


def test_a_lost_launcher_is_noticed_once_even_as_a_zombie(tmp_path: Path) -> None:
    rank = (
        "import time\nfrom physio_dist.runtime import processes\n"
        "processes.watch_launchers(lambda: print('lost', flush=True), every_s=0.05)\n"
        "print(len(processes.launcher_chain()), flush=True)\ntime.sleep(3)\n"
    )
    launcher = tmp_path / "torchrun"
    launcher.write_text(f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {rank!r}]).wait()")
    process = subprocess.Popen([sys.executable, str(launcher)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    process.kill()  # and nobody waits for it yet
    assert process.stdout.read() == "lost\n"
    process.wait()
    process.stdout.close()
    assert processes.launcher_chain() == []


def test_a_process_that_does_not_end_is_ended() -> None:
    code = (
        "import time\nfrom physio_dist.runtime import processes\n"
        "processes.hard_exit_after(0.1, 75, 'a peer is gone')\ntime.sleep(100)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (75, "physio-dist: a peer is gone; giving up after 0.1 s\n")
