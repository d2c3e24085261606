"""Result, warnings and errors of `physio-dist plan`."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from physio_dist import storage
from physio_dist.config import PretrainConfig, ShardSource
from physio_dist.data.format.index import ShardSet
from physio_dist.errors import UserError
from physio_dist.models.encoders.criss_cross import count_parameters, preset
from physio_dist.planning.resource_planner import Cluster, format_plan, plan, saved_bytes
from tests.conftest import S3
from tests.data.conftest import build

Make = Callable[..., ShardSet]
Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def options(url: str, **train: object) -> PretrainConfig:
    made = PretrainConfig()
    made.data.index = [ShardSource(url)]
    made.model.preset = "tiny"
    made.train.global_batch, made.train.steps, made.train.micro_batch = 8, 100, 4
    for name, value in train.items():
        setattr(made.train, name, value)
    return made


@pytest.fixture()
def make_set() -> Make:
    return build


@pytest.fixture()
def remote(make_set: Make, s3_here: S3) -> ShardSet:
    return make_set(s3_here.bucket, sizes=(20,) * 20, length=400, every=1000)


def test_plan_figures_are_consistent(remote: ShardSet) -> None:
    told = plan(options(remote.url), Cluster(2, 2, samples_per_s=400.0))
    fed, room = told["feed"], told["memory"]
    assert (told["world"], told["step_s"], told["hours"]) == (4, 8 / 400, pytest.approx(800 / 400 / 3600))
    assert told["epochs"] == 2.0
    total = sum(shard.filesize for shard in remote.shards)
    assert fed["bytes_of_shards"] == total
    assert total <= sum(fed["node_bytes_first_epoch"][k] for k in ("least", "most")) <= 1.2 * total
    assert fed["run_bytes"] <= 2 * total
    assert fed["rank_bytes_per_s"] == 100 * 2 * 2 * 400
    assert fed["storage_bytes_per_s"] == pytest.approx(fed["amplification"] * total / (400 / 400))
    assert fed["sample_table_bytes"] == 2 * storage.size(remote.url + "/samples.safetensors")
    assert room["parameters"] == count_parameters(preset("tiny"))
    stages = room["by_stage_gb"]
    assert stages["0"] - room["activations_gb"] == pytest.approx(16 * room["parameters"] / 1e9)
    assert stages["0"] > stages["1"] > stages["2"] > stages["3"] > room["activations_gb"]
    assert (room["micro_batch"], room["passes"]) == (2, 1)
    json.dumps(told)


def test_saved_bytes_grow_with_layers_and_shrink_with_precision(make_set: Make, tmp_path: Path) -> None:
    given = options(make_set(str(tmp_path / "set")).url, precision="fp32")
    tiny = preset("tiny")
    one = saved_bytes(given, tiny, (12, 2000))
    assert saved_bytes(given, tiny, (12, 4000)) == pytest.approx(2 * one, rel=0.2)
    deeper = saved_bytes(given, replace(tiny, layers=3 * tiny.layers), (12, 2000))
    assert 1.5 * one < deeper < 3 * one
    given.train.precision = "bf16"
    assert saved_bytes(given, tiny, (12, 2000)) < 0.9 * one
    given.model.preset = "large"
    assert saved_bytes(given, replace(tiny, layers=3 * tiny.layers), (12, 2000)) < 0.6 * deeper


@pytest.mark.parametrize(
    ("change", "cluster", "told"),
    [
        ({}, Cluster(1, 1, samples_per_s=10.0), None),
        ({"cache_gb": 1e-4}, Cluster(1, 1, samples_per_s=10.0), "cache: up to .* data.cache_gb=0.0001 holds"),
        ({}, Cluster(1, 1, samples_per_s=1e9), "feed: 1,000,000,000 samples/s a GPU are"),
        ({}, Cluster(1, 1, samples_per_s=1e9), "storage: .* so that epoch waits for storage"),
        ({"global_batch": 200}, Cluster(16, 1, samples_per_s=10.0), "shards: each is fetched .* divides 128"),
        ({}, Cluster(1, 1, gpu_gb=0.001, samples_per_s=10.0), "memory: about .* lower train.micro_batch"),
        ({}, Cluster(1, 3, samples_per_s=10.0), "batch: 8 samples on 3 ranks are 3 on the widest .* 12% more"),
        ({"steps": 20}, Cluster(1, 1, samples_per_s=10.0), "steps: the run ends after 0.40 epochs"),
        ({}, Cluster(1, 8), "speed: a GPU is busier with starting operations"),
    ],
)  # fmt: skip
def test_plan_warns_about_each_limit(
    remote: ShardSet, change: dict[str, float], cluster: Cluster, told: str | None
) -> None:
    given = options(remote.url, **{k: v for k, v in change.items() if k != "cache_gb"})
    given.data.cache_gb = change.get("cache_gb", 50.0)
    lines = list(format_plan(plan(given, cluster)))
    warnings = [line for line in lines if line.startswith("warning: ")]
    if told is None:
        assert warnings == []
        assert lines[-1] == "all of it holds"
    else:
        assert [line for line in warnings if re.search(told, line)], lines


def test_plan_raises_on_invalid_options(make_set: Make, tmp_path: Path) -> None:
    url = make_set(str(tmp_path / "set")).url
    for given, cluster, told in (
        (options(url, global_batch=4), Cluster(5, 1), "5 ranks cannot share a global batch of 4"),
        (options(url, global_batch=500), Cluster(1, 1), "holds 9 samples, fewer than the 500"),
        (options(str(tmp_path)), Cluster(1, 1), "holds no index.json"),
        (options(url), Cluster(0, 1), "--nodes and --gpus-per-node must be at least 1"),
        (options(url), Cluster(1, 1, gpu="Z80"), "--gpu Z80: its peak is not known; known are H200"),
    ):
        with pytest.raises(UserError, match=told):
            plan(given, cluster)


def test_plan_command_prints_lines_or_json(make_set: Make, tmp_path: Path, cli: Cli) -> None:
    url = make_set(str(tmp_path / "set"), length=400).url
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{index: {url}}}\nmodel: {{preset: tiny}}\ntrain: {{global_batch: 4}}\n")
    words = ["plan", "--config", config, "--nodes", 1, "--gpus-per-node", 2, "train.steps=7"]
    lines = cli(*words)
    assert lines.returncode == 0, lines.stderr
    assert lines.stdout.startswith("1 nodes x 2 GPUs = 2 ranks, global batch 4\n")
    assert "read where they lie" in lines.stdout
    told = json.loads(cli(*words, "--json").stdout)
    assert (told["steps"], told["world"]) == (7, 2)
    for wrong, why in (
        (["--nodes", "many"], "invalid int value"),
        (["--samples-per-s", "0"], "must be positive numbers"),
        (["--noodles", "1"], "there is no option '--noodles' here"),
        (["trian.steps=7"], "train"),
    ):
        done = cli(*words, *wrong)
        assert done.returncode == 2
        assert why in done.stderr
        assert "Traceback" not in done.stderr
