"""CPSC 2018's own files: one MATLAB structure a record, without headers.

The China Physiological Signal Challenge 2018 (Liu et al., J. Med. Imaging Health Inform. 8, 2018, 1368-1373) shipped
``A0001.mat`` and so on: a structure ``ECG`` of ``sex``, ``age`` and ``data``, twelve leads in standard order in
millivolts at 500 Hz. The Challenges of 2020 and 2021 ship the same recordings as WFDB; those are read by ``wfdb``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import loadmat

from physio_dist.signals.montage import ECG_12
from physio_dist.signals.readers.folders import existing_folder, inside, nothing_found
from physio_dist.signals.recording import RecordError, Recording, Signal

_WANTED = "CPSC 2018 files (*.mat with a structure ECG)"
_RATE = 500.0


class Cpsc2018Reader:
    """A folder of CPSC 2018 ``.mat`` files, searched recursively; see `Reader`."""

    name = "cpsc2018"
    simulated = False

    def records(self, source: str) -> list[str]:
        """The files' paths relative to the folder, without extension, sorted; see `Reader.records`."""
        folder = existing_folder(source, _WANTED)
        # A .mat beside a header of the same name is a WFDB signal file.
        found = [path for path in folder.rglob("*.mat") if not path.with_suffix(".hea").exists()]
        if not found:
            hint = "; WFDB records are read by wfdb" if next(folder.rglob("*.hea"), None) else ""
            raise nothing_found(folder, _WANTED, hint)
        return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)

    def read(self, source: str, record: str) -> Recording:
        """One record in microvolts; labels ``age`` and ``sex``; see `Reader.read`."""
        path = Path(source) / f"{inside(record)}.mat"
        if not path.is_file():
            raise RecordError("the signal file is missing")
        try:
            ecg = loadmat(path, variable_names=["ECG"], squeeze_me=True)["ECG"]
            data = np.asarray(ecg["data"].item(), np.float64)
            sex, age = str(ecg["sex"].item()), ecg["age"].item()
        except Exception as error:
            raise RecordError(f"no CPSC 2018 structure can be read ({type(error).__name__})") from error
        if data.ndim != 2 or data.shape[0] != len(ECG_12):
            raise RecordError(f"data of shape {data.shape} where 12 x time was expected")
        labels: dict[str, Any] = {
            "age": int(age) if np.isreal(age) and 0 <= age <= 120 else None,
            "sex": {"Female": "F", "Male": "M"}.get(sex),
        }
        signal = Signal((data * 1e3).astype(np.float32), _RATE, ECG_12)
        return Recording(record, {"ecg": signal}, None, labels)


READER = Cpsc2018Reader()
