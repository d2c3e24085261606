"""Pretraining as a Ray Train job, on two real nodes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from physio_dist.errors import UserError
from physio_dist.ray_backend import cluster, train_driver
from physio_dist.runs import job_paths
from physio_dist.runtime import processes
from tests.conftest import S3
from tests.system.clusters import MARK, Cluster, Make, RayRun, marked
from tests.system.launching import BIN, CONFIG, ROOT, Run, agree, end_session, wait_until

pytestmark = pytest.mark.xdist_group("ray")

# Long enough to be disturbed in the middle, with no checkpoint before.
LONG = ("train.steps=60", "train.save_every=1000", "train.val_every=1000")


@pytest.fixture()
def own_cluster() -> Iterator[dict[str, str]]:
    """An environment in which a driver starts a cluster of its own; what is left of one afterwards is a failure."""
    mark = {MARK: uuid.uuid4().hex}
    # Ray puts sockets there, whose paths must be short.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield {"RAY_ADDRESS": "local", "RAY_TMPDIR": folder, **mark}
    # Those that were told to end take their time on a busy machine.
    with contextlib.suppress(AssertionError):
        wait_until(lambda: not marked(mark[MARK]), "the cluster to end", 20)
    left = marked(mark[MARK])
    for process in left:
        process.kill()
    shutil.rmtree(folder, ignore_errors=True)
    assert not left


@pytest.fixture()
def checkout(tmp_path: Path) -> Path:
    """Code with a version of its own, beside an environment, a run and recordings, too large to be uploaded."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "physio_dist", folder / "physio_dist", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in (".gitignore", ".rayignore"):
        shutil.copy(ROOT / name, folder)
    (folder / "physio_dist" / "__init__.py").write_text('"""Uploaded."""\n\n__version__ = "0.0.0+uploaded"\n')
    for large in (folder / ".venv" / "lib", folder / "runs" / "old"):
        large.parent.mkdir()
        with large.open("wb") as file:
            file.truncate(2**31)
    (folder / "data").mkdir()
    with (folder / "data" / "one.edf").open("wb") as file:
        for _ in range(110):
            file.write(os.urandom(2**20))
    return folder


def wait_for_checkpoint(run: Run, step: int, process: subprocess.Popen[bytes]) -> None:
    manifest = run.path / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    wait_until(lambda: manifest.exists() or process.poll() is not None, f"step {step} of {run.name}", 180)
    assert process.poll() is None, run.said()


def test_submitted_job_equals_run_of_deepspeed_launcher(
    ray_run: Make, undisturbed: Callable[..., Run], checkout: Path, ray_nodes: Cluster
) -> None:
    run, reference = ray_run("zero.stage=1"), undisturbed("zero.stage=1")
    run.code = checkout
    assert run(launcher="job") == 0, run.said()
    agree(run, reference)
    (attempt,) = json.loads((run.path / "attempts.json").read_text())
    assert attempt["world"] == 2
    # Neither driver nor workers took the installed package.
    assert attempt["versions"]["physio-dist"] == "0.0.0+uploaded"
    assert sorted(file.name for file in (run.path / "trace").iterdir()) == ["rank-0.jsonl", "rank-1.jsonl"]
    told = run.told()
    assert told[0].startswith("Ray cluster at ")
    assert told[0].endswith("2 node(s), 2 CPU(s)")
    assert told[1] == f"dashboard: {ray_nodes.dashboard}"
    assert told[2].startswith(f"run {run.url}: 2 rank(s) of 1 CPU(s)")
    assert sum(line.startswith("step 7/16: loss") for line in told) == 1
    assert told[-1] == "done"
    records = subprocess.run(
        [str(BIN / "ray"), "job", "list", "--address", ray_nodes.dashboard, "-v"], env={**os.environ, **ray_nodes.env},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert "physio_dist.launch" in records
    assert S3.secret not in records
    assert ray_nodes.env["RAY_AUTH_TOKEN"] not in records


def test_worker_killed_after_checkpoint_repeats_no_step(ray_run: Make, undisturbed: Callable[..., Run]) -> None:
    run, reference = ray_run("zero.stage=1"), undisturbed("zero.stage=1")
    assert run.cluster is not None
    process = run.start()
    try:
        wait_for_checkpoint(run, 10, process)
        run.cluster.workers()[0].kill()
        assert process.wait(timeout=180) == 0, run.said()
    finally:
        end_session(process)
    assert run.starts() == [0, 10]
    agree(run, reference)
    (lost,) = [line for line in run.told() if line.startswith("lost a worker")]
    assert "rank " in lost
    assert run.told()[-1] == "done"


def signalled(run: RayRun, number: signal.Signals) -> int:
    """Start it, signal its driver after some steps; the step that it saved then."""
    process = run.start()
    try:
        run.wait_for_step(process, 3)
        if number == signal.SIGINT:
            # A terminal sends it to the whole foreground group, here with the cluster that the driver started.
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(timeout=120) == 75, run.said()
    finally:
        end_session(process)
    # All ranks came to their end before the driver did.
    assert json.loads((run.path / "lease.json").read_text())["released"]
    assert run.told()[0].startswith("started a Ray cluster" if number == signal.SIGINT else "Ray cluster at ")
    saved = max(run.metrics())
    assert run.told()[-1] == f"stopped: stopped ({number.name}) after saving step {saved} (exit status 75)"
    assert any(line.startswith(f"{number.name}: the ranks finish their step") for line in run.told())
    return saved


def without_ray(run: RayRun) -> Run:
    """The same run for other launchers."""
    return Run(run.folder, run.name, run.index, run.options)


def test_ctrl_c_saves_and_ends_with_75_and_any_launcher_continues(
    ray_run: Make, undisturbed: Callable[..., Run], own_cluster: dict[str, str]
) -> None:
    run = ray_run(*LONG)
    run.env = own_cluster
    saved = signalled(run, signal.SIGINT)
    assert without_ray(run)() == 0, run.said()
    assert run.starts() == [0, saved]
    agree(run, undisturbed(*LONG))


def test_signal_before_training_ends_with_75(ray_run: Make) -> None:
    """While it waits for room, and while Ray starts the workers."""
    run = ray_run("cluster.placement_timeout_s=600")
    for ranks, said in ((3, "waiting up to "), (2, "2 rank(s) of 1 CPU(s), up to ")):
        process = run.start(ranks)
        try:
            wait_until(lambda said=said: said in run.said(), said)  # type: ignore[misc]
            process.terminate()
            assert process.wait(timeout=60) == 75, run.said()
        finally:
            end_session(process)
        assert run.told()[-1].startswith("stopped: ")
        assert run.told()[-1].endswith("(exit status 75)")
    assert not run.path.exists()


def test_stopped_job_saves_first(ray_run: Make, checkout: Path, ray_nodes: Cluster) -> None:
    run = ray_run("train.steps=100000", "train.save_every=100000")
    run.code = checkout
    process = run.start(launcher="job")
    try:
        run.wait_for_step(process, 3)
        name = next(word for word in run.said().split("'") if word.startswith("raysubmit_"))
        stop = [str(BIN / "ray"), "job", "stop", "--address", ray_nodes.dashboard, name]
        subprocess.run(stop, env={**os.environ, **ray_nodes.env}, check=True, timeout=120)
        assert process.wait(timeout=60) in (0, 1)
    finally:
        end_session(process)
    saved = max(run.metrics())
    assert (run.path / "checkpoints" / f"step-{saved:08d}" / "manifest.json").is_file()
    assert run.told()[-1] == f"stopped: stopped (SIGTERM) after saving step {saved} (exit status 75)"


def test_terminated_driver_saves_and_killed_driver_ends_its_ranks(
    ray_run: Make, undisturbed: Callable[..., Run], ray_nodes: Cluster
) -> None:
    run, reference = ray_run(*LONG), undisturbed(*LONG)
    saved = signalled(run, signal.SIGTERM)
    checkpoint = saved // 5 * 5 + 5
    process = run.start(extra=("train.save_every=5",))
    try:
        wait_for_checkpoint(run, checkpoint, process)
        process.kill()
        process.wait(timeout=30)
        wait_until(lambda: not ray_nodes.workers(), "the ranks to end")
    finally:
        end_session(process)
    assert without_ray(run)() == 0, run.said()
    assert run.starts()[:2] == [0, saved]
    assert run.starts()[2] >= checkpoint
    agree(run, reference)


def test_run_ends_after_max_failures(ray_run: Make, ray_nodes: Cluster) -> None:
    """Before that, Ray's own metrics show it."""
    run = ray_run("cluster.max_failures=0", "train.steps=100000", "train.save_every=50")
    process = run.start()
    try:
        wait_for_checkpoint(run, 50, process)
        shown = f'run="{run.url}"'
        wait_until(lambda: any(shown in line for line in ray_nodes.metrics("ray_physio_dist_loss")), "the metrics")
        ray_nodes.workers()[0].kill()
        assert process.wait(timeout=120) == 1, run.said()
    finally:
        end_session(process)
    assert run.starts() == [0]
    assert run.told()[-1].startswith("failed: given up after 0 restart(s) (rank ")
    assert "goes on from the newest checkpoint" in run.told()[-1]


def test_user_error_is_reported_once_and_not_retried(ray_run: Make, tmp_path: Path) -> None:
    run = ray_run()
    run.index = str(tmp_path / "nowhere")
    assert run() == 2
    assert not run.path.exists()
    (message,) = [line for line in run.told() if "(exit status" in line]
    assert message.startswith(f"wrong input or configuration: {run.index} holds no index.json")
    assert message == run.told()[-1]
    assert not [line for line in run.told() if line.startswith("lost")]
    assert "UserError" not in run.said()


def test_data_that_differs_from_index_ends_run_with_3(ray_run: Make, simulated: str, tmp_path: Path) -> None:
    """Only the rank that reads the shard finds it; the other one waits for it in vain."""
    run = ray_run("train.steps=100000", "train.val_samples=0")
    broken = tmp_path / "broken"
    shutil.copytree(simulated, broken)
    run.index = str(broken)
    shard = sorted(broken.glob("*.tar"))[2]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert run() == 3, run.said()
    (message,) = [line for line in run.told() if "(exit status" in line]
    assert message.startswith("data failed verification: ")
    assert shard.name in message


def test_run_in_bucket_equals_local_run(s3: S3, ray_run: Make, undisturbed: Callable[..., Run]) -> None:
    """The nodes have the credentials; the driver has none."""
    run, reference = ray_run("zero.stage=1"), undisturbed("zero.stage=1")
    run.run_dir = f"{s3.bucket}/runs"
    assert run() == 0, run.said()
    there = RayRun(run.folder, run.name, run.index, run_dir=str(s3.folder / "runs"))
    agree(there, reference)
    assert run.told()[2].startswith(f"run {s3.bucket}/runs/run: 2 rank(s)")
    assert not list(Path(run.folder).glob("s3*"))


@pytest.fixture()
def losing(ray_nodes: Cluster) -> Iterator[Callable[[], None]]:
    """Loses one of the two nodes; another takes its place after the test."""
    yield ray_nodes.lose_node
    while not ray_nodes.nodes:
        ray_nodes.add_node()


def test_elastic_run_takes_available_nodes_and_survives_lost_node(
    ray_run: Make, undisturbed: Callable[..., Run], losing: Callable[[], None]
) -> None:
    exact = ("zero.stage=1", "train.precision=fp32", "model.dropout=0")
    run, reference = ray_run(*exact, "train.threads=0"), undisturbed(*exact)
    process = run.start(extra=("cluster.workers=[1,5]",))
    try:
        wait_for_checkpoint(run, 5, process)
        losing()
        assert process.wait(timeout=240) == 0, run.said()
    finally:
        end_session(process)
    attempts = json.loads((run.path / "attempts.json").read_text())
    assert [note["world"] for note in attempts] == [2, 1]
    # The ranks share the machine's cores, though Ray takes it for two machines.
    assert [note["threads"] for note in attempts] == [max(1, processes.cores() // 2), processes.cores()]
    assert run.starts()[1] in (5, 10)
    assert run.trace() == reference.trace()
    ours = [line["loss"] for line in run.metrics().values()]
    np.testing.assert_allclose(ours, [line["loss"] for line in reference.metrics().values()], atol=1e-3)


def test_driver_reports_while_it_waits_for_lost_node(ray_run: Make, losing: Callable[[], None]) -> None:
    run = ray_run("train.steps=100000")
    process = run.start()
    try:
        wait_for_checkpoint(run, 5, process)
        losing()
        assert process.wait(timeout=240) == 2, run.said()
    finally:
        end_session(process)
    short = "asked for 2 worker(s) of 1 CPU(s); the cluster has 1 CPU(s) and 0 GPU(s) on 1 node(s)"
    assert sum(short in line for line in run.told() if line.startswith("no room for the ranks, ")) >= 3
    assert short in run.told()[-1]
    assert "goes on from the newest checkpoint" in run.told()[-1]


def test_shortage_message_lists_available_resources(ray_run: Make) -> None:
    run = ray_run()
    assert run(ranks=3) == 2
    assert run.told()[-1].startswith(
        "wrong input or configuration: asked for 3 worker(s) of 1 CPU(s); the cluster has 2 CPU(s) and 0 GPU(s) on 2 "
        "node(s), 2 CPU(s)"
    )
    assert run(extra=("cluster.gpu=true", "cluster.placement_timeout_s=3")) == 2
    assert any(line.startswith("waiting up to 2 s for room: asked for 2 worker(s)") for line in run.told())
    assert "Waited 3 s in vain" in run.told()[-1]


def test_more_ranks_than_samples_are_refused(ray_run: Make) -> None:
    run = ray_run()
    assert run(ranks=17) == 2
    assert "17 ranks cannot share train.global_batch=16" in run.told()[-1]


@pytest.mark.parametrize("option", ["run.dir=runs", "data.index=set", "data.cache_dir=cache", "resume=runs/old"])
def test_relative_path_inside_ray_job_is_refused(tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A submitted job meets it in test_convert_ray.py."""
    monkeypatch.setenv(job_paths._JOB, "{}")
    absolute = (f"run.dir={tmp_path}", f"data.index={tmp_path}", f"data.cache_dir={tmp_path}")
    told = f"{option} is relative, and a Ray job's working directory vanishes with the job"
    with pytest.raises(UserError, match=told):
        train_driver.main(["--config", CONFIG, *absolute, option])


def refused(address: str, tmp_path: Path) -> str:
    """What the driver says of an address at which there is no cluster; within 30 s."""
    words = [sys.executable, "-m", "physio_dist.launch", "--config", CONFIG, "data.index=/nowhere"]
    done = subprocess.run(
        words, env={**os.environ, "RAY_ADDRESS": address}, cwd=tmp_path, capture_output=True, text=True, timeout=30,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    # Ray's own lines may come first.
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("physio-dist: ")]
    return line


def test_launch_without_cluster_at_address_is_refused(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        # Bound but not listening: refused.
        assert f"no Ray cluster answers at {address} (Connection refused)" in refused(address, tmp_path)
        listener.listen()
        assert f"no Ray cluster answers at {address} (timed out)" in refused(address, tmp_path)


def test_server_that_is_no_cluster_is_refused(tmp_path: Path, s3_server: S3, ray_nodes: Cluster) -> None:
    # The one speaks the protocol beneath Ray's, the other does not.
    for address in (f"127.0.0.1:{s3_server.port}", ray_nodes.dashboard.removeprefix("http://")):
        assert f"what answers at {address} is no Ray cluster" in refused(address, tmp_path)
    assert "not of the form HOST:PORT" in refused("somewhere", tmp_path)
    with pytest.raises(UserError, match="is an address for `ray job submit`"):
        cluster._probe("http://127.0.0.1:8265", "RAY_ADDRESS")


def test_wrong_token_is_refused(ray_nodes: Cluster, ray_run: Make) -> None:
    run = ray_run()
    run.env = {"RAY_AUTH_TOKEN": "b" * 64}
    assert run() == 2
    assert f"the Ray cluster at {ray_nodes.address} wants a token" in run.told()[-1]
    assert "b" * 64 not in run.said()


# A rank is lost, and Ray resizes at once, with a coordinator that answers slowly.
LOSING = """
import asyncio, ray
from physio_dist.ray_backend.coordinator import CoordinatorActor
from physio_dist.ray_backend.callbacks import FailureCallback, SaveBeforeResize

class Slow(CoordinatorActor):
    async def record_loss(self, message):
        await asyncio.sleep(1)
        await super().record_loss(message)

ray.init(log_to_driver=False)
coordinator = ray.remote(Slow).options(num_cpus=0).remote()
ray.get(coordinator.join.remote(0))
FailureCallback(coordinator).after_exception(None, {0: RuntimeError("gone")})
SaveBeforeResize(coordinator).before_controller_execute_resize_decision(None)
state = ray.get(coordinator.read.remote())
assert state.losses == ["rank 0: gone"] and not state.notes, state
"""


def test_resize_after_loss_requests_no_checkpoint(ray_nodes: Cluster) -> None:
    command = [sys.executable, "-c", LOSING]
    subprocess.run(command, env={**os.environ, **ray_nodes.env}, check=True, timeout=120)
