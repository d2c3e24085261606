"""Small recordings to write, and ways to write them wrongly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from physio_dist.signals.montage import ECG_12
from physio_dist.signals.readers import reader
from physio_dist.signals.recording import Recording, Signal


@pytest.fixture(scope="session")
def simulated() -> Recording:
    """A simulated recording of eight windows in which no electrode is ever at fault."""
    source = "people=40,windows=8,seed=5"
    simulate = reader("simulate")
    return next(r for r in (simulate.read(source, i) for i in simulate.records(source)) if not r.labels["faults"])


@pytest.fixture
def clean(simulated: Recording) -> Recording:
    """The same, with data that a test may change."""
    signal = simulated.signals["ecg"]
    return Recording("clean", {"ecg": Signal(signal.data.copy(), signal.rate, signal.channels)}, None, {})


@pytest.fixture
def real(recordings: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Path]:
    """Copies files of a set of real recordings, by stem, into a fresh folder.

    Those that are not part of the project come from `data_dir`.
    """

    def copy(corpus: str, *stems: str) -> Path:
        folder = tmp_path / corpus
        folder.mkdir()
        for stem in stems:
            paths = list((recordings / corpus).glob(f"{stem}.*"))
            if not paths:
                paths = list((request.getfixturevalue("data_dir") / corpus).glob(f"{stem}.*"))
            for path in paths:
                shutil.copy(path, folder)
                (folder / path.name).chmod(0o644)
        return folder

    return copy


@pytest.fixture
def write_wfdb() -> Callable[..., None]:
    """Writes integers ``[channel, time]`` as format 16, with a true header unless told otherwise."""

    def write(
        folder: Path,
        name: str,
        digital: NDArray[np.int16],
        *,
        leads: tuple[str, ...] = ECG_12,
        suffix: str = ".dat",
        gain: str = "1000.0(0)/mV",
        rate: str = "500",
        comments: str = "",
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # The 24 bytes of a MATLAB 4 header, which nobody reads, stand before the samples of a .mat file.
        offset = 24 if suffix == ".mat" else 0
        samples = np.ascontiguousarray(digital.T, "<i2").tobytes()
        (folder / f"{name}{suffix}").write_bytes(b"\0" * offset + samples)
        plus = f"x1+{offset}" if offset else ""
        lines = [f"{name} {len(leads)} {rate} {digital.shape[1]}"]
        for lead, row in zip(leads, digital, strict=True):
            total = int(row.astype(np.int64).sum()) % 65536
            lines.append(f"{name}{suffix} 16{plus} {gain} 16 0 {row[0]} {total} 0 {lead}")
        (folder / f"{name}.hea").write_text("\n".join([*lines, comments]), "utf-8")

    return write


@pytest.fixture
def digital(simulated: Recording) -> NDArray[np.int16]:
    """Twelve leads of ten seconds at 500 Hz in whole microvolts (a slow heart: the samples are taken as they are)."""
    return np.rint(simulated.signals["ecg"].data[:, :5000]).astype(np.int16)
