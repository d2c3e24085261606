"""Small shard sets made without recordings, and small folders of recordings."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from physio_dist import storage
from physio_dist.data.format import tar
from physio_dist.data.format.index import SPLITS, ShardInfo, ShardSet, SignalInfo, fingerprint_of, open_set
from physio_dist.data.format.sample_table import SampleTable, key_table, publish
from physio_dist.data.handle import open_dataset
from physio_dist.data.loading.cache import ShardCache
from physio_dist.data.loading.dataset import ShardDataset
from physio_dist.signals.montage import ECG_12
from physio_dist.signals.readers import reader


def signal_of(sample: int, channels: int = 2, length: int = 64, seed: int = 0) -> np.ndarray:
    """The samples that `make_set` gives to a sample: int16 ``[channel, time]``."""
    rng = np.random.default_rng([seed, sample])
    return rng.integers(-3000, 3000, (channels, length)).astype(np.int16)


def build(
    url: str, sizes: tuple[int, ...] = (5, 3, 4), seed: int = 0, length: int = 64, every: int = 4, channels: int = 2
) -> ShardSet:
    """Publish a set: shards of these sizes, two channels or more, one sample in ``every`` held out, channel 1 of
    each third sample invalid."""
    n, shards, places, start = sum(sizes), [], [], 0
    for number, size in enumerate(sizes):
        file = io.BytesIO()
        samples = [
            tar.Sample(f"s{seed}-{i:04d}", {"ecg": signal_of(i, channels, length, seed)}, {"labels": {"n": i % 2}})
            for i in range(start, start + size)
        ]
        places += tar.write(samples, file)
        data = file.getvalue()
        name = f"ecg-{number:06d}.tar"
        storage.write_bytes(storage.join(url, name), data)
        shards.append(ShardInfo(name, size, len(data), hashlib.sha256(data).hexdigest()))
        start += size
    split = np.array([i % every == every - 1 for i in range(n)], dtype=np.uint8)
    table = SampleTable(
        offset={"ecg": np.array([place["ecg"][0] for place in places], dtype=np.int64)},
        check={"ecg": np.array([place["ecg"][1] for place in places], dtype=np.uint32)},
        valid={"ecg": np.array([[True, i % 3 > 0] + [True] * (channels - 2) for i in range(n)])},
        split=split,
        person=np.arange(n, dtype=np.uint64) // 2,
        waveform=np.arange(1, n + 1, dtype=np.uint64),
        key=key_table([f"s{seed}-{i:04d}" for i in range(n)]),
    )
    signals = {"ecg": SignalInfo(ECG_12[:channels], length, 2.0)}
    digest = hashlib.sha256(table.to_bytes()).hexdigest()
    publish(
        ShardSet(
            url=url,
            shards=tuple(shards),
            signals=signals,
            rate=200.0,
            splits={name: int((split == code).sum()) for code, name in enumerate(SPLITS)},
            people=len(np.unique(table.person)),
            simulated=False,
            sources=("built",),
            sample_table_sha256=digest,
            fingerprint=fingerprint_of(shards, signals, 200.0, digest),
            made_by={},
        ),
        table,
    )
    return open_set(url)


def dataset_of(tmp_path: Path, *urls: str, weights: tuple[float, ...] = ()) -> ShardDataset:
    parts = list(zip(urls, weights or (1.0,) * len(urls), strict=True))
    return open_dataset(parts, "ecg", ShardCache(str(tmp_path / "cache"), 1e9))


@pytest.fixture()
def make_set() -> Callable[..., ShardSet]:
    return build


def flip(path: Path, place: int) -> None:
    """Turn one bit of a file over."""
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.fixture()
def flip_bit() -> Callable[[Path, int], None]:
    return flip


@pytest.fixture(scope="session")
def heart() -> Callable[[int], np.ndarray]:
    """Twelve leads of ten seconds at 500 Hz in whole microvolts, of an invented person."""

    def beat(person: int) -> np.ndarray:
        source = f"people={person + 1},windows=3,seed=77"
        recording = reader("simulate").read(source, f"sim-{person:06d}")
        return np.rint(recording.signals["ecg"].data[:, :5000]).astype(np.int16)

    return beat


@pytest.fixture(scope="session")
def write_wfdb(heart: Callable[[int], np.ndarray]) -> Callable[..., None]:
    """Writes a WFDB record (format 16) into a folder."""

    def write(
        folder: Path,
        name: str,
        person: int,
        leads: tuple[str, ...] = ECG_12,
        comments: tuple[str, ...] = (),
        flat: tuple[str, ...] = (),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        data = heart(person)[[ECG_12.index(lead) for lead in leads]]
        for lead in flat:
            data[leads.index(lead)] = 0
        (folder / f"{name}.dat").write_bytes(np.ascontiguousarray(data.T, "<i2").tobytes())
        lines = [f"{name} {len(leads)} 500 5000"]
        for lead, row in zip(leads, data, strict=True):
            total = int(row.astype(np.int64).sum()) % 65536
            lines.append(f"{name}.dat 16 1000(0)/mV 16 0 {row[0]} {total} 0 {lead}")
        (folder / f"{name}.hea").write_text("\n".join([*lines, *(f"# {text}" for text in comments), ""]))

    return write
