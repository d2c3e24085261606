"""From a recording to windows: leads by name, one rate, one band, equal lengths, and a verdict on each lead.

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
from numpy.typing import NDArray
from scipy.signal import butter, resample_poly, sosfiltfilt

from physio_dist.errors import UserError
from physio_dist.signals import quality
from physio_dist.signals.montage import ECG_12, LIMB, canonical, channel_key, derivation, select
from physio_dist.signals.recording import RecordError, Recording, Signal

_FILTER_ORDER = 4
_NYQUIST_MARGIN = 0.8
"""The band has to end below this share of half a recording's rate: above it recorders' own filters cut."""
_INT16 = 32767
_HASHED = ("I", "II", "V1", "V2", "V3", "V4", "V5", "V6")


@dataclass(frozen=True)
class WindowSpec:
    """What a window is.

    Attributes:
        rate: samples a second after resampling.
        seconds: length of a window.
        leads: ECG leads, in the order in which they are written.
        band: pass band of the zero-phase Butterworth filter in Hz, at -6 dB, since the filter runs both ways.
        uv_per_bit: microvolts in one step of the written integers.
        missing: what becomes of a recording without some of the leads: ``"reject"`` it, or ``"mask"`` the leads.
        min_leads: ECG leads that have to be valid for a window to be fit, or all that the recording has if these are
            fewer. Ten tolerates two loose chest electrodes, not one loose limb electrode, which spoils five limb
            leads. Of the real ECGs of Challenge 2011 it refuses 69 of 166 that readers called unacceptable and 4
            of 773 that they called acceptable; eight refuses 54 and 1, twelve 137 and 61.
        exchanged: what becomes of a recording whose limb leads fit only if two of them trade names: ``"repair"`` puts
            them right and says so in every window's reasons, ``"reject"`` refuses it.

    Raises:
        UserError: a value makes no sense.
    """

    rate: int = 200
    seconds: float = 10.0
    leads: tuple[str, ...] = ECG_12
    band: tuple[float, float] = (0.5, 45.0)
    uv_per_bit: float = 1.0
    missing: str = "reject"
    min_leads: int = 10
    exchanged: str = "repair"

    def __post_init__(self) -> None:
        if self.rate < 1 or not 0 < self.seconds < math.inf:
            raise UserError(f"rate={self.rate} and seconds={self.seconds} have to be above zero")
        if not math.isclose(self.rate * self.seconds, self.samples, rel_tol=1e-9):
            raise UserError(f"seconds={self.seconds} at rate={self.rate} is no whole number of samples")
        if not 0 < self.band[0] < self.band[1] < self.rate / 2:
            raise UserError(f"band={self.band} has to rise and lie between 0 and half of rate={self.rate}")
        if not quality.MAX_UV / _INT16 <= self.uv_per_bit < math.inf:
            raise UserError(
                f"uv_per_bit={self.uv_per_bit} has to be at least {quality.MAX_UV / _INT16:.3f}: signals up to "
                f"{quality.MAX_UV / 1000:g} mV count as valid, and would be cut off in 16 bits"
            )
        keys = [channel_key(lead) for lead in self.leads]
        if not keys or len(set(keys)) < len(keys):
            raise UserError(f"leads={','.join(self.leads)} has to name at least one lead, and each only once")
        if self.min_leads < 1:
            raise UserError(f"min_leads={self.min_leads} has to be at least 1")
        for name, choices in (("missing", ("reject", "mask")), ("exchanged", ("repair", "reject"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name}={getattr(self, name)} has to be {' or '.join(choices)}")

    @property
    def samples(self) -> int:
        """Samples in a window."""
        return round(self.rate * self.seconds)


@dataclass(frozen=True)
class Window:
    """One window of all modalities.

    Attributes:
        start_s: its start in the recording, in seconds.
        data: int16 ``[channel, time]`` by modality, in steps of ``uv_per_bit``; invalid channels are zero.
        valid: bool ``[channel]`` by modality.
        fit: whether enough channels are valid.
        reasons: what is wrong with which channel, also of fit windows, and last, of unfit ones, the verdict's reason.
    """

    start_s: float
    data: dict[str, NDArray[np.int16]]
    valid: dict[str, NDArray[np.bool_]]
    fit: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Prepared:
    """One modality of a whole recording: as recorded, and filtered. The first ``written`` channels are written."""

    raw: NDArray[np.float64]
    missing: NDArray[np.bool_]
    rate: float
    band: NDArray[np.float64]
    names: tuple[str, ...]
    written: int
    absent: NDArray[np.bool_]
    limb: tuple[int, ...]
    sources: dict[int, tuple[int, int]]
    notes: tuple[str, ...] = ()


def windows_of(recording: Recording, spec: WindowSpec) -> list[Window]:
    """Consecutive windows of a recording; what is left at its end is dropped.

    The ECG has the leads of ``spec``, other modalities the channels of the file.

    Raises:
        RecordError: the recording is shorter than a window, sampled too slowly for the band, lacks leads (with
            ``missing="reject"``, or all of them), names a lead twice, or its limb leads contradict each other in
            every window.
    """
    if not recording.signals:
        raise RecordError("the recording has no signals")
    parts = {name: _prepare(name, signal, spec) for name, signal in recording.signals.items()}
    count = min(part.band.shape[1] for part in parts.values()) // spec.samples
    windows = [_window(parts, i, spec) for i in range(count)]
    broken = [next((r for r in window.reasons if r.startswith("contradicts")), None) for window in windows]
    if all(broken) and not any(window.fit for window in windows):
        raise RecordError(f"in every window: {broken[0]}")
    return windows


def waveform_hash(recording: Recording) -> str:
    """A hexadecimal hash by which the same waveform is recognised in another corpus or format.

    It covers, at the recorded rate and rounded to whole microvolts, the ECG leads I, II and V1-V6 by name: the other
    limb leads follow from these, and corpora differ in whether, how and in which order they keep them. Recordings
    without any of them are hashed with all their channels. Zeros or missing values that all channels share at either
    end are padding and left out.

    Two copies are told apart if one was resampled, filtered, cut, rescaled, or rounded to a grid that is not a
    multiple of the other's, or if their leads bear other names. All recordings without a sample that is not zero
    have the same hash.
    """
    digest = hashlib.sha256()
    for modality, signal in sorted(recording.signals.items()):
        names, data = _hashed_channels(signal)
        # Rounding in two steps: 2.5 uV read from float32 is 2.4999998 in one file and 2.5000002 in another; the first
        # step makes them equal before the second has to decide which way to go.
        fine = np.rint(np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0) * 50.0)
        whole = np.clip(np.floor(fine / 50.0 + 0.5), -(2**30), 2**30).astype(np.int32)
        whole[~np.isfinite(data)] = np.iinfo(np.int32).min
        used = np.flatnonzero(((whole != 0) & (whole != np.iinfo(np.int32).min)).any(axis=0))
        whole = whole[:, used[0] : used[-1] + 1] if used.size else whole[:, :0]
        digest.update(f"{modality} {signal.rate:.6g} {'|'.join(names)} {whole.shape[1]}\n".encode())
        digest.update(np.ascontiguousarray(whole, "<i4").tobytes())
    return digest.hexdigest()


def _hashed_channels(signal: Signal) -> tuple[list[str], NDArray[np.float64]]:
    if any(canonical(name) for name in signal.channels):
        data, missing = select(signal, _HASHED)
        kept = [i for i, lead in enumerate(_HASHED) if lead not in missing]
        if kept:
            return [_HASHED[i] for i in kept], data[kept].astype(np.float64)
    order = sorted(range(len(signal.channels)), key=lambda i: channel_key(signal.channels[i]))
    return [channel_key(signal.channels[i]) for i in order], signal.data[order].astype(np.float64)


def _prepare(modality: str, signal: Signal, spec: WindowSpec) -> _Prepared:
    _check_rate_and_length(signal, spec)
    if modality != "ecg":
        names, extra = signal.channels, []
        data, missing = np.asarray(signal.data), list[str]()
    else:
        here = {canonical(name) for name in signal.channels}
        wanted = {channel_key(lead) for lead in spec.leads}
        # Limb leads that nobody asked for still vouch for the others, and computed leads are as good as their sources.
        extra = [lead for lead in LIMB if lead in here and lead not in wanted]
        names = tuple(canonical(lead) or lead for lead in (*spec.leads, *extra))
        data, missing = select(signal, names)
        if missing and (spec.missing == "reject" or len(missing) == len(spec.leads)):
            # Names that are no lead's stay out: they are free text of a header.
            has = [lead for name in signal.channels if (lead := canonical(name)) is not None]
            others = len(signal.channels) - len(has)
            rest = f"{', '.join(has) or 'none of the leads'}" + (f" and {others} other channels" if others else "")
            raise RecordError(f"lead {', '.join(missing)} is missing; the record has {rest}")
    written = len(names) - len(extra)
    raw, gaps = quality.bridge_gaps(data)
    band = _filter(raw, signal.rate, spec)
    prepared = _Prepared(
        raw, gaps, signal.rate, band, names, written, np.array([name in missing for name in names]), (), {}
    )
    return _with_limb_leads(prepared, signal, spec) if modality == "ecg" else prepared


def _with_limb_leads(part: _Prepared, signal: Signal, spec: WindowSpec) -> _Prepared:
    """Which rows are limb leads, recorded or computed; rows that bear each other's name trade places."""
    row = {name: i for i, name in enumerate(part.names)}
    here = {canonical(name) for name in signal.channels}
    limb = [row[lead] for lead in LIMB if lead in row and lead in here]
    pair = derivation(signal)
    computed = [i for i, name in enumerate(part.names) if name in LIMB and name not in here]
    sources = dict.fromkeys(computed, (row[pair[0]], row[pair[1]])) if pair else {}
    order, notes = np.arange(len(part.names)), tuple[str, ...]()
    traded = quality.exchanged_names(part.band[limb], [part.names[i] for i in limb], spec.samples)
    if traded is not None:
        note = f"{traded[0]} and {traded[1]} bear each other's name"
        if spec.exchanged == "reject":
            raise RecordError(f"{note}: the limb leads' identities hold only with the two exchanged")
        a, b = row[traded[0]], row[traded[1]]
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


def _check_rate_and_length(signal: Signal, spec: WindowSpec) -> None:
    least = 2 * spec.band[1] / _NYQUIST_MARGIN
    if not least <= signal.rate < math.inf:
        raise RecordError(f"sampled at {signal.rate:g} Hz; a band up to {spec.band[1]:g} Hz needs {least:g} Hz or more")
    # A sample less than a window still resamples to a whole window, hence the rounding up.
    if math.ceil(signal.data.shape[1] * _ratio(signal.rate, spec)) < spec.samples:
        raise RecordError(f"{signal.seconds:g} s long, shorter than a window of {spec.seconds:g} s")


def _ratio(rate: float, spec: WindowSpec) -> Fraction:
    return Fraction(spec.rate) / Fraction(rate).limit_denominator(1000)


def _filter(raw: NDArray[np.float64], rate: float, spec: WindowSpec) -> NDArray[np.float64]:
    """``raw`` ``[channel, time]`` at the rate and in the band of ``spec``."""
    ratio = _ratio(rate, spec)
    # An electrode's offset is up to 300 mV; at that height the resampler's ripple would be larger than a P wave.
    x = raw - raw.mean(axis=1, keepdims=True)
    if ratio != 1:
        x = resample_poly(x, ratio.numerator, ratio.denominator, axis=1, padtype="line")
    sos = _band_pass(spec.band, spec.rate)
    # Two seconds of mirrored signal, a period of the default band's lower edge, let the filter settle.
    pad = min(x.shape[1] - 1, round(spec.rate / spec.band[0]))
    filtered: NDArray[np.float64] = sosfiltfilt(sos, x, axis=1, padtype="odd", padlen=pad)
    return filtered


@lru_cache(maxsize=8)
def _band_pass(band: tuple[float, float], rate: int) -> NDArray[np.float64]:
    sos: NDArray[np.float64] = butter(_FILTER_ORDER, band, "bandpass", fs=rate, output="sos")
    return sos


def _window(parts: dict[str, _Prepared], index: int, spec: WindowSpec) -> Window:
    data, valid, reasons, fit = {}, {}, list[str](), True
    for modality, part in parts.items():
        new = slice(index * spec.samples, (index + 1) * spec.samples)
        old = slice(round(index * spec.seconds * part.rate), round((index + 1) * spec.seconds * part.rate))
        band, is_ecg = part.band[:, new], modality == "ecg"
        verdict = quality.judge(
            part.raw[:, old], part.missing[:, old], part.rate, band, part.names, part.limb, part.absent, is_ecg
        )
        good = verdict.valid.copy()
        for i, (a, b) in part.sources.items():
            good[i] &= verdict.valid[a] and verdict.valid[b]
        spoilt = [part.names[i] for i in np.flatnonzero(verdict.valid & ~good)]
        good = good[: part.written]
        steps = np.clip(np.rint(band[: part.written] / spec.uv_per_bit), -_INT16, _INT16)
        data[modality] = np.where(good[:, None], steps, 0.0).astype(np.int16)
        valid[modality] = good
        needed = min(spec.min_leads, part.written - int(part.absent[: part.written].sum())) if is_ecg else 1
        reasons += [*part.notes, *verdict.reasons]
        if spoilt:
            reasons.append(f"computed from invalid leads: {', '.join(spoilt)}")
        if good.sum() < needed:
            fit = False
            reasons.append(f"{good.sum()} {modality} channels valid of {part.written}, {needed} needed")
    return Window(index * spec.seconds, data, valid, fit, tuple(reasons))
