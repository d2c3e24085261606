"""From ``ray job submit`` to the first training step on a warm cluster of two nodes: ``python tools/bench/submit.py``.

docs/benchmarks.md says what is measured and how. The table and, as the last line, one JSON object go to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
from common import BenchError, finish, free_port, last_line, say
from ranks import BIN, ROOT, make_set

from physio_dist.runtime import processes

MARK = "PHYSIO_DIST_BENCH_CLUSTER"
STAGES = (
    "driver runs", "its imports", "connected", "workers started", "process group up", "rank's imports", "data opened",
    "engine built", "first step done",
)  # fmt: skip
_UP_S = 120.0
_LIMIT_S = 600.0


@contextlib.contextmanager
def two_nodes() -> Iterator[dict[str, str]]:
    """Two Ray nodes of one CPU each on this machine; what a client needs to reach them."""
    # Ray puts sockets there, whose paths must be short.
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    mark, head, board = uuid.uuid4().hex, f"127.0.0.1:{free_port()}", free_port()
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
    ports = ["--port", head.rpartition(":")[2], "--dashboard-port", str(board)]
    ports += ["--ray-client-server-port", str(free_port())]
    try:
        for number, words in enumerate((["--head", *ports], ["--address", head])):
            log = folder / f"{number}.log"
            more = ["--num-cpus", "1", "--temp-dir", str(folder / str(number)), "--object-store-memory", "80000000"]
            more += ["--dashboard-agent-listen-port", str(free_port())]
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [str(BIN / "ray"), "start", *words, "--block", *more],
                    env={**os.environ, **env, MARK: mark, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"},
                    stdout=file, stderr=file, start_new_session=True,
                )  # fmt: skip
            end = time.monotonic() + _UP_S
            while "--block" not in log.read_text():
                if process.poll() is not None or time.monotonic() > end:
                    raise BenchError(f"a Ray node does not start:\n{log.read_text()[-2000:]}")
                time.sleep(0.05)
        yield {**env, "RAY_ADDRESS": head, "dashboard": f"http://127.0.0.1:{board}"}
    finally:
        _end(mark)
        shutil.rmtree(folder, ignore_errors=True)


def _end(mark: str) -> None:
    for _ in range(50):
        living = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                    living.append(process)
                    process.kill()
        if not living:
            return
        time.sleep(0.1)


def submit(client: dict[str, str], data: Path, folder: Path, ranks: int) -> tuple[dict[str, float], dict[str, float]]:
    """Submit a run of two steps.

    Returns:
        By stage, seconds since the submission after which the slowest process had reached it; CPU seconds by process:
        of the client, the driver, and the workers together, up to the last stage that each reached.
    """
    marks = folder / "marks"
    marks.mkdir(parents=True)
    words = [
        BIN / "ray", "job", "submit", "--address", client["dashboard"], "--working-dir", ROOT, "--",
        sys.executable, "tools/bench/marked.py", marks, "--config", "configs/pretrain/quickstart.yaml",
        f"run.dir={folder}", f"run.name=run-{folder.name}", f"data.index={data}", f"data.cache_dir={folder / 'cache'}",
        "train.steps=2", "train.warmup_steps=1", "train.log_every=1", "train.val_samples=0", "train.threads=1",
        f"cluster.workers={ranks}",
    ]  # fmt: skip
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.time()
    done = subprocess.run(
        [str(word) for word in words], env={**os.environ, **client}, capture_output=True, text=True, timeout=_LIMIT_S
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise BenchError(f"the job ended with {done.returncode}:\n{done.stdout[-3000:]}")
    reached: dict[str, float] = {}
    cpu = {"client": after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime, "driver": 0.0, "workers": 0.0}
    for file in marks.glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        cpu["driver" if lines[0]["name"] == STAGES[0] else "workers"] += lines[-1]["cpu"]
        for line in lines:
            reached[line["name"]] = max(reached.get(line["name"], 0.0), line["time"] - began)
    return {stage: reached[stage] for stage in STAGES}, cpu


def run(options: argparse.Namespace) -> str:
    """All measures; prints the table.

    Returns:
        The last line.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="physio-dist-bench-")))
        data = make_set(folder)
        given = {"dashboard": options.dashboard} if "RAY_ADDRESS" in os.environ else None
        client = given or stack.enter_context(two_nodes())
        say("warms up")
        submit(client, data, folder / "warm", options.ranks)
        found = []
        for number in range(options.repeats):
            found.append(submit(client, data, folder / str(number), options.ranks))
            say(f"repeat {number + 1} of {options.repeats}: {found[-1][0][STAGES[-1]]:.1f} s")
    # Rounded once, so that all that is told of a stage agrees.
    middle = {stage: round(statistics.median(one[stage] for one, _ in found), 2) for stage in STAGES}
    cpu = {name: statistics.median(one[name] for _, one in found) for name in found[0][1]}
    print(f"From ray job submit to the first step, {options.ranks} ranks, {processes.cores()} cores, seconds")
    before = 0.0
    for stage in STAGES:
        print(f"  {stage:18} {middle[stage]:8.1f}  +{middle[stage] - before:.1f}")
        before = middle[stage]
    print("  CPU seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in cpu.items()))
    return last_line("submit", "s", options.repeats, middle[STAGES[-1]], {}, {"stages": middle, "cpu_s": cpu})


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dashboard", default="http://127.0.0.1:8265", help="of the cluster that RAY_ADDRESS names")
    options = parser.parse_args()
    if min(options.ranks, options.repeats) < 1:
        parser.error("--ranks and --repeats must be at least 1")
    return finish(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
