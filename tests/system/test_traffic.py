"""Planned network traffic compared with the requests that a server counted in a run of two nodes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import Proxied
from tests.system.launching import CONFIG, ROOT, end_session, free_port, physio

# Long enough for the second epoch to fetch what the first left out.
STEPS = 30


def two_nodes(folder: Path, env: dict[str, str], words: list[str]) -> list[int]:
    """The run's exit statuses, each rank on a node of its own, which here is a cache of its own."""
    place = {**os.environ, **env, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = []
    for rank in (0, 1):
        its = {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "XDG_CACHE_HOME": f"{folder}/x{rank}"}
        command = [sys.executable, str(ROOT / "physio_dist" / "pretrain.py"), "--config", CONFIG, *words]
        with (folder / f"rank{rank}.log").open("wb") as log:
            words_of_rank = [*command, f"data.cache_dir={folder / f'node{rank}'}"]
            ranks.append(
                subprocess.Popen(words_of_rank, env={**place, **its}, stdout=log, stderr=log, start_new_session=True)
            )
    try:
        return [process.wait(timeout=240) for process in ranks]
    finally:
        for process in ranks:
            end_session(process)


def test_planned_traffic_matches_server_count(proxied: Proxied, tmp_path: Path) -> None:
    index = f"{proxied.bucket}/set"
    env = proxied.env
    made = physio("shard", "simulate", "people=60,windows=6,seed=3", "--out", index, "samples_per_shard=8", env=env)
    assert made.returncode == 0, made.stderr
    words = [
        f"run.dir={tmp_path / 'runs'}", f"data.index={index}", f"train.steps={STEPS}", "train.global_batch=16",
        "train.warmup_steps=3", "train.val_samples=0", "train.save_every=1000", "train.threads=1",
    ]  # fmt: skip
    plan = ["plan", "--config", CONFIG, "--nodes", "2", "--gpus-per-node", "1", "--json", *words]
    told = json.loads(physio(*plan, env=env).stdout)
    assert told["epochs"] > 1.4
    before = sum(proxied.proxy.sent().values())
    assert two_nodes(tmp_path, env, words) == [0, 0], (tmp_path / "rank0.log").read_text()
    counted = sum(proxied.proxy.sent().values()) - before
    print(f"foreseen {told['feed']['run_bytes']}, counted {counted}")
    assert abs(told["feed"]["run_bytes"] - counted) <= 0.02 * counted
    first = told["feed"]["node_bytes_first_epoch"]
    assert told["feed"]["amplification"] < 1.3
    assert first["most"] < 0.7 * told["feed"]["bytes_of_shards"]
