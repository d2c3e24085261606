"""Exit statuses of commands whose libraries are missing."""

from __future__ import annotations

import sys

import pytest

from physio_dist.errors import EXIT_FAULT, EXIT_USER
from physio_dist.runtime.exit_status import status_of


@pytest.mark.parametrize(
    ("library", "argv", "words"),
    [
        ("ray", ["/src/physio_dist/tune.py"], ("python -m physio_dist.tune", "'physio-dist[ray]'")),
        ("deepspeed", ["/src/physio_dist/launch.py"], ("python -m physio_dist.launch", "'physio-dist[ray]'")),
        ("matplotlib", ["/bin/physio-dist", "report", "RUN"], ("physio-dist report", "'physio-dist[report]'")),
        ("wfdb", ["/src/physio_dist/__main__.py", "shard"], ("physio-dist shard", "'physio-dist[readers]'")),
    ],
)
def test_status_of_names_command_and_extra_when_a_library_is_missing(
    library: str,
    argv: list[str],
    words: tuple[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setitem(sys.modules, library, None)

    assert status_of(lambda: __import__(library)) == EXIT_USER

    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert all(word in message for word in words)


def test_status_of_reports_a_fault_when_a_library_of_no_extra_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)

    assert status_of(lambda: __import__("safetensors")) == EXIT_FAULT
