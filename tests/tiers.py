"""Test tiers and requirements.

Each test belongs to exactly one tier, which is a pytest marker:

- ``unit``: in one process, without recordings, root or network;
- ``integration``: starts processes or servers, reads recordings, or takes seconds;
- ``system``: starts launchers or Ray clusters; everything under ``tests/system``;
- ``chaos``: faults of whole hosts and further cases of system tests, run by ``tools/chaos.sh`` only.

A test may name its tier with a marker. Otherwise it follows from the test's folder and fixtures.

A test whose requirement (recordings, root, a program) is missing is skipped and counted in the summary. It fails
instead where nothing may be left out: with ``CI=true`` or ``PHYSIO_DIST_REQUIRE_DATA=1``.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

TIERS = ("unit", "integration", "system", "chaos")
SYSTEM = Path(__file__).resolve().parent / "system"
# Fixtures that start processes or servers, mount disks or read recordings.
INTEGRATION_FIXTURES = frozenset({"cli", "data_dir", "real", "recordings", "s3_server", "tiny_disk", "web"})
NEEDS = "needs "


def require(present: bool, requirement: str) -> None:
    """Skip the current test if a requirement of it is missing, or fail it where every test has to run.

    Args:
        present: whether the requirement is met.
        requirement: noun phrase for the summary, for example ``root``.
    """
    if present:
        return
    if os.environ.get("CI") == "true" or os.environ.get("PHYSIO_DIST_REQUIRE_DATA") == "1":
        pytest.fail(f"{NEEDS}{requirement}", pytrace=False)
    pytest.skip(f"{NEEDS}{requirement}")


def require_root() -> None:
    """Require the right to mount disks and make namespaces."""
    require(os.geteuid() == 0, "root")


def tiers_of(item: pytest.Item) -> list[str]:
    """Tiers that a test's markers name, each once."""
    return [tier for tier in TIERS if item.get_closest_marker(tier) is not None]


def default_tier(item: pytest.Item) -> str:
    """Tier of a test without a marker."""
    if SYSTEM in item.path.parents:
        return "system"
    return "integration" if INTEGRATION_FIXTURES.intersection(getattr(item, "fixturenames", ())) else "unit"


def group_of(item: pytest.Item) -> str:
    """Group of tests that pytest-xdist runs one after the other in one process.

    Tests with a Ray cluster name the group ``ray``, because two clusters on one machine compete for its cores. The
    other system tests are a group too: they share fixtures, and at most one set of ranks trains beside a cluster.
    """
    marker = item.get_closest_marker("xdist_group")
    if marker is not None:
        return str(marker.args[0])
    return "launchers" if SYSTEM in item.path.parents else item.path.relative_to(SYSTEM.parent).as_posix()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Give a test without a tier one, before ``-m`` selects, and a group."""
    if not tiers_of(item):
        item.add_marker(default_tier(item))
    if item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(group_of(item)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start the two long groups first where several processes share the tests; the others fill up what is left."""
    if hasattr(config, "workerinput"):
        order = {"ray": 0, "launchers": 1}
        items.sort(key=lambda item: order.get(group_of(item), 2))


def not_run(reports: Sequence[pytest.TestReport]) -> list[str]:
    """Lines that count the skipped tests by reason."""
    reasons = collections.Counter(
        report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else "" for report in reports
    )
    return [
        f"not run: {count} tests need {reason.removeprefix(NEEDS)}"
        if reason.startswith(NEEDS)
        else f"not run: {count} tests ({reason})"
        for reason, count in sorted(reasons.items())
    ]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Print as the last lines which tests were not run and why."""
    yield
    for line in not_run(terminalreporter.stats.get("skipped", [])):
        terminalreporter.write_line(line, yellow=True)
