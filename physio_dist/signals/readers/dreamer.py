"""DREAMER: EEG and ECG of 23 people who watch 18 film clips and rate each (Katsigiannis and Ramzan, IEEE J. Biomed.
Health Inform. 22 (2018) 98-107; Zenodo 546113).

One file, ``DREAMER.mat``: a struct ``DREAMER`` whose ``Data`` has a cell a person, a struct of ``Age Gender EEG ECG
ScoreValence ScoreArousal ScoreDominance``. ``EEG`` and ``ECG`` have cells ``baseline`` (a neutral film before each
clip) and ``stimuli``, each time x channel; ratings are whole numbers from 1 to 5. EEG: 14 electrodes of an Emotiv EPOC
at 128 Hz. ECG: two channels of a Shimmer at 256 Hz.

The file names no units and no leads. EEG is taken for microvolts, on the recorder's offset of some millivolts; the band
takes that out. ECG is taken as it stands too, so its amplitudes may be those of the recorder's counts, and its channels
are called ``ECG`` and ``ECG2``, two unknown leads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from physio_dist.errors import UserError
from physio_dist.signals.montage import ONE_LEAD, SECOND_LEAD
from physio_dist.signals.readers.mat_people import NotSuchError, people
from physio_dist.signals.recording import RecordError, Recording, Signal

ELECTRODES = ("AF3", "F7", "F3", "FC5", "T7", "P7", "O1", "O2", "P8", "T8", "FC6", "F4", "F8", "AF4")
_WANTED = "DREAMER.mat as published"
_VARIABLE, _PEOPLE = "DREAMER", "Data"
_FILE = "DREAMER.mat"


class _Layout(NamedTuple):
    rate: float
    channels: tuple[str, ...]


_SIGNALS = {"EEG": _Layout(128.0, ELECTRODES), "ECG": _Layout(256.0, (ONE_LEAD, SECOND_LEAD))}
_PHASES = {"baseline": "baseline", "stimulus": "stimuli"}
_RATINGS = {"valence": "ScoreValence", "arousal": "ScoreArousal", "dominance": "ScoreDominance"}
_SEX = {"male": "M", "female": "F"}


class DreamerReader:
    """``DREAMER.mat``, or its folder; see `Reader`.

    A record is what one person did with one clip: ``s07-c11-stimulus``, and before it ``s07-c11-baseline``.
    """

    name = "dreamer"
    simulated = False

    def records(self, source: str) -> list[str]:
        """All record ids, sorted, of a file that has been checked throughout; see `Reader.records`."""
        path = _file(source)
        state = path.stat()
        clips = _checked(str(path), state.st_size, state.st_mtime_ns)
        return sorted(
            f"s{person:02d}-c{clip:02d}-{phase}"
            for person, count in enumerate(clips, 1) for clip in range(1, count + 1) for phase in _PHASES
        )  # fmt: skip

    def read(self, source: str, record: str) -> Recording:
        """One clip, or the rest before it, each signal at its own rate; see `Reader.read`.

        Labels: ``clip`` (from 1), ``phase`` (``baseline`` or ``stimulus``), ``age``, ``sex`` ("F", "M"); and of a
        stimulus what the person made of it, ``valence``, ``arousal``, ``dominance``, from 1 to 5.
        """
        person_part, clip_part, phase = [*record.split("-"), "", "", ""][:3]
        if phase not in _PHASES or not (person_part[1:].isdigit() and clip_part[1:].isdigit()):
            raise RecordError("the record id is not s<person>-c<clip>-<baseline or stimulus>")
        path, number, clip = _file(source), int(person_part[1:]), int(clip_part[1:])
        person = _one_person(path, number)
        if person is None or not 0 < clip <= len(person["EEG"]["stimuli"]):
            raise RecordError("the file has no such person or clip")
        labels: dict[str, Any] = {"clip": clip, "phase": phase, **_about(person)}
        if phase == "stimulus":
            labels.update({name: int(np.ravel(person[field])[clip - 1]) for name, field in _RATINGS.items()})
        signals = {
            name.lower(): Signal(
                np.ascontiguousarray(np.asarray(person[name][_PHASES[phase]][clip - 1], np.float32).T),
                layout.rate, layout.channels,
            )
            for name, layout in _SIGNALS.items()
        }  # fmt: skip
        return Recording(record, signals, f"s{number:02d}", labels)


def _file(source: str) -> Path:
    if "://" in source:
        raise UserError(f"{source}: raw recordings are read from a local file; copy it there first")
    path = Path(source)
    path = path / _FILE if path.is_dir() else path
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected {_WANTED}")
    return path


def _about(person: Mapping[str, Any]) -> dict[str, Any]:
    age = person.get("Age")
    text = age if isinstance(age, str) else "".join(f"{value:g}" for value in np.ravel(age)) if age is not None else ""
    sex = person.get("Gender")
    return {
        "age": int(text) if text.isdigit() and int(text) <= 120 else None,
        "sex": _SEX.get(sex.strip().lower()) if isinstance(sex, str) else None,
    }


@lru_cache(maxsize=2)
def _checked(path: str, size: int, changed: int) -> list[int]:
    """Check the whole file, one person at a time, and count the clips of each."""
    clips: list[int] = []
    try:
        for name, value in people(Path(path), _VARIABLE, _PEOPLE):
            if name != _PEOPLE:
                _check_fact(path, name, value)
                continue
            clips.append(_check_person(f"{path}, person {len(clips) + 1}", value))
            if clips[-1] != clips[0]:
                raise UserError(
                    f"{path}, person {len(clips)}: {clips[-1]} clips where person 1 has {clips[0]}; a piece is missing"
                )
    except NotSuchError as error:
        raise _not_dreamer(path, error, len(clips)) from error
    if not clips:
        raise UserError(f"{path}: not {_WANTED}: {_VARIABLE}.{_PEOPLE} is missing or empty")
    return clips


def _not_dreamer(path: str | Path, error: NotSuchError, complete: int) -> UserError:
    after = f" after person {complete}" if complete else ""
    return UserError(f"{path}: not {_WANTED}{after}: {error}")


def _check_fact(path: str, name: str, value: Any) -> None:
    """Check a fact about all recordings against the published one."""
    for signal, layout in _SIGNALS.items():
        if name == f"{signal}_SamplingRate" and np.ravel(value).tolist() != [layout.rate]:
            raise UserError(f"{path}: {name} is {np.ravel(value).tolist()}, DREAMER's is {layout.rate:g}")
    if name == "EEG_Electrodes" and tuple(value) != ELECTRODES:
        raise UserError(f"{path}: EEG_Electrodes are not DREAMER's {', '.join(ELECTRODES)}")


def _check_person(where: str, person: Any) -> int:
    """Check a person's signals and ratings, and count the clips.

    Raises:
        UserError: a piece is missing or of another shape, or a rating is outside of the scale.
    """
    if not isinstance(person, dict):
        raise UserError(f"{where}: no struct of Age, Gender, EEG, ECG and scores; expected {_WANTED}")
    counts: dict[str, int] = {}
    for signal in _SIGNALS:
        for phase in _PHASES.values():
            counts[f"{signal}.{phase}"] = _count_parts(where, person.get(signal), signal, phase)
    for field in _RATINGS.values():
        counts[field] = _count_ratings(where, person.get(field), field)
    if len(set(counts.values())) > 1 or not counts["EEG.stimuli"]:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(f"{where}: not as many of each as there are clips, so nobody knows which is missing: {listed}")
    return counts["EEG.stimuli"]


def _count_parts(where: str, phases: Any, signal: str, phase: str) -> int:
    name = f"{signal}.{phase}"
    parts = phases.get(phase) if isinstance(phases, dict) else None
    if not isinstance(parts, list):
        raise UserError(f"{where}: {name} is missing, or no array of cells")
    for clip, part in enumerate(parts, 1):
        _check_signal(f"{where}, clip {clip}: {name}", part, len(_SIGNALS[signal].channels))
    return len(parts)


def _count_ratings(where: str, ratings: Any, field: str) -> int:
    if not isinstance(ratings, np.ndarray) or ratings.dtype.kind not in "iufb":
        raise UserError(f"{where}: {field} is missing, or no numbers")
    for clip, rating in enumerate(np.ravel(ratings).tolist(), 1):
        if rating not in (1, 2, 3, 4, 5):
            raise UserError(f"{where}, clip {clip}: {field} is {rating:g}; a rating is a whole number from 1 to 5")
    return ratings.size


def _check_signal(name: str, part: Any, channels: int) -> None:
    if not isinstance(part, np.ndarray) or part.dtype.kind not in "iuf":
        raise UserError(f"{name} holds no numbers")
    if part.size == 0:
        raise UserError(f"{name} is empty")
    if part.ndim != 2 or part.shape[1] != channels:
        sides = " x ".join(map(str, part.shape))
        raise UserError(f"{name} is {sides} where time x {channels} was expected")


class _Reading:
    """The person who was read last, and what comes next: records are asked for in order, and a version 5 file can only
    be read from its beginning."""

    def __init__(self) -> None:
        self.path, self.changed, self.number = Path(), 0, 0
        self.person: dict[str, Any] | None = None
        self.remaining: Iterator[dict[str, Any]] = iter(())


_reading: dict[int, _Reading] = {}


def _one_person(path: Path, number: int) -> dict[str, Any] | None:
    """A person by number from 1; None if there is no such person."""
    # By process: a place in a file that a fork inherited is also its parent's.
    now = _reading.setdefault(os.getpid(), _Reading())
    changed = path.stat().st_mtime_ns
    if (now.path, now.changed) != (path, changed) or number < now.number:
        now.path, now.changed, now.number, now.person = path, changed, 0, None
        now.remaining = (value for name, value in people(path, _VARIABLE, _PEOPLE) if name == _PEOPLE)
    try:
        while now.number < number:
            # Not two at a time in memory.
            now.person = None
            now.person = next(now.remaining)
            now.number += 1
    except StopIteration:
        del _reading[os.getpid()]
        return None
    except NotSuchError as error:
        raise _not_dreamer(path, error, now.number) from error
    return now.person


READER = DreamerReader()
