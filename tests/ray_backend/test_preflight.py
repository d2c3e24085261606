"""Preflight check of ranks; tests/system/test_launch_input.py runs it on a cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from physio_dist import __version__
from physio_dist.ray_backend import preflight
from physio_dist.ray_backend.preflight import RankEnv, check_env

GOOD = RankEnv("10.0.0.1", "1.0", {"torch": "2.13.0+cu130", "deepspeed": "0.19.8"}, True, "0,1")


def test_collect_env_describes_this_process() -> None:
    env = preflight.collect_env()
    assert env.version == __version__
    assert env.versions["torch"] == torch.__version__
    assert env.versions["deepspeed"]
    assert env.cuda == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("change", "gpu", "message"),
    [
        ({}, True, None),
        ({"cuda": False}, False, None),
        ({"version": "0.9"}, True, "physio-dist is 0.9 on node 10.0.0.2 and 1.0 where the command was started"),
        ({"versions": {**GOOD.versions, "torch": "2.9"}}, True, "torch is 2.13.0+cu130 on node 10.0.0.1 and 2.9 on"),
        ({"versions": {**GOOD.versions, "deepspeed": ""}}, True, "node 10.0.0.2 has no deepspeed"),
        ({"cuda": False}, True, "rank 1 on node 10.0.0.2 was given a GPU (CUDA_VISIBLE_DEVICES=0,1), but torch"),
    ],
)  # fmt: skip
def test_check_env_reports_one_bad_rank(change: dict[str, object], gpu: bool, message: str | None) -> None:
    odd = replace(GOOD, node="10.0.0.2", **change)  # type: ignore[arg-type]
    error = check_env([GOOD, odd, GOOD], "1.0", gpu)
    assert error is None if message is None else (error or "").startswith(message)


def test_check_env_reports_package_missing_everywhere() -> None:
    none = replace(GOOD, versions={"torch": "2.13.0", "deepspeed": ""})
    assert (
        check_env([none, none], "1.0", True) == "node 10.0.0.1 has no deepspeed: install on it what physio-dist needs"
    )
