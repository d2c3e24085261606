"""Output of a conversion on a cluster; tests/system/test_convert_ray.py has the conversions."""

from __future__ import annotations

import os

import pytest

from physio_dist.ray_backend import task_pool
from physio_dist.runtime import exit_status


def test_on_cluster_hides_stderr_of_ray_shutdown(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ray cannot be made to write there, so that its calls are replaced."""
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    monkeypatch.setattr(task_pool.cluster, "connect", lambda *_, **__: None)
    monkeypatch.setattr(task_pool.cluster, "require_resources", lambda *_: None)
    monkeypatch.setattr(exit_status, "interrupt_on_sigterm", lambda: None)
    ended = []

    def shutdown() -> None:
        os.write(2, b"Failed to push error\n")
        ended.append(True)

    monkeypatch.setattr(task_pool.ray, "shutdown", shutdown)
    with pytest.raises(ValueError, match="wrong"), task_pool.on_cluster("auto", 0, 0.0):
        task_pool.say("before")
        raise ValueError("wrong")
    task_pool.say("after")
    assert ended
    assert capfd.readouterr().err == "physio-dist: before\nphysio-dist: after\n"
