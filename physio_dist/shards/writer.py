"""Raw recordings to a shard set: parts in parallel, repeats left out, shards in parallel, the index last."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import safe_open

from physio_dist import __version__, storage
from physio_dist.config import ShardConfig, flatten
from physio_dist.errors import DataError, UserError
from physio_dist.shards.assemble import Kept, make_shard, part_path, signals_of
from physio_dist.shards.channels import spec_of, with_found, words
from physio_dist.shards.convert import Job, Part, make_part, read_part, record_keys
from physio_dist.shards.index import (
    INDEX,
    SPLITS,
    ShardInfo,
    ShardSet,
    Sidecar,
    SignalInfo,
    fingerprint_of,
    key_table,
    open_set,
    publish,
    read_sidecar,
    split_of,
)  # fmt: skip
from physio_dist.shards.labels import read_labels
from physio_dist.shards.progress import Progress
from physio_dist.shards.tar import Places
from physio_dist.shards.workers import as_they_come, worker_pool
from physio_dist.signals.readers import reader as reader_named

REJECTS = "rejects.jsonl"
MARKER = "_writing.json"


@dataclass(frozen=True)
class Summary:
    """What a conversion came to."""

    url: str
    records: int
    rejected: Counter[str]
    shard_set: ShardSet
    already: bool


def plan_job(reader: str, source: str, options: ShardConfig) -> Job:
    """List the records and join the label file.

    Raises:
        UserError: unknown reader, nothing to read, a label file that fits nothing.
    """
    reads = reader_named(reader)
    spec_of(options)  # What is wrong with the options is told before recordings are looked at.
    records = reads.records(source)
    spec = spec_of(with_found(reads, source, records, options))
    name = options.source or ("" if reads.simulated else Path(os.path.abspath(source)).name) or reader  # noqa: PTH100
    labels, people = read_labels(options.labels, options.person, records) if options.labels else ({}, {})
    return Job(
        reader=reader, input=source, source=name, spec=spec, records=tuple(records),
        keys=tuple(record_keys(records)), labels=labels, people=people,
    )  # fmt: skip


def convert(reader: str, source: str, out: str, options: ShardConfig) -> Summary:
    """Convert recordings to a shard set at ``out``.

    Killed at any moment and started again with the same options it goes on, and ends with the same bytes.

    Raises:
        UserError: nothing to convert, nothing kept, a folder in use by other data or another conversion.
    """
    out = storage.absolute(out)
    job = plan_job(reader, source, options)
    known = [open_set(url) for url in words(options.known)]
    decisive = [job.digest(), _of_bytes(options), [other.fingerprint for other in known]]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    spool = _spool(out, f"{job.digest()} {storage.absolute(job.input)}")
    # The first contact with the target comes before hours of work.
    if there := _claim(out, digest):
        if MARKER in storage.names(out):  # killed between its last write and this
            _tidy(out, spool)
        return Summary(out, len(job.records), Counter(), there, already=True)
    try:
        with _alone(spool, out):
            with worker_pool(options.workers) as pool:
                parts = _make_parts(job, spool, pool)
                kept, rejects = _choose(parts, options.quality, _hashes(known))
                if not kept:
                    _tidy(out, spool)
                    raise UserError(_nothing_kept(source, len(job.records), rejects))
                made = _make_shards(job, kept, spool, out, digest, options.samples_per_shard, pool)
            finished = _finish(job, out, digest, options, kept, *made, rejects, spool)
            _tidy(out, spool)
    except BrokenProcessPool:
        raise UserError(
            "a conversion process was killed (out of memory, or by hand); run the same command again to go on, with "
            "workers=N to use less memory"
        ) from None
    reasons = Counter(_kind(str(reject["reason"])) for reject in rejects)
    return Summary(out, len(job.records), reasons, finished, already=False)


@contextlib.contextmanager
def _alone(spool: Path, out: str) -> Iterator[None]:
    """Hold the lock of the spool, which is made if need be.

    Raises:
        UserError: another conversion holds it, or the spool cannot be written.
    """
    lock = FileLock(spool / "lock", timeout=0)
    try:
        spool.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise UserError(f"another conversion is writing {out} right now; wait for it to end") from None
    except OSError as error:
        raise storage.explain(str(spool), "write", error) from error
    try:
        yield
    finally:
        lock.release()


def _tidy(out: str, spool: Path) -> None:
    """Remove what is only there while a conversion runs, also what a killed one left."""
    for name in storage.names(out):
        if name.startswith(".") and name.endswith(".tmp"):
            storage.remove(storage.join(out, name))
    shutil.rmtree(spool, ignore_errors=True)
    # Last, because it is what tells the next run that there may be something to tidy.
    storage.remove(storage.join(out, MARKER))


def _hashes(known: Sequence[ShardSet]) -> dict[str, set[int]]:
    found = {other.url: set(read_sidecar(other).waveform.tolist()) - {0} for other in known}
    for url, hashes in found.items():
        if not hashes:
            raise UserError(f"known={url}: it was made by `physio-dist index` and has no waveform hashes to compare")
    return found


def _of_bytes(options: ShardConfig) -> dict[str, Any]:
    """The options that decide the shards' bytes beside the job and the content of the ``known`` sets."""
    flat = flatten(options)
    return {name: flat[name] for name in ("quality", "split.val", "split.test", "samples_per_shard")}




def _claim(out: str, digest: str) -> ShardSet | None:
    """Mark ``out`` as being written by this job; the finished set where it already did.

    Raises:
        UserError: something else is there.
    """
    found = storage.names(out)
    if INDEX in found:
        there = open_set(out)
        if there.made_by.get("job") == digest:
            return there
        raise UserError(
            f"{out} already holds a shard set made from other data or options (fingerprint {there.fingerprint[:12]}); "
            "choose another --out or delete it first"
        )
    if MARKER in found:
        if storage.read_json(storage.join(out, MARKER)) == {"job": digest}:
            return None
        raise UserError(
            f"{out} holds an unfinished conversion of other data or with other options; finish it with its own "
            "command, choose another --out, or delete the folder first"
        )
    if any(name.endswith(".tar") for name in found):
        raise UserError(f"{out} holds tar files of something else; choose another --out")
    storage.write_json(storage.join(out, MARKER), {"job": digest})
    return None


def _spool(out: str, what: str) -> Path:
    digest = hashlib.sha256(what.encode()).hexdigest()
    if storage.is_local(out):
        return storage.local_path(out) / f".work-{digest[:16]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    where = hashlib.sha256(out.encode()).hexdigest()[:8]
    return cache / "physio-dist" / "convert" / f"{digest[:16]}-{where}"


def _make_parts(job: Job, spool: Path, pool: ProcessPoolExecutor) -> list[Part]:
    parts: dict[int, Part] = {}
    with Progress(len(job.records), "records", "reading") as bar:
        for number in range(job.parts()):
            if part := read_part(part_path(spool, number)):
                parts[number] = part
                bar.update(part.records)
        missing = [number for number in range(job.parts()) if number not in parts]
        tasks = [(job.part(number), str(part_path(spool, number))) for number in missing]
        for i, _ in as_they_come(pool, make_part, tasks):
            number = missing[i]
            made = read_part(part_path(spool, number))
            if made is None:
                raise DataError(f"the spooled part {part_path(spool, number)} cannot be read back")
            parts[number] = made
            bar.update(made.records)
    return [parts[number] for number in range(job.parts())]


def _choose(parts: Sequence[Part], quality: str, known: dict[str, set[int]]) -> tuple[list[Kept], list[dict[str, Any]]]:
    """Which windows are kept: repeats are left out (the first record in order stays), then unfit ones if asked."""
    kept: list[Kept] = []
    rejects: list[dict[str, Any]] = []
    first: dict[int, str] = {}
    for number, part in enumerate(parts):
        rejects += part.rejects
        repeats: set[str] = set()
        for row, window in enumerate(part.windows):
            original = first.setdefault(window.waveform, window.record)
            elsewhere = next((url for url, hashes in known.items() if window.waveform in hashes), None)
            if original != window.record or elsewhere:
                if window.record not in repeats:
                    repeats.add(window.record)
                    where = f"in {elsewhere}" if elsewhere else f"record {original}"
                    rejects.append({"record": window.record, "reason": f"repeat: the same waveform as {where}"})
            elif quality == "reject" and not window.fit:
                reason = "unfit: " + "; ".join(window.reasons)
                rejects.append({"record": window.record, "start_s": window.start_s, "reason": reason})
            else:
                kept.append(Kept(number, row, window))
    return kept, rejects


def _kind(reason: str) -> str:
    # Names and numbers would make a kind of its own of every record.
    words = re.split(r"[:;(,]", reason, maxsplit=1)[0].split()
    return " ".join(word for word in words if not re.search(r"[\d._/]", word))


def _nothing_kept(source: str, records: int, rejects: Sequence[dict[str, Any]]) -> str:
    first = "; ".join(f"{reject['record']}: {reject['reason']}" for reject in rejects[:3])
    return f"{source}: none of its {records} records gave a window that can be used; the first reasons: {first}"


def _make_shards(
    job: Job, kept: Sequence[Kept], spool: Path, out: str, digest: str, per_shard: int, pool: ProcessPoolExecutor
) -> tuple[list[ShardInfo], list[Places]]:
    prefix = "-".join(signals_of(spool, kept[0].part))
    groups = [kept[i : i + per_shard] for i in range(0, len(kept), per_shard)]
    tasks = [
        (job.source, group, str(spool), out, f"{prefix}-{n:06d}.tar", digest) for n, group in enumerate(groups)
    ]  # fmt: skip
    made: dict[int, tuple[ShardInfo, list[Places]]] = {}
    with Progress(len(groups), "shards", "writing") as bar:
        for n, result in as_they_come(pool, make_shard, tasks):
            made[n] = result
            bar.update()
    return [made[n][0] for n in range(len(groups))], [place for n in range(len(groups)) for place in made[n][1]]


def _finish(
    job: Job, out: str, digest: str, options: ShardConfig, kept: Sequence[Kept], infos: list[ShardInfo],
    places: list[Places], rejects: list[dict[str, Any]], spool: Path,
) -> ShardSet:  # fmt: skip
    signals = signals_of(spool, kept[0].part)
    valid: dict[str, list[Any]] = {name: [] for name in signals}
    samples: dict[str, int] = {}
    for number, items in itertools.groupby(kept, key=lambda item: item.part):
        rows = [item.row for item in items]
        with safe_open(part_path(spool, number), framework="numpy") as file:
            for name in signals:
                valid[name].append(file.get_tensor(f"valid.{name}")[rows])
                samples[name] = int(file.get_slice(name).get_shape()[2])
    split = [split_of(item.facts.person, options.split.val, options.split.test) for item in kept]
    person = np.array([item.facts.person for item in kept], dtype=np.uint64)
    sidecar = Sidecar(
        offset={name: np.array([place[name][0] for place in places], dtype=np.int64) for name in signals},
        check={name: np.array([place[name][1] for place in places], dtype=np.uint32) for name in signals},
        valid={name: np.concatenate(valid[name]) for name in signals},
        split=np.array(split, dtype=np.uint8),
        person=person,
        waveform=np.array([item.facts.waveform for item in kept], dtype=np.uint64),
        key=key_table([item.facts.key for item in kept]),
    )
    spec = job.spec
    infos_of = {name: SignalInfo(spec.channels_of(name), samples[name], spec.uv_per_bit_of(name)) for name in signals}
    sidecar_sha256 = hashlib.sha256(sidecar.to_bytes()).hexdigest()
    shard_set = ShardSet(
        url=out, shards=tuple(infos), signals=infos_of, rate=float(job.spec.rate),
        splits={name: split.count(code) for code, name in enumerate(SPLITS)},
        people=len(np.unique(person)), simulated=reader_named(job.reader).simulated, sources=(job.source,),
        sidecar_sha256=sidecar_sha256, fingerprint=fingerprint_of(infos, infos_of, job.spec.rate, sidecar_sha256),
        made_by={
            "job": digest, "physio_dist": __version__, "reader": job.reader,
            "options": {k: v for k, v in flatten(options).items() if k not in ("workers", "labels", "known")},
        },
    )  # fmt: skip
    lines = "".join(json.dumps(reject, sort_keys=True) + "\n" for reject in rejects)
    storage.write_bytes(storage.join(out, REJECTS), lines.encode())
    stale = set(storage.names(out)) - {info.url for info in infos}
    for name in stale:
        if name.endswith(".tar"):
            storage.remove(storage.join(out, name))
    publish(shard_set, sidecar)
    return shard_set


def tell(summary: Summary, say: Callable[[str], None]) -> None:
    """Say what a conversion came to."""
    made = summary.shard_set
    if summary.already:
        say("already there; the recordings were not looked at again (to convert them anew, delete the folder first):")
    splits: Iterable[str] = (f"{made.splits[name]} {name}" for name in SPLITS)
    say(
        f"{made.nsamples} windows of {made.people} people from {summary.records} records in {len(made.shards)} shards "
        f"({', '.join(splits)})" + (" - SIMULATED signals" if made.simulated else "")
    )
    if not made.simulated and made.people == len(np.unique(read_sidecar(made).waveform)) > 1:
        say("  each record counts as a person: where they share people, tell them apart (docs/data.md) before a split")
    for reason, count in summary.rejected.most_common():
        say(f"  left out: {count} x {reason}")
    if summary.rejected:
        say(f"  each with its reason in {storage.join(summary.url, REJECTS)}")
    say(storage.join(summary.url, INDEX))
