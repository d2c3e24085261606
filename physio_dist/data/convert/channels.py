"""Leads and electrodes that a conversion stores, and the window specification they are part of."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from physio_dist.config import ShardConfig, load
from physio_dist.data.format.index import ShardSet
from physio_dist.errors import UserError, nearest
from physio_dist.signals.montage import ECG_12, EEG_19, ELECTRODES, ONE_LEAD, SECOND_LEAD, ecg_name, electrode
from physio_dist.signals.readers import Reader
from physio_dist.signals.recording import RecordError
from physio_dist.signals.windows import WindowSpec

# In place of names: those that the first readable record has.
_FOUND = "found"
_ECG_ORDER = (*ECG_12, ONE_LEAD, SECOND_LEAD)
# The 19 first, in the order of CBraMod's pretraining.
_EEG_ORDER = (*EEG_19, *(name for name in ELECTRODES if name not in EEG_19))


def spec_of(options: ShardConfig) -> WindowSpec:
    """The window specification behind the options.

    Raises:
        UserError: an unknown signal, lead or electrode, or windows that make no sense.
    """
    window, eeg, signals = options.window, options.eeg, tuple(words(options.signals))
    if not signals:
        raise UserError("signals: name at least one of ecg, eeg")
    return WindowSpec(
        rate=window.rate, seconds=window.seconds,
        leads=_names("leads", options.leads, ecg_name, _ECG_ORDER) or ECG_12,
        band=(window.low, window.high), uv_per_bit=window.uv_per_bit, signals=signals,
        missing_channels=options.missing_channels,
        eeg_channels=_names("eeg.channels", eeg.channels, electrode, ELECTRODES) or EEG_19,
        eeg_band=(eeg.low, eeg.high), eeg_uv_per_bit=eeg.uv_per_bit, min_leads=options.min_leads,
        swapped_leads=options.swapped_leads,
    )  # fmt: skip


def spec_behind(shards: ShardSet) -> WindowSpec | None:
    """The window specification that a set was converted with, its channels those of the index.

    None where the index does not say, as those that `physio-dist index` makes, or says it in options that this version
    does not have.
    """
    stored = shards.made_by.get("options")
    if not isinstance(stored, dict):
        return None
    # The column of a table that the index does not name says nothing about windows.
    overrides = [f"{name}={'' if value is None else value}" for name, value in stored.items() if name != "person"]
    try:
        options = load(ShardConfig, None, overrides)
    except UserError:
        return None
    of = {name: ",".join(info.channels) for name, info in shards.signals.items()}
    eeg = replace(options.eeg, channels=of.get("eeg", ""))
    return spec_of(replace(options, signals=",".join(of), leads=of.get("ecg", ""), eeg=eeg))


def _names(
    option: str, text: str, standard: Callable[[str], str | None], valid: tuple[str, ...]
) -> tuple[str, ...]:  # fmt: skip
    if text == _FOUND:
        return ()
    names, kind = [], "lead" if option == "leads" else "electrode"
    for word in words(text):
        name = standard(word)
        if name is None:
            raise UserError(f"{option}: unknown {kind} {word!r}: {nearest(word, valid)}")
        names.append(name)
    return tuple(names)


def with_found(reads: Reader, source: str, records: Sequence[str], options: ShardConfig) -> ShardConfig:
    """The options with ``found`` replaced by the leads and electrodes of the first record that can be read."""
    wanted = {"ecg": options.leads == _FOUND, "eeg": options.eeg.channels == _FOUND}
    if not any(wanted.values()):
        return options
    recording = None
    for record in records:
        with contextlib.suppress(RecordError):
            recording = reads.read(source, record)
            break
    standard = {"ecg": (ecg_name, _ECG_ORDER), "eeg": (electrode, _EEG_ORDER)}
    names = dict.fromkeys(standard, "")
    for signal in (name for name, asked in wanted.items() if asked):
        if recording is None or signal not in recording.signals:
            option = "leads" if signal == "ecg" else "eeg.channels"
            raise UserError(f"{option}={_FOUND}: no record of {source} can be read, or the first one has no {signal}")
        name_of, order = standard[signal]
        present = {name_of(channel) for channel in recording.signals[signal].channels}
        names[signal] = ",".join(name for name in order if name in present)
    return replace(
        options, leads=names["ecg"] if wanted["ecg"] else options.leads,
        eeg=replace(options.eeg, channels=names["eeg"] if wanted["eeg"] else options.eeg.channels),
    )  # fmt: skip


def words(text: str | None) -> list[str]:
    """A comma-separated option as a list."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]
