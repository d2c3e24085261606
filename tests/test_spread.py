"""What a conversion on a cluster says; conversions themselves are in tests/system/test_convert_ray.py."""

from __future__ import annotations

import os

import pytest

from physio_dist import exits, spread


def test_complaints_below_python_at_the_shutdown_are_kept_out(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """When Ray makes them cannot be forced, so that its calls are replaced."""
    monkeypatch.setenv("RAY_ADDRESS", "nowhere")
    monkeypatch.setattr(spread.cluster, "connect", lambda *given, **more: None)
    monkeypatch.setattr(spread.cluster, "require", lambda *given: None)
    monkeypatch.setattr(exits, "interrupt_on_sigterm", lambda: None)
    ended = []

    def shutdown() -> None:
        os.write(2, b"Failed to push error\n")
        ended.append(True)

    monkeypatch.setattr(spread.ray, "shutdown", shutdown)
    with pytest.raises(ValueError, match="wrong"), spread.on_cluster("auto", 0, 0.0):
        spread.say("before")
        raise ValueError("wrong")
    spread.say("after")
    assert ended
    assert capfd.readouterr().err == "physio-dist: before\nphysio-dist: after\n"
