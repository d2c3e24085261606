"""What a conversion on a cluster says; conversions themselves are in tests/system/test_convert_ray.py."""

from __future__ import annotations

import os

import pytest

from physio_dist.ray_backend import task_pool
from physio_dist.runtime import exit_status


def test_complaints_below_python_at_the_shutdown_are_kept_out(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """When Ray makes them cannot be forced, so that its calls are replaced."""
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    monkeypatch.setattr(task_pool.cluster, "connect", lambda *given, **more: None)
    monkeypatch.setattr(task_pool.cluster, "require", lambda *given: None)
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
