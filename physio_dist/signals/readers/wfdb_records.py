"""WFDB records: a ``.hea`` header beside ``.dat`` or ``.mat`` signal files, as PhysioNet publishes them.

The library reads the signal formats. Three things it does are undone here, because each of them turns a faulty file
into plausible numbers: it fills in a missing gain, it drops non-ASCII bytes of a header (so "µV" becomes "V"), and it
checks neither sizes nor checksums.

Header and signal formats: https://www.physionet.org/physiotools/wag/header-5.htm and signal-5.htm.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import wfdb

from physio_dist.runtime.arrays import Int64Array
from physio_dist.signals.montage import canonical
from physio_dist.signals.readers.folders import existing_folder, inside, nothing_found
from physio_dist.signals.recording import MICROVOLTS, RecordError, Recording, Signal

_WANTED = "WFDB headers (*.hea)"

_BITS = {"8": 8, "16": 16, "24": 24, "32": 32, "61": 16, "80": 8, "160": 16, "212": 12, "310": 10, "311": 10}
_BITS.update({"508": 8, "516": 16, "524": 24})
# How many samples are packed into how many bytes; the compressed formats (508, 516, 524) have no fixed size.
_PACKING = {"8": (1, 1), "16": (1, 2), "24": (1, 3), "32": (1, 4), "61": (1, 2), "80": (1, 1), "160": (1, 2)}
_PACKING.update({"212": (2, 3), "310": (3, 4), "311": (3, 4)})

_GAIN = re.compile(r"(?P<gain>[+-]?\d*\.?\d+(?:[eE][+-]?\d+)?\.?)(?:\([+-]?\d+\))?(?:/(?P<unit>\S+))?")
_SNOMED = re.compile(r"\d{6,18}")
# MIMIC-IV-ECG (files/p1000/p10000032/s.../...) and PTB (patient001/...) name the person in the path.
_PERSON_FOLDER = re.compile(r"patient\d+|p\d{8}")


@dataclass(frozen=True)
class _Header:
    """Fields that are parsed from the header's text rather than by the library."""

    signal_lines: tuple[tuple[str, ...], ...]
    comments: tuple[str, ...]


class WfdbReader:
    """A folder of WFDB records, searched recursively; see `Reader`.

    ``RECORDS`` files are followed where there are any, so that a record whose header got lost is rejected with a
    reason instead of not being noticed; elsewhere every ``*.hea`` is a record. A record id is the path relative to the
    folder, with forward slashes and without extension.
    """

    name = "wfdb"
    simulated = False

    def records(self, source: str) -> list[str]:
        """All record ids, sorted; see `Reader.records`. ``source`` may also be a single ``.hea`` file."""
        if Path(source).is_file() and source.endswith(".hea"):
            return [Path(source).stem]
        folder = existing_folder(source, _WANTED)
        found = sorted(set(_walk(folder, PurePosixPath(), False, set())))
        if not found:
            raise nothing_found(folder, f"{_WANTED} and RECORDS files", _hint(folder))
        return found

    def read(self, source: str, record: str) -> Recording:
        """One record in microvolts; see `Reader.read`.

        The format's sentinel, and samples at the rails of the format's range, are NaN: neither is a measurement.
        Labels, where the header has them: ``age`` (whole years or None), ``sex`` ("F", "M" or None), ``dx`` (codes).
        Nothing else of the header's comments is kept.
        """
        relative = inside(record)
        root = Path(source).parent if Path(source).is_file() else Path(source)
        base = root / relative
        try:
            return self._read(record, relative, base)
        except RecordError as error:
            error.person = _person(relative)
            raise

    def _read(self, record: str, relative: PurePosixPath, base: Path) -> Recording:
        header = _parse_header(base.parent / f"{base.name}.hea")
        try:
            fields = wfdb.rdheader(str(base))
        except Exception as error:
            # The library's message may quote the header, and a header may name the patient.
            raise RecordError(f"the header cannot be parsed ({type(error).__name__})") from error
        _check_sizes(base.parent, fields)
        samples = _read_samples(base, fields)
        _check_contents(fields, samples)
        if any(fields.skew[i] for i in range(fields.n_sig)):
            samples = _read_samples(base, fields, ignore_skew=False)
        return Recording(record, {"ecg": _signal(header, fields, samples)}, _person(relative), _labels(header))


def _walk(folder: Path, below: PurePosixPath, governed: bool, seen: set[str]) -> Iterator[str]:
    """Record ids under ``folder``; ``governed`` says that a RECORDS file further up lists what counts here."""
    real = os.path.realpath(folder)
    if real in seen:  # a link back to a folder above
        return
    seen.add(real)
    listed: list[str] = []
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    names = {entry.name for entry in entries}
    if "RECORDS" in names:
        text = (folder / "RECORDS").read_text("utf-8", errors="replace")
        listed = [line.strip() for line in text.splitlines() if line.strip()]
    # RECORDS names records or, with a slash at the end, folders that have a RECORDS file of their own.
    subfolders = [line.rstrip("/") for line in listed if line.endswith("/") or (folder / line).is_dir()]
    here = [line for line in listed if line.rstrip("/") not in subfolders]
    yield from (str(below / line) for line in here)
    if not listed and not governed:
        yield from (str(below / name[:-4]) for name in names if name.endswith(".hea") and len(name) > 4)
    governed = governed or bool(here)
    for entry in entries:
        led = any(sub == entry.name or sub.startswith(f"{entry.name}/") for sub in subfolders)
        if entry.is_dir() and (led or not governed):
            yield from _walk(Path(entry.path), below / entry.name, governed and not led, seen)


def _hint(folder: Path) -> str:
    if any(folder.glob("*.mat")):
        return "; .mat files without headers are read by cpsc2018 if they are CPSC 2018's own"
    return ""


def _parse_header(path: Path) -> _Header:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise RecordError("the header file is missing") from None
    except OSError as error:
        raise RecordError(f"the header file cannot be read ({type(error).__name__})") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    content = [tuple(line.split()) for line in lines if not line.startswith("#")]
    comments = tuple(line.lstrip("# \t") for line in lines if line.startswith("#"))
    if not content or len(content[0]) < 2 or not content[0][1].isdigit():
        raise RecordError("the header cannot be parsed: its first line gives no record name and number of signals")
    if "/" in content[0][0]:
        raise RecordError("a record of several segments; only its segments can be read")
    count = int(content[0][1])
    if count != len(content) - 1:
        raise RecordError(f"the header announces {count} signals but describes {len(content) - 1}")
    if count == 0:
        raise RecordError("the header describes no signals")
    return _Header(tuple(content[1:]), comments)


def _check_sizes(folder: Path, fields: Any) -> None:
    """Every signal file has the size that samples, signals and format ask for."""
    for name in dict.fromkeys(fields.file_name):
        mine = [i for i in range(fields.n_sig) if fields.file_name[i] == name]
        if not name or PurePosixPath(name).name != name or name in {".", "..", "~"}:
            raise RecordError("the header names a signal file outside the record's folder, or none")
        path = folder / name
        if not path.is_file():
            raise RecordError(f"the signal file is missing: {name}")
        formats = {fields.fmt[i] for i in mine}
        if len(formats) > 1 or not formats <= set(_BITS):
            raise RecordError(f"signal format {', '.join(sorted(formats))} is not supported")
        fmt = formats.pop()
        if fmt not in _PACKING:
            continue
        frame = sum(fields.samps_per_frame[i] for i in mine)
        held = path.stat().st_size - (fields.byte_offset[mine[0]] or 0)
        group, width = _PACKING[fmt]
        if fields.sig_len is None:
            if group == 1 and held % (frame * width):
                raise RecordError(f"{name} does not hold a whole number of samples for {len(mine)} signals")
            continue
        exact = fields.sig_len * frame
        needed = math.ceil(exact * width / group)
        # Packed formats may be filled up to a whole group of samples.
        if not needed <= held <= (math.ceil(exact / group) * width if group > 1 else needed):
            raise RecordError(
                f"{name} holds {held} bytes of samples; {len(mine)} signals x {fields.sig_len} samples take {needed}"
            )


def _read_samples(base: Path, fields: Any, ignore_skew: bool = True) -> list[Int64Array]:
    try:
        record = wfdb.rdrecord(str(base), physical=False, smooth_frames=False, ignore_skew=ignore_skew)
        samples = [np.asarray(signal, np.int64) for signal in record.e_d_signal]
    except Exception as error:
        raise RecordError(f"the signal file cannot be read ({type(error).__name__})") from error
    for i, signal in enumerate(samples):
        wanted = (fields.sig_len or 0) * fields.samps_per_frame[i]
        if fields.sig_len and len(signal) != wanted:
            raise RecordError(f"signal {i} has {len(signal)} samples where the header says {wanted}")
    if not all(len(signal) for signal in samples):
        raise RecordError("the signals have no samples")
    return samples


def _check_contents(fields: Any, samples: list[Int64Array]) -> None:
    """First sample and 16-bit sum of every signal are those of the header, where the header records them."""
    first, checksum = fields.init_value, fields.checksum
    if not any(first) and not any(checksum):
        # Some writers fill the columns with zeros instead of computing them; size has been checked all the same.
        return
    for i, signal in enumerate(samples):
        if checksum[i] is not None and (int(signal.sum()) - checksum[i]) % 65536:
            raise RecordError(f"the checksum of signal {i} ({_lead(fields, i)}) disagrees with the header")
        if first[i] is not None and fields.fmt[i] != "8" and int(signal[0]) != first[i]:
            raise RecordError(f"the first sample of signal {i} ({_lead(fields, i)}) disagrees with the header")


def _signal(header: _Header, fields: Any, samples: list[Int64Array]) -> Signal:
    kept = _usable(header, fields)
    per_frame = {fields.samps_per_frame[i] for i, _ in kept}
    if len(per_frame) > 1:
        raise RecordError("the leads are sampled at different rates")
    data = np.empty((len(kept), min(len(samples[i]) for i, _ in kept)), np.float32)
    for row, (i, scale) in enumerate(kept):
        digital = samples[i]
        data[row] = (digital - fields.baseline[i]) * (scale / fields.adc_gain[i])
        if fields.fmt[i] != "8":  # format 8 stores differences: it has neither sentinel nor rails
            rail = 2 ** (_BITS[fields.fmt[i]] - 1) - 1
            data[row, np.abs(digital) >= rail] = np.nan
    names = tuple((fields.sig_name[i] or f"signal {i}").strip() for i, _ in kept)
    return Signal(data, float(fields.fs) * per_frame.pop(), names)


def _usable(header: _Header, fields: Any) -> list[tuple[int, float]]:
    """(signal, microvolts in its unit) of the signals to keep: standard leads, or else whatever is a voltage."""
    standard = [i for i in range(fields.n_sig) if canonical(fields.sig_name[i] or "") is not None]
    kept = []
    for i in standard or range(fields.n_sig):
        line = header.signal_lines[i]
        gain = _GAIN.fullmatch(line[2]) if len(line) > 2 else None
        if gain is None or float(gain["gain"].rstrip(".")) == 0.0:
            raise RecordError(f"the header gives no gain for signal {i} ({_lead(fields, i)}): its unit is unknown")
        scale = MICROVOLTS.get((gain["unit"] or "mV").lower())
        if scale is not None:
            kept.append((i, scale))
        elif standard:
            raise RecordError(f"the unit of signal {i} ({_lead(fields, i)}) is not a voltage")
    if not kept:
        raise RecordError("none of the signals is a voltage")
    return kept


def _lead(fields: Any, i: int) -> str:
    """A lead's name for a message; descriptions that are no lead name may be free text and stay out of it."""
    return canonical(fields.sig_name[i] or "") or "not a standard lead"


def _person(relative: PurePosixPath) -> str | None:
    folders = [part for part in relative.parts[:-1] if _PERSON_FOLDER.fullmatch(part)]
    return folders[-1] if folders else None


def _labels(header: _Header) -> dict[str, Any]:
    labels: dict[str, Any] = {}
    for comment in header.comments:
        key, colon, text = comment.partition(":")
        value = text.strip()
        match key.strip().lower() if colon else "":
            case "age":
                labels["age"] = whole_years(value)
            case "sex" | "gender":
                labels["sex"] = {"f": "F", "female": "F", "m": "M", "male": "M"}.get(value.lower())
            case "dx":
                labels["dx"] = [code for code in re.split(r"[,\s]+", value) if _SNOMED.fullmatch(code)]
    return labels


def whole_years(text: str) -> int | None:
    """An age in years, or None where the text is no age; 300 and the like stand for "over 89" in some corpora."""
    try:
        age = float(text)
    except ValueError:
        return None
    return int(age) if 0 <= age <= 120 else None


READER = WfdbReader()
