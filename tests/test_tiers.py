"""Tiers of the collected tests, and requirements that are missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import not_run, require, tiers_of

ROOT = Path(__file__).resolve().parents[1]


def test_every_collected_test_has_exactly_one_tier(request: pytest.FixtureRequest) -> None:
    for item in request.session.items:
        assert len(tiers_of(item)) == 1, item.nodeid


def test_missing_requirement_skips_and_fails_where_every_test_has_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PHYSIO_DIST_REQUIRE_DATA", raising=False)
    require(True, "root")
    with pytest.raises(pytest.skip.Exception, match="needs root"):
        require(False, "root")
    for name, value in (("CI", "true"), ("PHYSIO_DIST_REQUIRE_DATA", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(pytest.fail.Exception, match="needs root"):
                require(False, "root")


def test_summary_counts_tests_by_missing_requirement() -> None:
    def report(reason: str) -> pytest.TestReport:
        return pytest.TestReport("t", ("t.py", 1, "t"), {}, "skipped", ("t.py", 1, f"Skipped: {reason}"), "setup")

    skipped = [report("needs root"), report("needs recordings"), report("needs root"), report("unsupported")]
    assert not_run(skipped) == [
        "not run: 1 tests need recordings", "not run: 2 tests need root", "not run: 1 tests (unsupported)",
    ]  # fmt: skip


@pytest.mark.integration
def test_processes_share_tests_by_group() -> None:
    words = ["-n", "1", "--dist", "loadgroup", "-v", "-p", "no:cacheprovider", "tests/test_proxy.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and "@test_proxy.py" in done.stdout, done.stdout
