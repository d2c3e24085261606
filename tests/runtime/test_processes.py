"""Lifetimes of processes that depend on others."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from physio_dist.runtime import processes

pytestmark = pytest.mark.integration


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


def test_die_with_parent_ends_child_of_killed_parent() -> None:
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {CHILD.format(parent='None')!r}]).wait()"
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert gone(child)
    parent.stdout.close()


def test_die_with_parent_ends_child_whose_parent_has_ended() -> None:
    done = subprocess.run([sys.executable, "-c", CHILD.format(parent=1)], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-9, b"")
    code = CHILD.format(parent="os.getppid()").replace("time.sleep(100)", "")
    assert (
        subprocess.run([sys.executable, "-c", code], timeout=60, check=False, stdout=subprocess.DEVNULL).returncode == 0
    )


def test_watch_launchers_notices_killed_launcher_once(tmp_path: Path) -> None:
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


def test_hard_exit_after_ends_hanging_process() -> None:
    code = (
        "import time\nfrom physio_dist.runtime import processes\n"
        "processes.hard_exit_after(0.1, 75, 'a peer is gone')\ntime.sleep(100)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (75, "physio-dist: a peer is gone; giving up after 0.1 s\n")
