"""Files in the layout of DREAMER.mat, with noise for signals, as MATLAB writes them in version 5 and in 7.3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.io import savemat

ELECTRODES = ("AF3", "F7", "F3", "FC5", "T7", "P7", "O1", "O2", "P8", "T8", "FC6", "F4", "F8", "AF4")
SCORES = ("ScoreValence", "ScoreArousal", "ScoreDominance")


def people_of(people: int, clips: int, seconds: float, rest: float, seed: int = 0) -> list[dict[str, Any]]:
    """What ``DREAMER.Data`` holds; clips differ in length by a few samples. EEG lies 4 mV off zero."""
    rng = np.random.default_rng(seed)

    def cells(rate: int, channels: int, length: float, offset: float, size: float) -> list[NDArray[np.float64]]:
        return [
            offset + size * rng.standard_normal((round(rate * length) + clip % 3, channels)) for clip in range(clips)
        ]

    return [
        {
            "Age": str(20 + person), "Gender": "female" if person % 2 else "male",
            "EEG": {"baseline": cells(128, 14, rest, 4200, 30), "stimuli": cells(128, 14, seconds, 4200, 30)},
            "ECG": {"baseline": cells(256, 2, rest, 2000, 300), "stimuli": cells(256, 2, seconds, 2000, 300)},
            **{name: rng.integers(1, 6, (clips, 1)).astype(np.float64) for name in SCORES},
        }
        for person in range(people)
    ]  # fmt: skip


def facts_of(people: list[dict[str, Any]]) -> dict[str, Any]:
    """What stands beside ``Data``."""
    return {
        "EEG_SamplingRate": 128.0, "ECG_SamplingRate": 256.0, "EEG_Electrodes": list(ELECTRODES),
        "noOfSubjects": float(len(people)), "noOfVideoSequences": 18.0, "Provider": "somebody",
    }  # fmt: skip


def write_v5(path: Path, people: list[dict[str, Any]], compressed: bool = True, **facts: Any) -> Path:
    """With SciPy: a dict is a struct, an array of objects an array of cells."""

    def given(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: given(one) for name, one in value.items()}
        if isinstance(value, list):
            cells = np.empty((len(value), 1), object)
            for i, one in enumerate(value):
                cells[i, 0] = given(one)
            return cells
        return value

    data = given(people).T if people else np.empty((1, 0), object)
    made = {"Data": data, **{name: given(value) for name, value in {**facts_of(people), **facts}.items()}}
    savemat(path, {"before": 1.0, "DREAMER": made}, do_compression=compressed)
    return path


def write_v73(path: Path, people: list[dict[str, Any]], **facts: Any) -> Path:
    """With h5py: a struct is a group, cells are references into ``#refs#``, dimensions are in reverse."""
    with h5py.File(path, "w", userblock_size=512) as file:
        refs = file.create_group("#refs#")

        def put(group: Any, name: str, value: Any, wide: bool = False) -> None:
            kind: str
            if isinstance(value, dict):
                kind, item = "struct", group.create_group(name)
                for field, one in value.items():
                    put(item, field, one)
            elif isinstance(value, list) and not value:
                kind, item = "cell", group.create_dataset(name, data=np.array([0, 0], np.uint64))
                item.attrs["MATLAB_empty"] = np.uint8(1)
            elif isinstance(value, list):
                found = []
                for one in value:
                    key = f"r{len(refs)}"
                    put(refs, key, one)
                    found.append(refs[key].ref)
                # 1 x N in MATLAB is N x 1 here.
                shape = (len(found), 1) if wide else (1, len(found))
                kind, item = "cell", group.create_dataset(name, shape, dtype=h5py.ref_dtype)
                for i, one in enumerate(found):
                    item[(i, 0) if wide else (0, i)] = one
            elif isinstance(value, str):
                codes = np.array([[ord(letter)] for letter in value], np.uint16)
                kind, item = "char", group.create_dataset(name, data=codes)
            elif np.size(value) == 0:
                kind, item = "double", group.create_dataset(name, data=np.array(np.shape(value), np.uint64))
                item.attrs["MATLAB_empty"] = np.uint8(1)
            else:
                kind, item = "double", group.create_dataset(name, data=np.atleast_2d(value).T)
            item.attrs["MATLAB_class"] = np.bytes_(kind)

        top = file.create_group("DREAMER")
        top.attrs["MATLAB_class"] = np.bytes_("struct")
        put(top, "Data", people, wide=True)
        for name, value in {**facts_of(people), **facts}.items():
            put(top, name, value, wide=True)
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")
    return path


WRITERS: dict[str, Callable[..., Path]] = {"v5": write_v5, "v73": write_v73}
