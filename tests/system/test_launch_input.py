"""Wrong input when a run is launched on a cluster: one message, status 2. See also test_launch.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import S3
from tests.system.clusters import Cluster, Make, RayRun
from tests.system.launching import BIN, CONFIG, ROOT, end_session, wait_until

pytestmark = pytest.mark.xdist_group("ray")


def refused(run: RayRun, *words: str) -> None:
    """It ends with status 2 and one message, without a try more and without a run."""
    assert run() == 2, run.said()
    (message,) = [line for line in run.told() if "(exit status" in line]
    assert message == run.told()[-1]
    for word in ("wrong input or configuration: ", *words):
        assert word in message
    assert not [line for line in run.told() if line.startswith("lost a worker")]
    assert not (run.path / "config.yaml").exists()


def test_driver_with_other_ray_version_is_refused(ray_nodes: Cluster, tmp_path: Path) -> None:
    # Ray compares what the driver says of itself with what the head noted at its start.
    code = (
        "import sys, ray; ray.__version__ = '2.55.0'\n"
        "from physio_dist.ray_backend import train_driver\nfrom physio_dist.runtime import exit_status\n"
        "exit_status.end_rank(exit_status.status_of(lambda: train_driver.main(sys.argv[1:])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--config", CONFIG, "data.index=/nowhere"], env={**os.environ, **ray_nodes.env},
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("physio-dist: ")]
    assert f"the Ray cluster at {ray_nodes.address} runs Ray " in line
    assert "this driver Ray 2.55.0 and Python " in line
    assert "ray job submit" in line
    assert "Traceback" not in done.stderr


def test_node_with_other_packages_is_named(ray_run: Make, with_node: Callable[..., None], tmp_path: Path) -> None:
    older = tmp_path / "older"
    shutil.copytree(ROOT / "physio_dist", older / "physio_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (older / "physio_dist" / "__init__.py").write_text('"""Older."""\n\n__version__ = "0.0.1"\n')
    with_node(PYTHONPATH=str(older))
    refused(ray_run(), "physio-dist is 0.0.1 on node ", " where the command was started: install the same")
    # What pip left beside a package is what tells its version.
    facts = tmp_path / "other" / "torch-1.0.0.dist-info" / "METADATA"
    facts.parent.mkdir(parents=True)
    facts.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0.0\n")
    with_node(PYTHONPATH=f"{tmp_path / 'other'}:{ROOT}")
    run = ray_run(name="torch")
    refused(run, "torch is ", "1.0.0 on node ", "install the same version on every node")


def test_node_without_bucket_access_is_named(
    s3: S3, ray_run: Make, with_node: Callable[..., None], simulated: str
) -> None:
    shutil.copytree(simulated, s3.folder / "set")
    with_node(AWS_SECRET_ACCESS_KEY="a secret that was changed since", PYTHONPATH=str(ROOT))
    run = ray_run()
    run.index = f"{s3.bucket}/set"
    refused(run, f"cannot read {s3.bucket}/set", "access denied", "check the credentials", "(rank ", " on node ")
    assert S3.secret not in run.said()


def test_unwritable_cache_path_is_refused(ray_run: Make, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(ray_run(f"data.cache_dir={tmp_path}/file/cache"), f"data.cache_dir={tmp_path}/file/cache: cannot make")


def test_live_run_of_another_launcher_is_refused(ray_run: Make, tmp_path: Path) -> None:
    """Two drivers on one cluster are in test_gpu_placement.py."""
    other = ray_run("train.steps=100000", "train.save_every=100000")
    process = super(RayRun, other).start(1, "python")
    try:
        wait_until(lambda: (other.path / "lease.json").exists() or process.poll() is not None, "the other launcher")
        run = ray_run("train.steps=100000", "train.save_every=100000")
        run.run_dir, run.folder = str(other.path.parent), tmp_path / "mine"
        run.folder.mkdir()
        assert run(1) == 2, run.said()
        assert f"the run at {run.url} is live: process {process.pid} on " in run.told()[-1]
        assert "another run.name" in run.told()[-1]
        assert json.loads((other.path / "lease.json").read_text())["pid"] == process.pid
    finally:
        end_session(process)


def test_oversized_working_directory_is_refused(ray_nodes: Cluster, tmp_path: Path) -> None:
    """Ray's own words, which docs/troubleshooting.md explains."""
    with (tmp_path / "recordings").open("wb") as file:
        for _ in range(110):
            file.write(os.urandom(2**20))
    submit = [str(BIN / "ray"), "job", "submit", "--address", ray_nodes.dashboard, "--working-dir", str(tmp_path)]
    done = subprocess.run(
        [*submit, "--", "true"], env={**os.environ, **ray_nodes.env}, capture_output=True, text=True, timeout=120,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Request failed with status code 413: Maximum request body size 104857600 exceeded" in done.stderr
