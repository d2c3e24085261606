"""A step on paper: numbers worked out by hand, and what has to rise or fall does."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from physio_dist.planning import scaling_model
from physio_dist.planning.scaling_model import Load, Machines, step

ROOT = Path(__file__).resolve().parents[2]
WORLDS = [2**n for n in range(11)]
# base: 4,923,800 parameters; 12 leads x 10 patches cost 3 x 1,195,056,000 FLOPs and hold 48,000 bytes.
PARAMETERS = 4_923_800
ROUND = Machines(
    gpus=8, flops=3.585168e12, operation_s=1e-6, inside=100e9, between=10e9, hop_s=1e-3, feed=1e9, disk=4e9, fetch=5e8,
    net=2e9, store=8e9, copy=1e9, put=1e8,
)  # fmt: skip


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_tool", ROOT / "tools" / "scaling.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_tool"] = module
    spec.loader.exec_module(module)
    return module


def test_step_of_one_rank_matches_direct_computation() -> None:
    load = Load("base", 600, 256, save_every=100, fetched=1.0)
    assert (load.parameters, load.window_flops, load.window_bytes) == (PARAMETERS, 3_585_168_000, 48_000)
    one = step(load, 1, ROUND)
    # 600 windows in 3 passes of 200, a thousand windows' FLOPs a second.
    assert one.arithmetic == pytest.approx(0.6)
    assert one.launches == pytest.approx(3 * (163 + 12 * 361) * 1e-6)
    assert one.exchange == 0
    batch = 600 * 48_000
    wanted = {"feed": batch / 1e9, "disk": batch / 4e9, "fetching": batch / 5e8, "object store": batch / 8e9}
    assert one.feed == pytest.approx(wanted)
    # Copied in 59 ms; sent within the 100 steps.
    assert one.checkpoint == pytest.approx(12 * PARAMETERS / 1e9 / 100)
    assert one.total == pytest.approx(0.6 + one.checkpoint)
    assert (one.limit, one.rate) == ("arithmetic", pytest.approx(600 / one.total))


@pytest.mark.parametrize(("stage", "weights", "collectives"), [(0, 2, 2), (1, 3, 3), (2, 7, 5), (3, 9, 109)])
def test_exchange_of_16_ranks_matches_direct_computation(stage: int, weights: int, collectives: int) -> None:
    """In three passes, over two nodes: a ring's bytes, and two latencies for each doubling and collective."""
    load = Load("base", 16 * 3 * 256, 256, stage)
    sent = weights * 15 / 16 * 4 * PARAMETERS
    assert scaling_model.exchange_bytes(load, 16, 3) == pytest.approx(sent)
    assert step(load, 16, ROUND).exchange == pytest.approx(sent / 10e9 + collectives * 2 * 4 * 1e-3)


def test_exchange_within_node_uses_inner_bandwidth() -> None:
    load = Load("base", 8 * 256, 256, 0)
    assert step(load, 8, ROUND).exchange == pytest.approx(2 * 7 / 8 * 4 * PARAMETERS / 100e9 + 2 * 2 * 3 * 1e-3)


def test_checkpoint_s_includes_waiting_for_previous_upload() -> None:
    load = Load("base", 256, 256, 0, save_every=10)
    # 59 MB take 0.59 s at 100 MB/s, ten steps of 10 ms take 0.1 s.
    assert scaling_model.checkpoint_s(load, 1, 0.01, ROUND) == pytest.approx((0.05908560 + 0.5908560 - 0.1) / 10)
    assert scaling_model.checkpoint_s(load, 1, 1.0, ROUND) == pytest.approx(0.0059085600)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("preset", ["tiny", "base", "xl"])
def test_step_is_monotonic_in_world_and_rates(preset: str, stage: int) -> None:
    grown = [step(Load(preset, 64 * world, 64, stage), world, Machines()) for world in WORLDS]
    fixed = [step(Load(preset, 4096, 64, stage), world, Machines()) for world in WORLDS]
    for few, more in itertools.pairwise(grown):
        assert more.exchange > few.exchange
        assert more.passes == few.passes
        assert more.rate / few.rate <= 2
    for few, more in itertools.pairwise(fixed):
        assert more.arithmetic <= few.arithmetic
        assert more.feed["feed"] <= few.feed["feed"]
    for name in ("flops", "inside", "between", "feed", "disk", "fetch", "net", "store", "copy", "put"):
        slower = replace(Machines(), **{name: getattr(Machines(), name) / 10})
        load = Load(preset, 64 * 64, 64, stage, fetched=1.0)
        assert step(load, 64, slower).total >= step(load, 64, Machines()).total
        assert step(replace(load, fetched=0.0), 64, slower).total <= step(load, 64, slower).total


def test_limit_names_each_bottleneck() -> None:
    full = Load("base", 1024, 1024)
    assert step(full, 1, replace(Machines(), operation_s=0.0, feed=1e12, disk=1e12)).limit == "arithmetic"
    assert step(replace(full, micro_batch=32), 1, Machines()).limit == "launches"
    for name, limit in (("feed", "feed"), ("disk", "disk"), ("fetch", "fetching"), ("store", "object store")):
        assert step(replace(full, fetched=1.0), 1, replace(Machines(), **{name: 1e8})).limit == limit
    assert step(full, 2, replace(Machines(), inside=1e8)).limit == "exchange"
    assert step(replace(full, save_every=1), 1, replace(Machines(), put=1e7)).limit == "checkpoint"
    with pytest.raises(ValueError, match="2000 ranks cannot share a batch of 1024"):
        step(full, 2000, Machines())


def test_windows_to_saturate_matches_step() -> None:
    enough = scaling_model.windows_to_saturate(Load("base"), Machines())
    for windows, limit in ((enough - 1, "launches"), (enough, "arithmetic")):
        one = step(Load("base", windows, windows), 1, replace(Machines(), feed=1e12, disk=1e12))
        assert one.limit == limit


def test_docs_contain_tables_of_scaling_tool(tool: ModuleType) -> None:
    guide = (ROOT / "docs" / "scaling.md").read_text()
    for table in tool.tables():
        assert table in guide


def test_figure_writes_png(tool: ModuleType, tmp_path: Path) -> None:
    tool.figure(tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")
