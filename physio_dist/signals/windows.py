"""Windows of a recording: leads by name, one rate, one band, equal lengths, and the quality of each lead.

The order matters. Gaps are bridged before any filter, because a filter spreads one NaN over everything. Resampling
and filtering see the whole recording, so that only its two ends, not every window, have filter edges. Flatness and
saturation are judged on what was recorded, amplitude on what is left in the band.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from scipy.signal import butter, resample_poly, sosfiltfilt

from physio_dist.errors import UserError, nearest
from physio_dist.runtime.arrays import BoolArray, Float64Array, Int16Array
from physio_dist.signals import quality
from physio_dist.signals.montage import (
    ECG_12,
    LIMB,
    ONE_LEAD,
    canonical,
    channel_key,
    derivation,
    ecg_name,
    electrode,
    select,
)
from physio_dist.signals.recording import RecordError, Recording, Signal

_FILTER_ORDER = 4
_NYQUIST_MARGIN = 0.8
"""The band has to end below this share of half a recording's rate: above it recorders' own filters cut."""
_INT16 = 32767
MODALITIES = ("ecg", "eeg")
_HASHED = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")


@dataclass(frozen=True)
class WindowSpec:
    """Specification of windows.

    Attributes:
        rate: samples a second after resampling.
        seconds: length of a window.
        leads: ECG leads, in the order in which they are written.
        band: pass band of the zero-phase Butterworth filter in Hz, at -6 dB, since the filter runs both ways.
        uv_per_bit: microvolts in one step of the written integers.
        missing_channels: what becomes of a recording without some of the channels: ``"reject"`` it, or ``"mask"`` the
            channels.
        min_leads: ECG leads that have to be valid for a window to be usable, or all that the recording has if these are
            fewer. Ten tolerates two loose chest electrodes, not one loose limb electrode, which spoils five limb
            leads. Of the real ECGs of Challenge 2011 it refuses 69 of 166 that readers called unacceptable and 4
            of 773 that they called acceptable; eight refuses 54 and 1, twelve 137 and 61.
        swapped_leads: what becomes of a recording whose limb leads are consistent only if two of them swap names:
            ``"repair"`` swaps them and says so in every window's reasons, ``"reject"`` refuses it.
        signals: the modalities of a window, each of which a recording has to have; empty for whatever it has.
        eeg_channels: electrodes, in the order in which they are written; empty for the channels of the file. Three
            quarters of those that the recording has must be valid for a window to be usable.
        eeg_band: as ``band``; its upper edge is lowered for a recording whose rate, or the windows', does not allow it.
        eeg_uv_per_bit: as ``uv_per_bit``.

    Raises:
        UserError: a value makes no sense.
    """

    rate: int = 200
    seconds: float = 10.0
    leads: tuple[str, ...] = ECG_12
    band: tuple[float, float] = (0.5, 45.0)
    uv_per_bit: float = 1.0
    missing_channels: str = "reject"
    min_leads: int = 10
    swapped_leads: str = "repair"
    signals: tuple[str, ...] = ()
    eeg_channels: tuple[str, ...] = ()
    eeg_band: tuple[float, float] = (0.3, 75.0)
    eeg_uv_per_bit: float = 0.1

    def __post_init__(self) -> None:
        self._check_times_and_bands()
        self._check_channels()
        for name, limits in (("uv_per_bit", quality.ECG_LIMITS), ("eeg_uv_per_bit", quality.EEG_LIMITS)):
            least = limits.largest / _INT16
            if not least <= getattr(self, name) < math.inf:
                raise UserError(
                    f"{name}={getattr(self, name)} has to be at least {least:.3f}: signals up to "
                    f"{limits.largest / 1000:g} mV count as valid, and would be cut off in 16 bits"
                )
        for name, choices in (("missing_channels", ("reject", "mask")), ("swapped_leads", ("repair", "reject"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)} has to be {' or '.join(choices)}")

    def _check_times_and_bands(self) -> None:
        if self.rate < 1 or not 0 < self.seconds < math.inf:
            raise UserError(f"rate={self.rate} and seconds={self.seconds} have to be above zero")
        if not math.isclose(self.rate * self.seconds, self.samples, rel_tol=1e-9):
            raise UserError(f"seconds={self.seconds} at rate={self.rate} is no whole number of samples")
        if not 0 < self.band[0] < self.band[1] < self.rate / 2:
            raise UserError(f"band={self.band} has to rise and lie between 0 and half of rate={self.rate}")
        if not 0 < self.eeg_band[0] < self.eeg_band[1] < math.inf:
            raise UserError(f"eeg_band={self.eeg_band} has to rise and lie above 0")

    def _check_channels(self) -> None:
        if not self.leads or _repeats(self.leads):
            raise UserError(f"leads={','.join(self.leads)} has to name at least one lead, and each only once")
        if _repeats(self.eeg_channels):
            raise UserError(f"eeg_channels={','.join(self.eeg_channels)} has to name each electrode only once")
        if _repeats(self.signals) or not set(self.signals) <= set(MODALITIES):
            raise UserError(f"signals={','.join(self.signals)} has to be some of {', '.join(MODALITIES)}, each once")
        if self.min_leads < 1:
            raise UserError(f"min_leads={self.min_leads} has to be at least 1")

    @property
    def samples(self) -> int:
        """Samples in a window."""
        return round(self.rate * self.seconds)

    def channels_of(self, modality: str) -> tuple[str, ...]:
        """The channels written of a modality; empty where they are those of the file."""
        return self.leads if modality == "ecg" else self.eeg_channels

    def uv_per_bit_of(self, modality: str) -> float:
        """Microvolts in one step of a modality's integers."""
        return self.uv_per_bit if modality == "ecg" else self.eeg_uv_per_bit

    def band_of(self, modality: str, rate: float) -> tuple[float, float]:
        """The pass band of a modality, in Hz, for a recording at ``rate``."""
        if modality == "ecg":
            return self.band
        return self.eeg_band[0], min(self.eeg_band[1], _NYQUIST_MARGIN * min(rate, self.rate) / 2)


@dataclass(frozen=True)
class Window:
    """One window of all modalities.

    Attributes:
        start_s: its start in the recording, in seconds.
        data: int16 ``[channel, time]`` by modality, in steps of ``uv_per_bit``; invalid channels are zero.
        valid: bool ``[channel]`` by modality.
        usable: whether enough channels are valid.
        reasons: faults and the channels that have them, also of usable windows; of unusable ones last why they are.
    """

    start_s: float
    data: dict[str, Int16Array]
    valid: dict[str, BoolArray]
    usable: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Prepared:
    """One modality of a whole recording: as recorded, and filtered. The first ``written`` channels are written."""

    raw: Float64Array
    missing: BoolArray
    rate: float
    band: Float64Array
    names: tuple[str, ...]
    written: int
    absent: BoolArray
    limb: tuple[int, ...]
    sources: dict[int, tuple[int, int]]
    notes: tuple[str, ...] = ()


def windows_of(recording: Recording, spec: WindowSpec) -> list[Window]:
    """Consecutive windows of a recording; what is left at its end is dropped.

    All modalities are cut at the same times, as many as the shortest one allows.

    Raises:
        RecordError: the recording lacks a modality of ``spec``, is shorter than a window, sampled too slowly for the
            band, lacks channels (with ``missing_channels="reject"``, or all of them), names one twice, or its limb
            leads contradict each other in every window.
    """
    if not recording.signals:
        raise RecordError("the recording has no signals")
    for name in spec.signals:
        if name not in recording.signals:
            present = [f"{other} ({_channels(s)})" for other, s in sorted(recording.signals.items())]
            unused = f"; not known: {', '.join(recording.unused)}" if recording.unused else ""
            raise RecordError(f"no {name} in the recording; it has {'; '.join(present)}{unused}")
    chosen = spec.signals or tuple(recording.signals)
    parts = {name: _prepare(name, recording.signals[name], spec) for name in chosen}
    count = min(part.band.shape[1] for part in parts.values()) // spec.samples
    windows = [_window(parts, i, spec) for i in range(count)]
    broken = [next((r for r in window.reasons if r.startswith("contradicts")), None) for window in windows]
    if all(broken) and not any(window.usable for window in windows):
        raise RecordError(f"in every window: {broken[0]}")
    return windows


def waveform_hash(recording: Recording) -> str:
    """A hexadecimal hash by which the same waveform is recognised in another corpus or format.

    It covers, at the recorded rate and rounded to whole microvolts, the ECG leads I, II and V1-V6 by name: the other
    limb leads follow from these, and corpora differ in whether, how and in which order they keep them. Recordings
    without any of them are hashed with all their channels, and only the modalities in ``recording.identified_by`` count
    where it names some. Zeros or missing values that all channels share at either
    end are padding and left out.

    Two copies differ if one was resampled, filtered, cut, rescaled, or rounded to a grid that is not a
    multiple of the other's, or if their leads bear other names. All recordings without a sample that is not zero
    have the same hash.
    """
    digest = hashlib.sha256()
    for modality in sorted(recording.identified_by or recording.signals):
        signal = recording.signals[modality]
        names, data = _hashed_channels(signal)
        # Rounding in two steps: 2.5 uV read from float32 is 2.4999998 in one file and 2.5000002 in another; the first
        # step makes them equal before the second has to decide which way to go.
        fine = np.rint(np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0) * 50.0)
        rounded = np.clip(np.floor(fine / 50.0 + 0.5), -(2**30), 2**30).astype(np.int32)
        rounded[~np.isfinite(data)] = np.iinfo(np.int32).min
        used = np.flatnonzero(((rounded != 0) & (rounded != np.iinfo(np.int32).min)).any(axis=0))
        rounded = rounded[:, used[0] : used[-1] + 1] if used.size else rounded[:, :0]
        digest.update(f"{modality} {signal.rate:.6g} {'|'.join(names)} {rounded.shape[1]}\n".encode())
        digest.update(np.ascontiguousarray(rounded, "<i4").tobytes())
    return digest.hexdigest()


def _hashed_channels(signal: Signal) -> tuple[list[str], Float64Array]:
    if any(canonical(name) for name in signal.channels):
        data, missing = select(signal, _HASHED)
        rows = [i for i, lead in enumerate(_HASHED) if lead not in missing]
        if rows:
            return [_HASHED[i] for i in rows], data[rows].astype(np.float64)
    order = sorted(range(len(signal.channels)), key=lambda i: channel_key(signal.channels[i]))
    return [channel_key(signal.channels[i]) for i in order], signal.data[order].astype(np.float64)


def _prepare(modality: str, signal: Signal, spec: WindowSpec) -> _Prepared:
    pass_band = spec.band_of(modality, signal.rate)
    _check_rate_and_length(signal, spec, pass_band)
    wanted = spec.channels_of(modality)
    names, extra = signal.channels, list[str]()
    data, missing = np.asarray(signal.data), list[str]()
    if wanted:
        if modality == "ecg":
            here = {canonical(name) for name in signal.channels}
            keys = {channel_key(lead) for lead in wanted}
            # Limb leads that are not stored still serve to check the others.
            extra = [lead for lead in LIMB if lead in here and lead not in keys]
        names = tuple(ecg_name(name) or electrode(name) or name for name in (*wanted, *extra))
        data, missing = select(signal, names)
        if missing and (spec.missing_channels == "reject" or len(missing) == len(wanted)):
            raise RecordError(_lacking(modality, missing, signal))
    written = len(names) - len(extra)
    raw, gaps = quality.bridge_gaps(data)
    band = _filter(raw, signal.rate, spec, pass_band)
    prepared = _Prepared(
        raw, gaps, signal.rate, band, names, written, np.array([name in missing for name in names]), (), {}
    )
    return _with_limb_leads(prepared, signal, spec) if modality == "ecg" else prepared


def _with_limb_leads(part: _Prepared, signal: Signal, spec: WindowSpec) -> _Prepared:
    """Mark the limb leads, recorded and computed; rows that bear each other's name are swapped."""
    row = {name: i for i, name in enumerate(part.names)}
    here = {canonical(name) for name in signal.channels}
    limb = [row[lead] for lead in LIMB if lead in row and lead in here]
    pair = derivation(signal)
    computed = [i for i, name in enumerate(part.names) if name in LIMB and name not in here]
    sources = dict.fromkeys(computed, (row[pair[0]], row[pair[1]])) if pair else {}
    order, notes = np.arange(len(part.names)), tuple[str, ...]()
    swapped = quality.swapped_names(part.band[limb], [part.names[i] for i in limb], spec.samples)
    if swapped is not None:
        note = f"{swapped[0]} and {swapped[1]} bear each other's name"
        if spec.swapped_leads == "reject":
            raise RecordError(f"{note}: the limb leads' identities hold only with the two swapped")
        a, b = row[swapped[0]], row[swapped[1]]
        order[[a, b]] = order[[b, a]]
        notes = (f"{note} in the file; put right",)
    return _Prepared(
        part.raw[order],
        part.missing[order],
        part.rate,
        part.band[order],
        part.names,
        part.written,
        part.absent,
        tuple(limb),
        sources,
        notes,
    )


def _lacking(modality: str, missing: list[str], signal: Signal) -> str:
    kind = "lead" if modality == "ecg" else "electrode"
    present = {channel_key(name): name for name in _known(signal)}
    hint = ""
    if modality == "ecg" and ONE_LEAD in present:
        hint = f"; leads={ONE_LEAD} takes {present[ONE_LEAD]!r}, whichever lead it is"
    elif (near := nearest(missing[0], present)).startswith("did you mean"):
        hint = f"; {missing[0]}: {near}"
    return f"{kind} {', '.join(missing)} is missing; the record has {_channels(signal)}{hint}"


def _known(signal: Signal) -> list[str]:
    """The channels that are leads or electrodes. Other names are free text of a header, and no message repeats them."""
    return [name for name in signal.channels if ecg_name(name) or electrode(name)]


def _channels(signal: Signal) -> str:
    names = _known(signal)
    others = len(signal.channels) - len(names)
    return ", ".join(names + [f"{others} other channels"] * bool(others))


def _repeats(names: tuple[str, ...]) -> bool:
    return len({channel_key(name) for name in names}) < len(names)


def _check_rate_and_length(signal: Signal, spec: WindowSpec, band: tuple[float, float]) -> None:
    top = band[1] if band[1] > band[0] else spec.eeg_band[1]  # lowered to nothing: say what was asked for
    least = 2 * top / _NYQUIST_MARGIN
    # The edge may have been lowered to just what the rate allows.
    if not least <= signal.rate * (1 + 1e-9) < math.inf:
        raise RecordError(f"sampled at {signal.rate:g} Hz; a band up to {top:g} Hz needs {least:g} Hz or more")
    # A sample less than a window still resamples to a whole window, hence the rounding up.
    if math.ceil(signal.data.shape[1] * _ratio(signal.rate, spec)) < spec.samples:
        raise RecordError(f"{signal.seconds:g} s long, shorter than a window of {spec.seconds:g} s")


def _ratio(rate: float, spec: WindowSpec) -> Fraction:
    return Fraction(spec.rate) / Fraction(rate).limit_denominator(1000)


def _filter(raw: Float64Array, rate: float, spec: WindowSpec, band: tuple[float, float]) -> Float64Array:
    """``raw`` ``[channel, time]`` at the rate of ``spec`` and in the band."""
    ratio = _ratio(rate, spec)
    # An electrode's offset is up to 300 mV; at that height the resampler's ripple would be larger than a P wave.
    x = raw - raw.mean(axis=1, keepdims=True)
    if ratio != 1:
        x = resample_poly(x, ratio.numerator, ratio.denominator, axis=1, padtype="line")
    sos = _band_pass(band, spec.rate)
    # Two seconds of mirrored signal, a period of the default band's lower edge, let the filter settle.
    pad = min(x.shape[1] - 1, round(spec.rate / band[0]))
    filtered: Float64Array = sosfiltfilt(sos, x, axis=1, padtype="odd", padlen=pad)
    return filtered


@lru_cache(maxsize=8)
def _band_pass(band: tuple[float, float], rate: int) -> Float64Array:
    sos: Float64Array = butter(_FILTER_ORDER, band, "bandpass", fs=rate, output="sos")
    return sos


def _window(parts: dict[str, _Prepared], index: int, spec: WindowSpec) -> Window:
    data, valid, reasons, usable = {}, {}, list[str](), True
    for modality, part in parts.items():
        new = slice(index * spec.samples, (index + 1) * spec.samples)
        old = slice(round(index * spec.seconds * part.rate), round((index + 1) * spec.seconds * part.rate))
        band, is_ecg = part.band[:, new], modality == "ecg"
        limits = quality.ECG_LIMITS if is_ecg else quality.EEG_LIMITS
        channels = quality.Channels(part.names, part.limb, part.absent)
        verdict = quality.assess(part.raw[:, old], part.missing[:, old], part.rate, band, channels, limits)
        good = verdict.valid.copy()
        for i, (a, b) in part.sources.items():
            good[i] &= verdict.valid[a] and verdict.valid[b]
        spoilt = [part.names[i] for i in np.flatnonzero(verdict.valid & ~good)]
        good = good[: part.written]
        steps = np.clip(np.rint(band[: part.written] / spec.uv_per_bit_of(modality)), -_INT16, _INT16)
        data[modality] = np.where(good[:, None], steps, 0.0).astype(np.int16)
        valid[modality] = good
        present = part.written - int(part.absent[: part.written].sum())
        needed = min(spec.min_leads, present) if is_ecg else max(1, int(quality.EEG_SHARE * present))
        reasons += [*part.notes, *verdict.reasons]
        if spoilt:
            reasons.append(f"computed from invalid leads: {', '.join(spoilt)}")
        if good.sum() < needed:
            usable = False
            reasons.append(f"{good.sum()} {modality} channels valid of {part.written}, {needed} needed")
    return Window(index * spec.seconds, data, valid, usable, tuple(reasons))
