"""Lead names, their order and aliases, and the arithmetic that ties the limb leads together.

The six limb leads are differences of three electrode potentials, so they span two dimensions only (Einthoven
1912, Goldberger 1942): III = II - I, aVR = -(I + II)/2, aVL = I - II/2, aVF = II - I/2. Any two of them give the
other four. The code below uses this to fill in leads, to check them, and to tell masking which leads belong together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from physio_dist.runtime.arrays import Float32Array, FloatArray
from physio_dist.signals.recording import RecordError, Signal

LIMB = ("I", "II", "III", "aVR", "aVL", "aVF")
ECG_12 = (*LIMB, "V1", "V2", "V3", "V4", "V5", "V6")

LEAD_MATRIX: dict[str, tuple[float, float]] = {
    "I": (1.0, 0.0),
    "II": (0.0, 1.0),
    "III": (-1.0, 1.0),
    "aVR": (-0.5, -0.5),
    "aVL": (1.0, -0.5),
    "aVF": (-0.5, 1.0),
}
"""Each limb lead as coefficients over (I, II)."""

_BY_LOWER = {lead.lower(): lead for lead in ECG_12}
# CODE and other corpora from the Portuguese- and Spanish-speaking world write "derivação" before the numeral.
# Modified leads (MLI, MLII, CM5) are absent on purpose: their electrodes sit elsewhere, so calling them II or V5
# would put another lead under a standard name.
_BY_LOWER.update({"d1": "I", "d2": "II", "d3": "III", "di": "I", "dii": "II", "diii": "III"})
_PREFIX = re.compile(r"^(?:(?:ecg|ekg|lead)[\s_:\-]*)+", re.IGNORECASE)

ONE_LEAD = "ECG"
"""The lead of a recorder that has one and does not say which: no standard lead, and never taken for one."""
SECOND_LEAD = "ECG2"
"""The other lead of a recorder that has two and does not say which; the first is `ONE_LEAD`."""

EEG_19 = (
    "Fp1", "Fp2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2", "F7", "F8", "T7", "T8", "P7", "P8", "Fz", "Cz", "Pz",
)  # fmt: skip
"""The 10-20 system's electrodes without the ears, in the order of CBraMod's pretraining (arXiv 2412.07236)."""

_SITES = {
    "Fp": "1 z 2", "AF": "7 3 z 4 8", "F": "9 7 5 3 1 z 2 4 6 8 10", "FT": "9 7 8 10", "FC": "5 3 1 z 2 4 6",
    "T": "9 7 8 10", "C": "5 3 1 z 2 4 6", "TP": "9 7 8 10", "CP": "5 3 1 z 2 4 6", "P": "9 7 5 3 1 z 2 4 6 8 10",
    "PO": "7 3 z 4 8", "O": "1 z 2", "N": "z", "I": "z",
}  # fmt: skip
ELECTRODES = tuple(row + site for row, sites in _SITES.items() for site in sites.split())
"""The 10-10 system (Klem et al., Electroencephalogr. Clin. Neurophysiol. Suppl. 52 (1999) 3-6), without ears and
mastoids: those are what the others are measured against."""
_ELECTRODE_BY_LOWER = {name.lower(): name for name in ELECTRODES}
# The older 10-20 names of four sites.
_ELECTRODE_BY_LOWER.update({"t3": "T7", "t4": "T8", "t5": "P7", "t6": "P8"})
# References common to all electrodes or to a side. "Fp1-F7" is another measurement than Fp1, and "A2-A1" is none.
_REFERENCE = r"(?:\s*-\s*(?:ref|le|ar|avg?|car|[am][12]))?"
_EEG_LABEL = re.compile(rf"(?:eeg[\s_:\-]*)?([a-z]+\d*)\.*{_REFERENCE}", re.IGNORECASE)
_ONE_LEAD_LABEL = re.compile(rf"(?:eeg\s+)?(?:(?:ecg|ekg)[\s_:\-]*)+1?{_REFERENCE}", re.IGNORECASE)


def canonical(name: str) -> str | None:
    """The standard name of an ECG lead, or None for a name that is no standard lead.

    Case does not matter, nor do a leading "lead", "ECG" or "EKG": ``AVR`` -> ``aVR``, ``Lead II`` -> ``II``,
    ``DIII`` -> ``III``.
    """
    return _BY_LOWER.get(_PREFIX.sub("", name.strip()).lower())


def electrode(name: str) -> str | None:
    """The 10-10 name of an EEG channel, or None for a name that is none of the system's electrodes.

    Case does not matter, nor do a leading "EEG", dots at the end, or a common reference: ``EEG FP1-REF`` -> ``Fp1``,
    ``Fc5.`` -> ``FC5``, ``T3`` -> ``T7``. Ears, mastoids and differences of two electrodes are None.
    """
    match = _EEG_LABEL.fullmatch(name.strip())
    return _ELECTRODE_BY_LOWER.get(match[1].lower()) if match else None


def ecg_name(name: str) -> str | None:
    """The standard name of an ECG lead, or `ONE_LEAD` for an ECG of an unnamed lead: ``ECG ECG``, ``EEG EKG1-REF``.

    `SECOND_LEAD` goes by that name alone.
    """
    if name.strip().upper() == SECOND_LEAD:
        return SECOND_LEAD
    return canonical(name) or (ONE_LEAD if _ONE_LEAD_LABEL.fullmatch(name.strip()) else None)


def channel_key(name: str) -> str:
    """Key by which names of a channel are compared: the standard name of lead or electrode, else in lower case."""
    return ecg_name(name) or electrode(name) or name.strip().casefold()


def derivation(signal: Signal) -> tuple[str, str] | None:
    """The two limb leads of ``signal`` from which missing ones are computed; None with fewer than two.

    Leads that never change are passed over while others remain: a dead lead is in the file but says nothing.
    """
    rows = _rows(signal)
    present = [lead for lead in LIMB if lead in rows]
    alive = [lead for lead in present if _varies(signal.data[rows[lead]])]
    chosen = alive if len(alive) >= 2 else present
    return (chosen[0], chosen[1]) if len(chosen) >= 2 else None


def select(signal: Signal, leads: Sequence[str]) -> tuple[Float32Array, list[str]]:
    """The asked leads or electrodes by name, in the asked order.

    Limb leads that the signal lacks are computed from two that it has (`derivation`); NaN in either makes NaN.

    Returns:
        data: float32 ``[len(leads), time]`` in microvolts; a lead that can neither be found nor computed is NaN.
        missing: the names of those leads.

    Raises:
        RecordError: two channels of the signal carry the same lead, so a choice would be a guess.
    """
    rows = _rows(signal)
    pair = derivation(signal)
    data = np.full((len(leads), signal.data.shape[1]), np.nan, np.float32)
    missing = []
    for i, lead in enumerate(leads):
        key = channel_key(lead)
        if key in rows:
            data[i] = signal.data[rows[key]]
        elif key in LEAD_MATRIX and pair is not None:
            # lead = c (I, II) and (a, b) = M (I, II), hence lead = c M^-1 (a, b).
            matrix = np.array([LEAD_MATRIX[pair[0]], LEAD_MATRIX[pair[1]]])
            a, b = np.linalg.solve(matrix.T, np.array(LEAD_MATRIX[key]))
            data[i] = a * signal.data[rows[pair[0]]] + b * signal.data[rows[pair[1]]]
        else:
            missing.append(lead)
    return data, missing


def identity_error(data: FloatArray, leads: Sequence[str]) -> float:
    """Relative residual of the limb leads' identities.

    The limb leads are projected on the plane that `LEAD_MATRIX` spans, by least squares; the result is the norm of
    what is left over the norm of the leads: 0 when the identities hold, up to 1. It does not depend on gain.

    Args:
        data: ``[len(leads), time]``; rows of leads that do not count are all NaN. Samples at which any counted limb
            lead is NaN are left out.

    Returns:
        The relative residual; 0 where fewer than three limb leads count, for there is nothing to check then.
    """
    names = [channel_key(lead) for lead in leads]
    kept = [i for i, name in enumerate(names) if name in LEAD_MATRIX and not np.isnan(data[i]).all()]
    if len(kept) < 3:
        return 0.0
    x = np.asarray(data[kept], np.float64)
    x = x[:, ~np.isnan(x).any(axis=0)]
    # The residual needs the leads' products only; a few numbers instead of every sample.
    products = x @ x.T
    total = float(np.trace(products))
    if total <= 0.0:
        return 0.0
    matrix = np.array([LEAD_MATRIX[names[i]] for i in kept])
    outside = np.eye(len(kept)) - matrix @ np.linalg.pinv(matrix)
    return float(np.sqrt(max(0.0, float(np.trace(outside @ products))) / total))


def mask_groups(channels: Sequence[str]) -> list[list[int]]:
    """Channel indices that have to be hidden together, because any two of a group give the rest.

    The limb leads are one group; every other channel (a V lead, an EEG electrode) is a group of its own. Groups stand
    in the order of their first channel.
    """
    limb = [i for i, name in enumerate(channels) if canonical(name) in LEAD_MATRIX]
    groups = [[i] for i, name in enumerate(channels) if canonical(name) not in LEAD_MATRIX]
    return sorted([limb, *groups] if limb else groups)


def lead_layouts(channels: Sequence[str]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Layouts of recorders with fewer leads, as indices of these channels.

    Of the kinds 8 leads (I, II, V1-V6: all that is independent in twelve), 2 leads (I, II) and 1 lead (any one of
    them) those for which the channels have the leads and others besides. Nothing for channels without ECG leads.
    """
    at = {name: i for i, channel in enumerate(channels) if (name := canonical(channel)) is not None}
    if len(channels) < 2 or not at:
        return ()
    several = [names for names in (("I", "II", *ECG_12[6:]), ("I", "II")) if set(names) <= set(at)]
    kinds = [(tuple(at[name] for name in names),) for names in several if len(names) < len(channels)]
    return (*kinds, tuple((i,) for i in sorted(at.values())))


def _rows(signal: Signal) -> dict[str, int]:
    rows: dict[str, int] = {}
    for i, name in enumerate(signal.channels):
        key = channel_key(name)
        if key in rows:
            kind = "lead" if ecg_name(key) else "electrode" if electrode(key) else ""
            # A name that is none of ours is free text of a header and is not repeated.
            clash = f"are {kind} {key}: {signal.channels[rows[key]]!r} and {name!r}" if kind else "have the same name"
            raise RecordError(f"two channels {clash}")
        rows[key] = i
    return rows


def _varies(row: Float32Array) -> bool:
    values = row[np.isfinite(row)]
    return bool(values.size) and float(values.max()) > float(values.min())
