"""Prometheus metrics of runs on a Ray cluster, as cluster/observability discovers them."""

from __future__ import annotations

import re
import time

import pytest

from tests.cluster_files.test_observability import expressions, named
from tests.system.clusters import Cluster, Make
from tests.system.launching import end_session, wait_until

pytestmark = pytest.mark.xdist_group("ray")

# What only a node with a GPU has, and what only an autoscaler counts.
NOT_HERE = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_cluster_failed_nodes"}


def test_run_exports_metrics_until_it_ends(ray_run: Make, ray_nodes: Cluster) -> None:
    run = ray_run()
    began = time.monotonic()
    assert run() == 0, run.said()
    took = time.monotonic() - began
    last, lines = ray_nodes.figures(run.url), run.metrics()
    for name in ("samples", "loss", "lr", "grad_norm", "samples_per_s", "data_wait_frac"):
        assert last.pop(name) == lines[16][name], name
    assert last.pop("val_loss") == lines[16]["val_loss"]
    assert 0 < last.pop("step_age_s") < took
    assert 0 < last.pop("checkpoint_age_s") < took
    assert 0 < last.pop("checkpoint_every_s") < took
    # No rank is at work any more.
    assert last == {"step": 16, "steps": 16, "ranks": 0, "restarts": 0, "nonfinite": 0}
    # The dashboard's other series are there too.
    there = {re.split(r"[{ ]", line)[0] for line in ray_nodes.metrics("ray_")}
    assert set().union(*map(named, expressions())) - there <= NOT_HERE | {
        f"ray_physio_dist_{name}" for name in ("trials", "trials_done", "trials_running")
    }
    wait_until(lambda: not ray_nodes.figures(run.url), "the figures to go", 60)


def test_metrics_count_restarts_of_running_run(ray_run: Make, ray_nodes: Cluster) -> None:
    run = ray_run("train.steps=100000", "train.save_every=20", "train.log_every=1000", "train.val_every=100000")
    process = run.start()
    try:
        # Between two logged steps the step is told all the same.
        wait_until(lambda: ray_nodes.figures(run.url).get("step", 0) > 20, "a checkpoint")
        assert ray_nodes.figures(run.url)["restarts"] == 0
        assert set(run.metrics()) == {1}
        ray_nodes.workers()[0].kill()
        wait_until(lambda: ray_nodes.figures(run.url).get("restarts") == 1, "the restart")
        wait_until(lambda: ray_nodes.figures(run.url).get("ranks") == 2, "the ranks' return")
    finally:
        end_session(process)
        process.wait()


def test_metrics_flag_nonfinite_loss(ray_run: Make, ray_nodes: Cluster) -> None:
    run = ray_run("train.lr=1e30", "train.min_lr=1e30", "train.warmup_steps=1", "train.max_grad_norm=1e30")
    assert run() == 1, run.said()
    assert ray_nodes.figures(run.url)["nonfinite"] == 1
