"""The run's directory: lines that count, options that may differ, one writer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from physio_dist import config
from physio_dist.config import MaskOptions, PretrainConfig, Resume, ShardSource
from physio_dist.config.options import map_urls
from physio_dist.errors import UserError
from physio_dist.runs import lease
from physio_dist.runs.run_dir import RunDir, compare_config, write_config
from physio_dist.runs.trackers import check_tracker


def options(**train: object) -> PretrainConfig:
    made = PretrainConfig()
    made.data.index = [ShardSource("shards")]
    for name, value in train.items():
        setattr(made.train, name, value)
    return made


def test_lines_of_replayed_steps_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    run = RunDir(str(tmp_path), 0)
    run.open_lines("metrics.jsonl", keep_up_to=2)
    run.add_line("metrics.jsonl", {"step": 3, "again": True})
    # Not closed: what is written must be there when the process is killed.
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_what_may_differ_on_resume_and_what_may_not(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path / "run"), 0)
    compare_config(run, options())
    assert not (tmp_path / "run").exists()
    write_config(run, options())
    compare_config(run, options())
    changed = options(
        micro_batch=4, precision="fp32", log_every=3, save_every=9, keep_checkpoints=1, log_sample_keys=True, steps=5000
    )
    # What the log of a run with spikes advises, from the newest checkpoint on.
    changed.train.skip_spikes, changed.train.spike_factor = True, 5.0
    changed.zero.stage = 3
    changed.data.cache_dir, changed.data.cache_gb = "/elsewhere", 1.0
    compare_config(run, changed)
    write_config(run, changed)
    for name, value in (("steps", 10), ("lr", 1.0), ("global_batch", 64), ("weight_decay", 0.0), ("ema", 0.9)):
        with pytest.raises(UserError, match=f"train.{name}"):
            compare_config(run, options(**{"steps": 5000, name: value}))
    other = options(steps=5000)
    other.run.seed, other.model.dropout, other.data.index = 5, 0.0, [ShardSource("others")]
    with pytest.raises(UserError, match=r"data\.index.*model\.dropout.*run\.seed"):
        compare_config(run, other)


def test_a_run_of_a_version_that_knew_fewer_options_goes_on_with_their_defaults(tmp_path: Path) -> None:
    run = RunDir(str(tmp_path), 0)
    write_config(run, options())
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("  lead_dropout: 0.0\n", ""))
    compare_config(run, options())
    other = options()
    other.mask = MaskOptions(lead_dropout=0.5)
    with pytest.raises(UserError, match=r"mask\.lead_dropout: 0\.0 there, 0\.5 now"):
        compare_config(run, other)


def test_a_path_is_the_same_by_either_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, near, far = RunDir(str(tmp_path / "run"), 0), options(), options()
    near.data.index, far.data.index = [ShardSource("sets/a")], [ShardSource(str(tmp_path / "sets" / "a"))]
    for there, now in ((near, far), (far, near)):
        write_config(run, there)
        compare_config(run, now)


@pytest.mark.parametrize(
    ("there", "now"),
    [
        ("/a/set", "/a/set/index.json"),
        ("/a/set/", [{"url": "/a/set", "weight": 1}]),
        ([{"url": "/a/set/index.json", "weight": 2}], "/a/set"),
        ([{"url": "/a/set"}, {"url": "s3://b/more", "weight": 2}],
         [{"url": "/a/set/index.json", "weight": 1.0}, {"url": "s3://b/more/", "weight": 2.0}]),
    ],
)  # fmt: skip
def test_the_same_sets_may_be_written_in_other_words(tmp_path: Path, there: object, now: object) -> None:
    run = RunDir(str(tmp_path / "run"), 0)
    first, second = (config.load(PretrainConfig, None, [f"data.index={json.dumps(form)}"]) for form in (there, now))
    for one, other in ((first, second), (second, first)):
        write_config(run, one)
        compare_config(run, other)
    second.data.index = [ShardSource("/a/set/index.json/more")]
    with pytest.raises(UserError, match=r"data\.index: .*/a/set.* there, /a/set/index\.json/more now"):
        compare_config(run, second)


def test_a_run_goes_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under another launcher, which runs elsewhere and makes paths absolute."""
    monkeypatch.chdir(tmp_path)
    run = RunDir("run", 0)
    write_config(run, options())
    assert f"index: {tmp_path}/shards\n" in (tmp_path / "run" / "config.yaml").read_text()
    elsewhere = options()
    elsewhere.run.dir, elsewhere.data.index = str(tmp_path / "other"), [ShardSource(str(tmp_path / "shards"))]
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    compare_config(run, elsewhere)
    with pytest.raises(UserError, match=r"data\.index"):
        compare_config(run, options())
    elsewhere.data.index = [ShardSource("../shards", 2.0), ShardSource("s3://bucket/more")]
    write_config(run, elsewhere)
    elsewhere.data.index = [ShardSource(str(tmp_path / "sub/../shards"), 2.0), ShardSource("s3://bucket/more")]
    compare_config(run, elsewhere)
    elsewhere.data.index[0] = elsewhere.data.index[0]._replace(weight=1.0)
    with pytest.raises(UserError, match=r"data\.index"):
        compare_config(run, elsewhere)


def test_every_url_of_the_options_is_mapped() -> None:
    given = options()
    given.data.index = [ShardSource("a", 2.0), ShardSource("b")]
    given.run.dir, given.data.cache_dir, given.resume = "c", "d", Resume(url="e")
    seen = map_urls(given, lambda url, option: f"{option}:{url}")
    assert seen.data.index == [ShardSource("data.index:a", 2.0), ShardSource("data.index:b")]
    assert (seen.run.dir, seen.data.cache_dir, seen.resume.url) == ("run.dir:c", "data.cache_dir:d", "resume:e")
    assert given.run.dir == "c"
    for existing in (True, False):
        given.resume = Resume(existing)
        assert map_urls(given, lambda url, option: "x").resume == Resume(existing)


def test_a_tracker_whose_library_is_not_there_is_refused() -> None:
    check_tracker("none")
    with pytest.raises(UserError, match="pip install no_such_tracker"):
        check_tracker("no_such_tracker")


HOLD = """
import sys, time
from physio_dist.runs.lease import Lease
held = Lease(sys.argv[1], lambda why: print(why, flush=True), lambda text: None)
print("held", held.attempt, flush=True)
time.sleep(60)
"""


def hold(run: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("held")
    return process


def take(run: Path) -> lease.Lease:
    return lease.Lease(str(run), pytest.fail, lambda text: None)


@pytest.mark.integration
def test_a_live_run_is_refused_and_a_killed_ones_is_free_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_LOCAL_WAIT_S", 1.0)
    process = hold(tmp_path)
    try:
        with pytest.raises(UserError, match=f"is live: process {process.pid}"):
            take(tmp_path)
        os.kill(process.pid, signal.SIGKILL)  # a zombie from here on, until it is waited for
        held = take(tmp_path)
        assert held.attempt == 2
        held.release()
        third = take(tmp_path)
        assert third.attempt == 3
        third.release()
    finally:
        process.kill()
        process.wait()


@pytest.mark.integration
def test_a_holder_on_another_host_is_alive_while_its_beat_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_REMOTE_WAIT_S", 2.0)
    there = {"token": "x", "attempt": 4, "beat": 1, "released": False, "host": "elsewhere", "pid": 1, "started": 0.0}
    (tmp_path / lease.NAME).write_text(json.dumps(there))
    held = take(tmp_path)
    assert held.attempt == 5
    held.release()

    writer = subprocess.Popen([
        sys.executable, "-c",
        "import json, sys, time, pathlib\n"
        "there = json.loads(sys.argv[2])\n"
        "for beat in range(100):\n"
        "    temporary = pathlib.Path(sys.argv[1] + '.new')\n"
        "    temporary.write_text(json.dumps({**there, 'beat': beat}))\n"
        "    temporary.replace(sys.argv[1])\n"
        "    time.sleep(0.1)\n",
        str(tmp_path / lease.NAME), json.dumps(there),
    ])  # fmt: skip
    try:
        while json.loads((tmp_path / lease.NAME).read_text())["token"] != "x":
            time.sleep(0.05)
        with pytest.raises(UserError, match="elsewhere"):
            take(tmp_path)
    finally:
        writer.kill()
        writer.wait()


def test_a_holder_that_was_robbed_learns_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_BEAT_S", 0.1)
    told: list[str] = []
    held = lease.Lease(str(tmp_path), told.append, lambda text: None)
    document = json.loads((tmp_path / lease.NAME).read_text())
    held.check()
    (tmp_path / lease.NAME).write_text(json.dumps({**document, "token": "other"}))
    with pytest.raises(UserError, match="taken this run over"):
        held.check()
    end = time.monotonic() + 10
    while not told and time.monotonic() < end:
        time.sleep(0.05)
    assert told
    held.release()
    assert json.loads((tmp_path / lease.NAME).read_text())["token"] == "other"
