"""Raw recordings to a shard set: parts in parallel, repeats left out, shards in parallel, the index last."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from physio_dist import __version__, storage
from physio_dist.config import ShardConfig, flatten
from physio_dist.data.convert.assemble import ShardResult, WindowRef, make_shard, part_url, read_receipt, receipt_url
from physio_dist.data.convert.channels import spec_of, with_found, words
from physio_dist.data.convert.labels import read_labels
from physio_dist.data.convert.parts import Job, Part, make_part, part_of, record_keys, spooled
from physio_dist.data.convert.process_pool import TaskPool, run_on_shared_files, worker_pool
from physio_dist.data.format.index import INDEX, SPLITS, ShardSet, SignalInfo, fingerprint_of, open_set
from physio_dist.data.format.people import split_of
from physio_dist.data.format.sample_table import SampleTable, key_table, publish, read_sample_table
from physio_dist.errors import DataError, UserError
from physio_dist.runtime.progress import Progress
from physio_dist.signals.readers import reader as reader_named
from physio_dist.storage.user_cache import user_cache_dir

REJECTS = "rejects.jsonl"
MARKER = "_writing.json"
# Names in the folder of recordings that are checked on other machines.
_CHECKED_NAMES = 16
# Options that say where the work is done, and names of files: other ones make the same bytes.
_NOT_OF_BYTES = ("workers", "ray", "placement_timeout_s", "labels", "exclude")


@dataclass(frozen=True)
class Summary:
    """Result of a conversion.

    Attributes:
        already: whether the set was there before.
        records_per_s: reading speed of this run; None where it read none.
    """

    url: str
    records: int
    rejected: Counter[str]
    shard_set: ShardSet
    already: bool
    records_per_s: float | None = None


def plan_job(reader: str, source: str, options: ShardConfig) -> Job:
    """List the records and join the label file.

    Raises:
        UserError: unknown reader, nothing to read, a label file that fits nothing.
    """
    reads = reader_named(reader)
    spec_of(options)  # Raises on wrong options before any recording is read.
    records = reads.records(source)
    spec = spec_of(with_found(reads, source, records, options))
    name = options.source or ("" if reads.simulated else Path(os.path.abspath(source)).name) or reader  # noqa: PTH100
    labels, people = read_labels(options.labels, options.person, records) if options.labels else ({}, {})
    return Job(
        # Whoever reads it may have been started in another folder.
        reader=reader, input=source if reads.simulated else os.path.abspath(source), source=name,  # noqa: PTH100
        spec=spec, records=tuple(records),
        keys=tuple(record_keys(records)), labels=labels, people=people,
    )  # fmt: skip


def convert(reader: str, source: str, out: str, options: ShardConfig, pool: TaskPool | None = None) -> Summary:
    """Convert recordings to a shard set at ``out``.

    Killed at any moment and started again with the same options it goes on, and ends with the same bytes, whichever
    processes do the work.

    Args:
        reader: name of the format.
        source: where the recordings are.
        out: URL of the shard set.
        options: of the conversion.
        pool: the processes that do the work; ``options.workers`` of this machine, where none is given.

    Raises:
        UserError: nothing to convert, nothing kept, a folder in use by other data or another conversion.
    """
    out = storage.absolute(out)
    job = plan_job(reader, source, options)
    excluded = [open_set(url) for url in words(options.exclude)]
    decisive = [job.digest(), _of_bytes(options), [other.fingerprint for other in excluded]]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    beside, private = _spools(out, f"{job.digest()} {job.input}")
    # The first contact with the target comes before hours of work. What was begun beside the shards goes on there.
    begun = beside.rsplit("/", 1)[-1] in storage.names(out)
    spool = beside if begun or (pool is not None and pool.is_remote) else private
    if finished := _claim(out, digest):
        if MARKER in storage.names(out):  # killed between its last write and this
            _tidy(out, beside, private)
        return Summary(out, len(job.records), Counter(), finished, already=True)
    with _alone(storage.local_path(private), out):
        with contextlib.nullcontext(pool) if pool is not None else worker_pool(options.workers) as workers:
            parts, speed = _make_parts(job, spool, workers)
            windows, rejects = _choose(parts, options.unusable, _hashes(excluded))
            if not windows:
                _tidy(out, beside, private)
                raise UserError(_nothing_kept(source, len(job.records), rejects))
            results = _make_shards(job, windows, spool, out, digest, options.samples_per_shard, workers)
        finished = _finish(job, out, digest, options, windows, results, rejects)
        _tidy(out, beside, private)
    reasons = Counter(_kind(str(reject["reason"])) for reject in rejects)
    return Summary(out, len(job.records), reasons, finished, already=False, records_per_s=speed)


@contextlib.contextmanager
def _alone(folder: Path, out: str) -> Iterator[None]:
    """Hold the lock in a folder, which is made if need be.

    Raises:
        UserError: another conversion holds it, or the folder cannot be written.
    """
    lock = FileLock(folder / "lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"another conversion is writing {out} right now; wait for it to end") from None
    except OSError as error:
        raise storage.to_storage_error(str(folder), "write", error) from error
    try:
        yield
    finally:
        lock.release()
        # NFS keeps the folder while a file in it is open, as the lock was.
        with contextlib.suppress(OSError):
            folder.rmdir()


def _tidy(out: str, beside: str, private: str) -> None:
    """Remove the temporary files of a conversion, those of a killed one included."""
    for name in storage.names(out):
        if name.startswith(".") and name.endswith(".tmp"):
            storage.remove(storage.join(out, name))
    if not storage.is_local(beside):
        with ThreadPoolExecutor(16) as several:  # a request each, for up to tens of thousands
            list(several.map(storage.remove, [storage.join(beside, name) for name in storage.names(beside)]))
    shutil.rmtree(private, ignore_errors=True)
    # Last, because the next run tidies up if the marker is there.
    storage.remove(storage.join(out, MARKER))


def _hashes(excluded: Sequence[ShardSet]) -> dict[str, set[int]]:
    by_url = {other.url: set(read_sample_table(other).waveform.tolist()) - {0} for other in excluded}
    for url, hashes in by_url.items():
        if not hashes:
            raise UserError(f"exclude={url}: it was made by `physio-dist index` and has no waveform hashes to compare")
    return by_url


def _of_bytes(options: ShardConfig) -> dict[str, Any]:
    """The options that decide the shards' bytes beside the job and the content of the excluded sets."""
    flat = flatten(options)
    return {name: flat[name] for name in ("unusable", "split.val", "split.test", "samples_per_shard")}


def _claim(out: str, digest: str) -> ShardSet | None:
    """Mark ``out`` as being written by this job; the finished set where it already did.

    Raises:
        UserError: something else is there.
    """
    names = storage.names(out)
    if INDEX in names:
        existing = open_set(out)
        if existing.made_by.get("job") == digest:
            return existing
        raise UserError(
            f"{out} already holds a shard set made from other data or options "
            f"(fingerprint {existing.fingerprint[:12]}); choose another --out or delete it first"
        )
    if MARKER in names:
        if storage.read_json(storage.join(out, MARKER)) == {"job": digest}:
            return None
        raise UserError(
            f"{out} holds an unfinished conversion of other data or with other options; finish it with its own "
            "command, choose another --out, or delete the folder first"
        )
    if any(name.endswith(".tar") for name in names):
        raise UserError(f"{out} holds tar files of something else; choose another --out")
    storage.write_json(storage.join(out, MARKER), {"job": digest})
    return None


def _spools(out: str, job: str) -> tuple[str, str]:
    """Folders that parts may be spooled in: one beside the shards, and one of this machine alone.

    Both are the same for a local set. The second also holds the lock.
    """
    digest = hashlib.sha256(job.encode()).hexdigest()
    beside = storage.join(out, f".work-{digest[:16]}")
    if storage.is_local(out):
        return beside, beside
    where = hashlib.sha256(out.encode()).hexdigest()[:8]
    return beside, str(user_cache_dir("convert", f"{digest[:16]}-{where}"))


def _shared_paths(job: Job, spool: str) -> dict[str, str]:
    """Paths that exist for every process that shares this one's file systems, each with the error if it does not."""
    seen = {}
    if not reader_named(job.reader).simulated:
        meaning = f"{job.input} is not the folder that it is where the command was started; all nodes have to share it"
        # Some of its names, because a folder without them may be the place where nothing is mounted.
        folder = Path(job.input)
        paths = sorted(str(path) for path in (folder.iterdir() if folder.is_dir() else [folder]))
        seen = dict.fromkeys(paths[:: len(paths) // _CHECKED_NAMES + 1], meaning)
    if storage.is_local(spool):
        mark = storage.join(spool, f"seen-{uuid.uuid4().hex}")
        storage.write_bytes(mark, b"")
        seen[mark] = "--out is not on a file system that all nodes share; give one that is, or an s3:// URL"
    return seen


def _make_parts(job: Job, spool: str, pool: TaskPool) -> tuple[list[Part], float | None]:
    """Make the parts; returns them and the records read per second."""
    parts: dict[int, Part] = {}
    spooled_names = set(storage.names(spool))
    urls = [part_url(spool, number) for number in range(job.parts())]
    tasks = [(job.part(i), url, url.rsplit("/", 1)[-1] in spooled_names, pool.is_remote) for i, url in enumerate(urls)]
    work: Callable[..., tuple[int, str | None]] = make_part
    if pool.is_remote:
        work = functools.update_wrapper(
            functools.partial(run_on_shared_files, _shared_paths(job, spool), make_part), make_part
        )
    began, records = time.monotonic(), 0
    with Progress(len(job.records), "records", "reading") as bar:
        for number, (read, result) in pool.imap_unordered(work, tasks):
            facts = result or spooled(urls[number])
            if facts is None:
                raise DataError(f"the spooled part {urls[number]} cannot be read back")
            parts[number] = part_of(facts)
            records += read
            bar.update(parts[number].records)
    speed = records / (time.monotonic() - began) if records else None
    return [parts[number] for number in range(job.parts())], speed


def _choose(
    parts: Sequence[Part], unusable: str, excluded: dict[str, set[int]]
) -> tuple[list[WindowRef], list[dict[str, Any]]]:
    """Choose windows: repeats are left out (the first record in order stays), then unusable ones if asked.

    Returns:
        The windows, and the rejects as ``rejects.jsonl`` has them.
    """
    windows: list[WindowRef] = []
    rejects: list[dict[str, Any]] = []
    first: dict[int, str] = {}
    for number, part in enumerate(parts):
        rejects += part.rejects
        repeats: set[str] = set()
        for row, window in enumerate(part.windows):
            original = first.setdefault(window.waveform, window.record)
            elsewhere = next((url for url, hashes in excluded.items() if window.waveform in hashes), None)
            if original != window.record or elsewhere:
                if window.record not in repeats:
                    repeats.add(window.record)
                    where = f"in {elsewhere}" if elsewhere else f"record {original}"
                    rejects.append({"record": window.record, "reason": f"repeat: the same waveform as {where}"})
            elif unusable == "drop" and not window.usable:
                reason = "unusable: " + "; ".join(window.reasons)
                rejects.append({"record": window.record, "start_s": window.start_s, "reason": reason})
            else:
                windows.append(WindowRef(number, row, window))
    return windows, rejects


def _kind(reason: str) -> str:
    # Names and numbers would make a kind of its own of every record.
    words = re.split(r"[:;(,]", reason, maxsplit=1)[0].split()
    return " ".join(word for word in words if not re.search(r"[\d._/]", word))


def _nothing_kept(source: str, records: int, rejects: Sequence[dict[str, Any]]) -> str:
    first = "; ".join(f"{reject['record']}: {reject['reason']}" for reject in rejects[:3])
    return f"{source}: none of its {records} records gave a window that can be used; the first reasons: {first}"


def _make_shards(
    job: Job, windows: Sequence[WindowRef], spool: str, out: str, digest: str, per_shard: int, pool: TaskPool
) -> list[ShardResult]:
    prefix = "-".join(sorted(job.spec.signals))
    groups = [windows[i : i + per_shard] for i in range(0, len(windows), per_shard)]
    names = [f"{prefix}-{n:06d}.tar" for n in range(len(groups))]
    tasks = [
        (job.source, group, spool, out, name, digest, pool.is_remote)
        for name, group in zip(names, groups, strict=True)
    ]  # fmt: skip
    made: dict[int, ShardResult] = {}
    with Progress(len(groups), "shards", "writing") as bar:
        for n, result in pool.imap_unordered(make_shard, tasks):
            made[n] = result or read_receipt(receipt_url(spool, names[n], digest))
            bar.update()
    return [made[n] for n in range(len(groups))]


def _finish(
    job: Job, out: str, digest: str, options: ShardConfig, windows: Sequence[WindowRef], results: Sequence[ShardResult],
    rejects: list[dict[str, Any]],
) -> ShardSet:  # fmt: skip
    signals, infos = sorted(job.spec.signals), [result.info for result in results]
    places = [place for result in results for place in result.places]
    valid = [flags for result in results for flags in result.valid]
    split = [split_of(item.facts.person, options.split.val, options.split.test) for item in windows]
    person = np.array([item.facts.person for item in windows], dtype=np.uint64)
    table = SampleTable(
        offset={name: np.array([place[name][0] for place in places], dtype=np.int64) for name in signals},
        check={name: np.array([place[name][1] for place in places], dtype=np.uint32) for name in signals},
        valid={name: np.array([flags[name] for flags in valid], dtype=np.bool_) for name in signals},
        split=np.array(split, dtype=np.uint8),
        person=person,
        waveform=np.array([item.facts.waveform for item in windows], dtype=np.uint64),
        key=key_table([item.facts.key for item in windows]),
    )
    spec = job.spec
    infos_of = {name: SignalInfo(spec.channels_of(name), spec.samples, spec.uv_per_bit_of(name)) for name in signals}
    digest_of_table = hashlib.sha256(table.to_bytes()).hexdigest()
    shard_set = ShardSet(
        url=out, shards=tuple(infos), signals=infos_of, rate=float(job.spec.rate),
        splits={name: split.count(code) for code, name in enumerate(SPLITS)},
        people=len(np.unique(person)), simulated=reader_named(job.reader).simulated, sources=(job.source,),
        sample_table_sha256=digest_of_table,
        fingerprint=fingerprint_of(infos, infos_of, job.spec.rate, digest_of_table),
        made_by={
            "job": digest, "physio_dist": __version__, "reader": job.reader,
            "options": {k: v for k, v in flatten(options).items() if k not in _NOT_OF_BYTES},
        },
    )  # fmt: skip
    lines = "".join(json.dumps(reject, sort_keys=True) + "\n" for reject in rejects)
    storage.write_bytes(storage.join(out, REJECTS), lines.encode())
    stale = set(storage.names(out)) - {info.url for info in infos}
    for name in stale:
        if name.endswith(".tar"):
            storage.remove(storage.join(out, name))
    publish(shard_set, table)
    return shard_set


def report_summary(summary: Summary, say: Callable[[str], None]) -> None:
    """Print the summary of a conversion through ``say``."""
    made = summary.shard_set
    if summary.already:
        say("already there; the recordings were not looked at again (to convert them anew, delete the folder first):")
    splits: Iterable[str] = (f"{made.splits[name]} {name}" for name in SPLITS)
    say(
        f"{made.nsamples} windows of {made.people} people from {summary.records} records in {len(made.shards)} shards "
        f"({', '.join(splits)})" + (" - SIMULATED signals" if made.simulated else "")
    )
    if not made.simulated and made.people == len(np.unique(read_sample_table(made).waveform)) > 1:
        say("  each record counts as a person: if records share people, identify them first (docs/guides/data.md)")
    if summary.records_per_s is not None:
        say(f"  {summary.records_per_s:.1f} records/s")
    for reason, count in summary.rejected.most_common():
        say(f"  left out: {count} x {reason}")
    if summary.rejected:
        say(f"  each with its reason in {storage.join(summary.url, REJECTS)}")
    say(storage.join(summary.url, INDEX))
