"""EDF and EDF+ files: EEG, ECG or both, beside an optional table of people and labels.

The library splits the data records into signals. What it makes up where a file is faulty is refused here: it cuts a
truncated file, goes by the size where that contradicts the header, takes digital values for physical ones where the
calibration is missing or senseless, and joins what an interrupted recording has on either side of a gap.

Of the header only numbers, labels and units are looked at: its patient and recording fields hold names and birth dates.

Format: Kemp et al., Electroencephalogr. Clin. Neurophysiol. 82 (1992) 391-393, and https://www.edfplus.info/specs.
"""

from __future__ import annotations

import contextlib
import csv
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import edfio
import numpy as np

from physio_dist.errors import UserError, nearest
from physio_dist.runtime.arrays import Float32Array, Float64Array
from physio_dist.signals.montage import ecg_name, electrode
from physio_dist.signals.readers.folders import existing_folder, inside, nothing_found
from physio_dist.signals.recording import MICROVOLTS, RecordError, Recording, Signal, label_value

_WANTED = "EDF files (*.edf)"
_TABLE = "recordings.csv"
_ENDINGS = (".edf", ".EDF")
_MODALITIES: dict[str, Callable[[str], str | None]] = {"ecg": ecg_name, "eeg": electrode}
# What EDF+ calls the kinds of signals, and the words of labels that are no electrode: nothing else of a label is
# repeated in a message, for it might be a name.
_WORDS = frozenset(
    {
        "ecg", "ekg", "eeg", "eog", "emg", "erg", "meg", "mcg", "ep", "temp", "resp", "sao2", "spo2", "light", "sound",
        "event", "marker", "left", "right", "loc", "roc", "chin", "leg", "ref", "le", "ar", "av", "avg", "a", "m",
    }
)  # fmt: skip


class _Row(NamedTuple):
    """One file's row of the table."""

    person: str | None
    labels: dict[str, Any]


class EdfReader:
    """A folder of EDF and EDF+ files, searched recursively; see `Reader`.

    A record id is the path relative to the folder, with forward slashes and without extension. Where the folder holds
    a ``recordings.csv`` (``file``, ``subject``, then labels), that gives the person and the labels, and its files are
    records whether they are there or not.
    """

    name = "edf"
    simulated = False

    def records(self, source: str) -> list[str]:
        """All record ids, sorted; see `Reader.records`. ``source`` may also be a single EDF file."""
        if Path(source).is_file() and source.endswith(_ENDINGS):
            return [Path(source).stem]
        folder = existing_folder(source, _WANTED)
        found = {
            path.relative_to(folder).with_suffix("").as_posix()
            for path in folder.rglob("*")
            if path.suffix in _ENDINGS and path.is_file()
        }
        if not found:
            raise nothing_found(folder, _WANTED)
        return sorted(found | set(_table(source) or ()))

    def read(self, source: str, record: str) -> Recording:
        """One recording in microvolts, each modality at its own rate; see `Reader.read`.

        ``ecg`` has the channels whose labels name an ECG lead or an ECG without a lead, ``eeg`` those that name an
        electrode of the 10-10 system; other channels are left out.
        """
        relative = inside(record)
        root = Path(source).parent if Path(source).is_file() else Path(source)
        path = next((p for p in (root / f"{relative}{ending}" for ending in _ENDINGS) if p.is_file()), None)
        if path is None:
            raise RecordError("the file is missing")
        row = _Row(None, {})
        try:
            table = _table(source)
        except UserError as error:
            raise RecordError(str(error)) from error
        if table is not None:
            if record not in table:
                # Without its row the person is unknown, and a split by person would be guesswork.
                raise RecordError(f"{_TABLE} has no row for this file")
            row = table[record]
        try:
            found, unused = _signals(path)
        except RecordError as error:
            error.person = row.person
            raise
        return Recording(record, found, row.person, dict(row.labels), unused)


def _signals(path: Path) -> tuple[dict[str, Signal], tuple[str, ...]]:
    """The modalities of a file, and what other channels it has."""
    _check_size(path)
    try:
        edf = edfio.read_edf(path, header_encoding="latin-1")
        signals = edf.signals
        interrupted = edf.reserved.startswith("EDF+D") and not edf.is_continuous
    except OSError:
        raise
    except Exception as error:
        # The library's message may quote the header, and a header may name the patient.
        raise RecordError(f"the header cannot be parsed ({type(error).__name__})") from error
    if interrupted:
        raise RecordError("the recording was interrupted (EDF+D): its parts do not follow each other in time")
    found, rest = {}, list(signals)
    for modality, standard in _MODALITIES.items():
        chosen = [signal for signal in rest if standard(signal.label) is not None]
        rest = [signal for signal in rest if standard(signal.label) is None]
        if chosen:
            found[modality] = _signal(modality, chosen)
    unused = _told([signal.label.strip() for signal in rest])
    if not found:
        there = ", ".join(unused) or "no signals"
        raise RecordError(f"no channel is an ECG lead or an EEG electrode; it has {there}")
    return found, unused


def _check_size(path: Path) -> None:
    """The header is whole and promises exactly the bytes that are there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(256)
        if len(head) < 256 or head[:8] != b"0       ":
            raise RecordError("this is no EDF file: it does not begin with an EDF header")
        try:
            header, records, signals = int(head[184:192]), int(head[236:244]), int(head[252:256])
            seconds = float(head[244:252])
            if signals < 1 or header != 256 * (signals + 1):
                raise RecordError(f"the header says that it has {header} bytes for {signals} signals, which cannot be")
            # Eight characters a signal, after 216 characters a signal of labels, units and ranges.
            file.seek(256 + 216 * signals)
            samples = sum(int(file.read(8)) for _ in range(signals))
        except ValueError:
            raise RecordError("the header cannot be parsed: a number in it is none, or it is cut short") from None
    if records < 1 or samples < 1 or not 0 < seconds < float("inf"):
        raise RecordError(f"the header promises no samples: {records} data records of {seconds:g} s")
    wanted = header + 2 * samples * records
    if size != wanted:
        verdict = "it is truncated" if size < wanted else "it holds more than its header says"
        raise RecordError(f"the file has {size} bytes where the header promises {wanted}: {verdict}")


def _signal(modality: str, chosen: list[Any]) -> Signal:
    rates = sorted({float(signal.sampling_frequency) for signal in chosen})
    if len(rates) > 1:
        listed = " and ".join(f"{rate:g}" for rate in rates)
        raise RecordError(f"the {modality} channels are sampled at different rates: {listed} Hz")
    data = np.stack([_microvolts(signal) for signal in chosen])
    return Signal(data, rates[0], tuple(signal.label.strip() for signal in chosen))


def _microvolts(signal: Any) -> Float32Array:
    scale = MICROVOLTS.get(_unit(signal.physical_dimension))
    if scale is None:
        raise RecordError(f"the physical dimension of {signal.label.strip()} is not a voltage (uV, mV, V)")
    try:
        low, high = float(signal.physical_min), float(signal.physical_max)
        first, last = int(signal.digital_min), int(signal.digital_max)
    except ValueError:
        first = last = 0
    # A physical minimum above the maximum is allowed: it turns the signal over.
    if not (last > first and np.isfinite([low, high]).all() and low != high):
        raise RecordError(f"the header's calibration of {signal.label.strip()} is missing or senseless")
    gain = (high - low) / (last - first)
    values: Float64Array = (signal.digital.astype(np.float64) - first) * gain + low
    return (values * scale).astype(np.float32)


def _unit(text: str) -> str:
    # The header is ASCII by its specification; writers that want a micro sign use Latin-1 or UTF-8.
    with contextlib.suppress(UnicodeError):
        text = text.encode("latin-1").decode("utf-8")
    return text.strip().lower()


def _told(labels: list[str]) -> tuple[str, ...]:
    """Labels for a message, as far as they consist of known words."""
    plain = [label for label in labels if label and all(_known(word) for word in re.split(r"[^A-Za-z0-9]+", label))]
    others = [f"{len(labels) - len(plain)} with labels of their own"] if len(plain) < len(labels) else []
    return (*plain, *others)


def _known(word: str) -> bool:
    plain = word.lower().rstrip("0123456789")
    return not plain or word.lower() in _WORDS or plain in _WORDS or electrode(word) is not None


@lru_cache(maxsize=4)
def _table(source: str) -> dict[str, _Row] | None:
    """The rows of the folder's table by record id; None where there is no table.

    Raises:
        UserError: it lacks a column, is no CSV, or contradicts itself.
    """
    path = Path(source) / _TABLE
    if not path.is_file():
        return None
    found: dict[str, _Row] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines, strict=True)
            columns = list(rows.fieldnames or ())
            for column in ("file", "subject"):
                if column not in columns:
                    raise UserError(f"{path}: there is no column `{column}`: {nearest(column, columns)}")
            for cells in rows:
                record = (cells["file"] or "").strip().removeprefix("./")
                record = next((record.removesuffix(e) for e in _ENDINGS if record.endswith(e)), record)
                labels = {k: label_value(v) for k, v in cells.items() if k and k not in ("file", "subject")}
                row = _Row((cells["subject"] or "").strip() or None, labels)
                if not record or found.setdefault(record, row) != row:
                    raise UserError(f"{path}, line {rows.line_num}: no file, or another row says otherwise of it")
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a UTF-8 CSV file ({type(error).__name__})") from None
    return found


READER = EdfReader()
