"""How fast the data feed delivers, beside three libraries that do the same: ``python tools/bench/feed.py``.

docs/benchmarks.md says what is measured and how. The table and, as the last line, one JSON object go to stdout.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    DEFAULT_ENVS,
    BenchError,
    Child,
    environment,
    finish,
    interleave,
    last_line,
    outside,
    rounded,
    say,
    table,
)
from peers.serve import hashes
from s3server import s3_server

from physio_dist.config import IndexOptions
from physio_dist.data.format import tar
from physio_dist.data.index_existing import index_existing
from physio_dist.signals.montage import ECG_12

PEERS = {
    "webdataset": "webdataset==1.0.2",
    "streaming": "mosaicml-streaming==0.13.0",
    "litdata": "litdata==0.2.76",
}
HERE = Path(__file__).resolve().parent / "peers"
CHANNELS, LENGTH = len(ECG_12), 2000
PER_SHARD = 1000
# As many as the threads of the feed that fetch shards.
CONNECTIONS = 16
BARE = ("client", "http")
BUCKET = "set"


def make_data(folder: Path, samples: int) -> None:
    """The samples as one array, for the peers to convert, and as our shards in the folder of a bucket.

    They are random walks of int16 ``[12, 2000]``. Nothing here compresses, so what they look like makes no difference.
    """
    done = folder / "made"
    if done.exists():
        return
    say(f"making {samples} samples in {folder}")
    bucket = folder / "served" / BUCKET
    bucket.mkdir(parents=True, exist_ok=True)
    array = np.lib.format.open_memmap(folder / "samples.npy", "w+", np.int16, (samples, CHANNELS, LENGTH))
    rng = np.random.default_rng(0)
    for number, start in enumerate(range(0, samples, PER_SHARD)):
        piece = array[start : start + PER_SHARD]
        steps = rng.integers(-60, 61, piece.shape, dtype=np.int16)
        np.cumsum(steps, axis=2, dtype=np.int16, out=piece)
        made = [
            tar.Sample(f"walk-{start + i:08d}", {"ecg": sample}, {"simulated": True}) for i, sample in enumerate(piece)
        ]
        # In large writes, as a conversion and the node's cache make them: the page cache then has large pages.
        with (bucket / f"ecg-{number:06d}.tar").open("wb", buffering=1 << 22) as out:
            tar.write(made, out)
    array.flush()
    index_existing(str(bucket), IndexOptions(channels=",".join(ECG_12), val=0, test=0))
    done.touch()


def check(name: str, delivered: Sequence[int], stored: Sequence[int]) -> None:
    """Whether an epoch delivered every sample once, and shuffled.

    Raises:
        BenchError: it did not, so its speed would mean nothing.
    """
    if sorted(delivered) != sorted(stored):
        raise BenchError(f"{name} delivered {len(delivered)} samples that are not the {len(stored)} that were stored")
    after = dict(itertools.pairwise(stored))
    kept = sum(after.get(a) == b for a, b in itertools.pairwise(delivered))
    if kept > len(stored) / 10:
        raise BenchError(f"{name} did not shuffle: {kept} of {len(stored)} samples came right after their neighbour")


def rate(child: Child, command: str, of: str = "samples") -> Callable[[], float]:
    """A measure: what an epoch delivers in a second."""

    def measure() -> float:
        answer = child.ask(command)
        return float(answer[of] / answer["seconds"])

    return measure


def warm(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Samples a second from the page cache: ours, then the peers.

    Raises:
        BenchError: a peer cannot be installed, breaks, or delivers something else.
    """
    stored = hashes(np.load(folder / "samples.npy", mmap_mode="r")[i : i + 256] for i in range(0, options.samples, 256))
    bucket = folder / "served" / BUCKET
    pythons = {name: environment(options.envs, name, PEERS[name]) for name in options.peers}
    with ExitStack() as stack:
        words = [sys.executable, HERE / "ours.py", bucket, options.batch]
        children = {"ours": stack.enter_context(Child("ours", words, os.environ, folder))}
        for name, python in pythons.items():
            data = bucket if name == "webdataset" else folder / name
            words = [python, HERE / f"{name}_peer.py", folder / "samples.npy", data, options.batch]
            children[name] = stack.enter_context(Child(name, words, outside(), folder))
        for name, child in children.items():
            say(f"{name}: prepares, warms up")
            answer = child.ask("start")
            for way, seconds in answer.get("seconds", {}).items():
                say(f"  {way}: {options.samples / seconds:,.0f} samples/s" + " (taken)" * (way == answer["way"]))
            check(name, child.ask("check")["hashes"], stored)
        return interleave(options.repeats, {name: rate(child, "epoch") for name, child in children.items()})


def cold(folder: Path, options: argparse.Namespace, link: int) -> dict[str, list[float]]:
    """From an S3 server of this machine with nothing in the cache, then from the cache, and bare downloads.

    With ``link`` the server sends so many MB/s at most, as a network may.

    Returns:
        Bytes/s: ``ours``, ``client``, ``http`` (see ``peers/bare.py``). Samples/s: ``second``, the epoch after ``ours``
        from the cache, and ``local``, an epoch of the same set on the disk.
    """
    served = folder / "served"
    with s3_server(served, folder / "rclone.log", link) as server, ExitStack() as stack:
        env, url = {**os.environ, **server}, f"s3://{BUCKET}"
        words = [sys.executable, HERE / "ours.py", served / BUCKET, options.batch, url, folder / "cache"]
        ours = stack.enter_context(Child("ours-cold", words, env, folder))
        words = [sys.executable, HERE / "bare.py", url, folder / "bare", CONNECTIONS]
        bare = stack.enter_context(Child("bare", words, env, folder))
        measures = {
            "ours": rate(ours, "cold", "bytes"), "second": rate(ours, "second"), "local": rate(ours, "epoch"),
            "client": rate(bare, "client", "bytes"), "http": rate(bare, "http", "bytes"),
        }  # fmt: skip
        say(f"cold, {link or 'any number of'} MB/s: warms up")
        # Neither connections nor the server's page cache are to be new in one of them only.
        for measure in measures.values():
            measure()
        if wrong := bare.ask("check")["wrong"]:
            raise BenchError(f"a bare download is not whole: {', '.join(wrong)}")
        return interleave(options.repeats, measures)


def run(folder: Path, options: argparse.Namespace) -> str:
    """All measures; prints the tables.

    Returns:
        The last line.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_data(folder, options.samples)
    ours, peers, also = None, {}, {}
    if options.only != "cold":
        found = warm(folder, options)
        print(table("From the page cache, one process", "samples/s", found))
        medians = {name: statistics.median(values) for name, values in found.items()}
        ours, peers = medians.pop("ours"), medians
    if options.only != "warm":
        found, narrow = cold(folder, options, 0), cold(folder, options, options.link)
        print(table(f"Cold, from S3 at {options.link} MB/s", "bytes/s", {n: narrow[n] for n in ("ours", *BARE)}))
        for title, unit, names in (
            ("Cold, from S3 on this machine", "bytes/s", ("ours", *BARE)),
            ("The epoch after it, from the cache", "samples/s", ("second", "local")),
        ):
            print(table(title, unit, {name: found[name] for name in names}))
        also = {
            "cold": versus("bytes/s", found, "ours", *BARE),
            "cold_link": versus("bytes/s", narrow, "ours", *BARE),
            "second_epoch": versus("samples/s", found, "second", "local"),
        }
    return last_line("feed", "samples/s", options.repeats, ours, peers, also)


def versus(unit: str, found: Mapping[str, Sequence[float]], one: str, *others: str) -> dict[str, Any]:
    """The median of one measure and its ratio to each of some others."""
    ours = statistics.median(found[one])
    medians = {name: statistics.median(found[name]) for name in others}
    ratios = {f"ratio_to_{name}": round(ours / value, 3) for name, value in medians.items()}
    return {"ours": rounded(ours), **{name: rounded(value) for name, value in medians.items()}, "unit": unit, **ratios}


def main() -> int:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("--samples", type=int, default=10_240, help="of 48 kB; a multiple of --batch")
    parser.add_argument("--batch", type=int, default=256, help="samples in a batch")
    parser.add_argument("--repeats", type=int, default=5, help="epochs of each, taken in turns")
    parser.add_argument("--peers", default=",".join(PEERS), help="which to measure, or none (default: %(default)s)")
    parser.add_argument("--envs", type=Path, default=Path(DEFAULT_ENVS), help="where their environments are kept")
    parser.add_argument("--work", type=Path, help="where the data is kept (default: a folder that goes afterwards)")
    parser.add_argument("--link", type=int, default=200, help="MB/s of the narrow link that cold is measured over too")
    parser.add_argument("--only", choices=("warm", "cold"), help="from the page cache, or from S3")
    options = parser.parse_args()
    options.peers = [] if options.peers == "none" else options.peers.split(",")
    options.envs = options.envs.expanduser()
    if unknown := [name for name in options.peers if name not in PEERS]:
        parser.error(f"--peers {','.join(unknown)}: known are {', '.join(PEERS)}, none")
    if options.batch < 1 or options.repeats < 1 or options.samples < 1 or options.samples % options.batch:
        parser.error("--samples must be a multiple of --batch, so that every epoch delivers every sample")
    with tempfile.TemporaryDirectory(prefix="physio-dist-bench-") as temporary:
        work = options.work.expanduser() if options.work else Path(temporary)
        return finish(lambda: run(work / f"{options.samples}", options))


if __name__ == "__main__":
    sys.exit(main())
