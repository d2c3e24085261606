"""A trained fusion classifier in use: raw signals in, probabilities for every window out, by the very code of
conversion and embedding. What its folder holds: ``classifier_folder.py``."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from physio_dist import storage
from physio_dist.errors import DataError, UserError, nearest
from physio_dist.evaluation.features import features_of
from physio_dist.evaluation.head_training import one_thread
from physio_dist.evaluation.serving.classifier_files import CONFIG, EVERYBODY, FOLDER, FORMATS, KIND, hash_of, needed
from physio_dist.models.encoders.criss_cross import CrissCrossEncoder
from physio_dist.models.export import load_export, read_export_config
from physio_dist.models.fusion.head import Head
from physio_dist.models.fusion.heads import build_head, input_kind
from physio_dist.models.fusion.pooling import make_tokens
from physio_dist.runtime.arrays import BoolArray, Float32Array, Float64Array
from physio_dist.signals.montage import select
from physio_dist.signals.recording import MICROVOLTS, RecordError, Recording, Signal
from physio_dist.signals.windows import Window, WindowSpec, windows_of

# Names are joined to the folder's: none may lead out of it.
_FILE = re.compile(r"[A-Za-z0-9_-]+(\.[a-z]+)?(/[A-Za-z0-9_-]+\.[a-z]+)?")
# Windows embedded at a time: features of patches are much larger than what heads are given.
_WINDOWS = 256

Given = tuple[npt.ArrayLike, Sequence[str], float] | tuple[npt.ArrayLike, Sequence[str], float, str]
"""A signal: values ``[channel, time]``, channel names, samples a second and, where it is not uV, the unit."""

Rest = Recording | tuple[float, float]
"""A rest: a recording of its own, or (start, end) in seconds, of which whole windows count."""


@dataclass(frozen=True)
class Prediction:
    """Predictions for the windows of a recording.

    Attributes:
        start_s: float64 ``[window]``, start of each in seconds.
        probability: float32 ``[window, class]``.
        classes: their names.
        valid: of each signal bool ``[window, channel]``, which channels could be used.
        channels: of each signal their names.
        usable: bool ``[window]``, whether enough channels are valid, by the rule of the conversion.
        notes: what was done to the signals that a reader has to know.
    """

    start_s: Float64Array
    probability: Float32Array
    classes: tuple[str, ...]
    valid: dict[str, BoolArray]
    channels: dict[str, tuple[str, ...]]
    usable: BoolArray
    notes: tuple[str, ...]

    def rows(self) -> list[dict[str, str]]:
        """A line a window, as ``physio-dist predict`` writes it."""
        found = []
        for i, start in enumerate(self.start_s):
            row = {"start_s": f"{start:g}"}
            row |= {f"p_{name}": f"{p:.7f}" for name, p in zip(self.classes, self.probability[i], strict=True)}
            row["predicted"] = self.classes[int(self.probability[i].argmax())]
            for signal, known in self.valid.items():
                row[f"valid_{signal}"] = " ".join(self.channels[signal][c] for c in np.flatnonzero(known[i]))
            row["usable"] = "yes" if self.usable[i] else "no"
            found.append(row)
        return found


@dataclass(frozen=True)
class _Encoder:
    """An encoder with its unit and URL."""

    module: CrissCrossEncoder
    unit_uv: float
    url: str


@dataclass(frozen=True)
class FusionClassifier:
    """Encoders, heads and preprocessing of one ensemble of a sweep; :meth:`load` makes it.

    Attributes:
        name: of the ensemble: a fold's, or ``everybody``.
        classes: what it tells apart.
        window: how raw signals become windows: rate, length, bands, channels, units.
        configs: of each of its heads, as selected.
        heads: their probabilities are averaged.
        simulated: whether it was trained on simulated signals.
        leaky: whether its sweep tested windows of recordings that also trained.
        rest: empty; or it was trained on features from which those of a rest before the recording were subtracted, the
            mean over its windows that are ``fit`` or over ``all``.
    """

    name: str
    classes: tuple[str, ...]
    window: WindowSpec
    configs: tuple[dict[str, Any], ...]
    heads: tuple[Head, ...]
    simulated: bool
    leaky: bool
    rest: str
    _encoders: dict[str, _Encoder]

    @classmethod
    def load(cls, url: str, fold: str | int | None = None) -> FusionClassifier:
        """Open a classifier, every file verified.

        Args:
            url: folder of the classifier, or of the sweep that it is of.
            fold: whose heads; None for the ensemble that was trained on everybody.

        Raises:
            UserError: there is no classifier, or none of that fold.
            DataError: a file is missing or is not what the sweep wrote.
        """
        url, about = _read_config(url)
        ensembles, name = about["ensembles"], EVERYBODY if fold is None else str(fold)
        if name not in ensembles:
            raise UserError(f"{url} has no fold {name!r}: {nearest(name, ensembles)}")
        chosen = ensembles[name]

        def read(where: str) -> bytes:
            return _verified(url, where.removeprefix(f"{url}/"), about["files"])

        members = [chosen, *chosen.get("others", [])]
        heads = _heads(members, read(f"{url}/{chosen['file']}"))
        configs = tuple(member["config"] for member in members for _ in range(member["heads"]))
        encoders = {}
        for signal, folder in chosen["encoders"].items():
            where = f"{url}/{folder}"
            unit_uv = float(read_export_config(where, read)["unit_uv"])
            encoders[signal] = _Encoder(load_export(where, read), unit_uv, where)
        told: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in about["window"].items()
        }
        unknown = sorted(told.keys() - {item.name for item in fields(WindowSpec)})
        if unknown:
            raise UserError(
                f"{url}/{CONFIG} describes windows by {', '.join(unknown)}, which this version of physio-dist does not "
                "know: run the sweep again"
            )
        window = WindowSpec(**told)
        marks = about["simulated"], about["leaky"], about.get("rest", "")
        return cls(name, tuple(about["classes"]), window, configs, heads, *marks, encoders)

    @property
    def takes_one(self) -> bool:
        """True if its heads were trained to answer from one signal alone."""
        return all(one.get("head") == "late" or one.get("modality_dropout", 0.0) > 0 for one in self.configs)

    def predict(
        self, signals: Mapping[str, Given], rest: Mapping[str, Given] | tuple[float, float] | None = None
    ) -> Prediction:
        """Classify every whole window of some signals that start at the same moment.

        Args:
            signals: ``{"ecg": (values, names, rate), "eeg": (values, names, rate, "mV")}``; values ``[channel, time]``,
                NaN where there is none. Channels go by name, in any order, others are left out; one signal alone will
                do where the heads have learnt that (:attr:`takes_one`).
            rest: needed where :attr:`rest` is not empty, and only there: the same of a rest of the same person, or its
                (start, end) in these signals, in seconds.

        Raises:
            UserError: a signal or a needed channel is missing, they are too short or sampled too slowly, or are no
                signals; or a rest is missing, or of no use.
        """
        if not isinstance(rest, tuple) and rest is not None:
            return self.predict_recording(self._given(signals), self._given(rest))
        return self.predict_recording(self._given(signals), rest)

    def _given(self, signals: Mapping[str, Given]) -> Recording:
        if unknown := sorted(set(signals) - set(self.window.signals)):
            raise UserError(f"signals: {', '.join(unknown)} is none of {', '.join(self.window.signals)}")
        return Recording("given", {name: _signal(name, *one) for name, one in signals.items()}, None, {})

    def predict_recording(self, recording: Recording, rest: Rest | None = None) -> Prediction:
        """The same of what a reader has read."""
        window, notes = self._window(recording)
        cut = self._cut(recording, window)
        still = self._still(cut, window, rest)
        usable = np.array([window.usable for window in cut])
        if unusable := int((~usable).sum()):
            notes.append(f"{unusable} of {len(cut)} windows have too few valid channels to be relied on (usable: no)")
        if self.simulated:
            notes.append("the classifier was trained on SIMULATED signals")
        if self.leaky:
            notes.append("LEAKY SPLIT: the sweep's figures hold for nobody but the people it was trained on")
        parts = [self._probability(cut[low : low + _WINDOWS], still) for low in range(0, len(cut), _WINDOWS)]
        return Prediction(
            start_s=np.array([one.start_s for one in cut]),
            probability=np.concatenate(parts),
            classes=self.classes,
            valid={name: np.stack([self._valid(one, name) for one in cut]) for name in self.window.signals},
            channels={name: self.window.channels_of(name) for name in self.window.signals},
            usable=usable,
            notes=tuple(notes),
        )

    def _cut(self, recording: Recording, window: WindowSpec) -> list[Window]:
        try:
            return windows_of(recording, window)
        except RecordError as error:
            raise UserError(f"{error}; this classifier takes {needed(self.window)}") from None

    def _still(self, cut: Sequence[Window], window: WindowSpec, rest: Rest | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Features of the rest, of which heads subtract the mean of what they are given; empty where they do not."""
        if rest is None and not self.rest:
            return {}
        if rest is None:
            raise UserError(
                "this classifier was trained on what is left when the features of a rest before are subtracted "
                "(tune.baseline=subtract): give a rest of the same person (--rest FILE, or START:END in seconds)"
            )
        if not self.rest:
            raise UserError("a rest was given, and this classifier was trained without subtracting any")
        if isinstance(rest, tuple):
            start, end = rest
            still = [one for one in cut if start <= one.start_s and one.start_s + window.seconds <= end]
        else:
            still = self._cut(rest, window)
        if self.rest == "fit":
            still = [one for one in still if one.usable]
        if not still:
            raise UserError(
                f"the rest has no whole window of {window.seconds:g} s with enough valid channels to be subtracted"
            )
        return self._features(still)

    def _window(self, recording: Recording) -> tuple[WindowSpec, list[str]]:
        """Window specification for this recording, and notes on it."""
        window, notes = self.window, []
        there = tuple(name for name in window.signals if name in recording.signals)
        if lacking := [name.upper() for name in window.signals if name not in there]:
            if not there or not self.takes_one:
                why = "" if not there else (
                    " and its heads have not learnt to do without one of them (search.modality_dropout, or the head "
                    "late)"
                )  # fmt: skip
                raise UserError(f"no {' and no '.join(lacking)}: this classifier takes {needed(window)}{why}")
            notes.append(f"there is no {', '.join(lacking)}: the heads answer from the {there[0].upper()} alone")
            window = replace(window, signals=there)
        for name in there:
            signal = recording.signals[name]
            if window.missing_channels == "reject":
                try:
                    _, missing = select(signal, window.channels_of(name))
                except RecordError as error:
                    raise UserError(str(error)) from None
                if missing:
                    what = f"the {name.upper()} lacks {', '.join(missing)}"
                    raise UserError(f"{what}: this classifier takes {needed(self.window)}")
            if signal.rate != window.rate:
                notes.append(f"the {name.upper()} is sampled at {signal.rate:g} Hz: resampled to {window.rate} Hz")
        return window, notes

    def _valid(self, one: Window, signal: str) -> BoolArray:
        nothing = np.zeros(len(self.window.channels_of(signal)), dtype=np.bool_)
        return one.valid.get(signal, nothing)

    def _probability(self, cut: Sequence[Window], still: Mapping[str, tuple[Tensor, Tensor]]) -> Float32Array:
        """float32 ``[window, class]``."""
        features, each = self._features(cut), []
        given: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}
        for head, config in zip(self.heads, self.configs, strict=True):
            kind = input_kind(config)
            if kind not in given:
                given[kind] = _given(head, kind, features, len(cut))
                for signal, (values, valid) in still.items():
                    mean = make_tokens(values, valid, kind)[0].double().mean(dim=0)
                    given[kind][0][signal] = (given[kind][0][signal] - mean).float()
            with one_thread(), torch.inference_mode():
                # A head that has diverged knows nothing.
                each.append(head(*given[kind]).softmax(-1).nan_to_num(1.0 / len(self.classes)))
        found: Float32Array = torch.stack(each).double().mean(dim=0).float().numpy()
        return found

    def _features(self, cut: Sequence[Window]) -> dict[str, tuple[Tensor, Tensor]]:
        """Features and valid channels of each available signal."""
        found = {}
        for signal in self.heads[0].features:
            if signal in cut[0].data:
                data, valid = (np.stack([getattr(one, what)[signal] for one in cut]) for what in ("data", "valid"))
                encoder = self._encoders[signal]
                values = features_of(encoder.module, encoder.unit_uv, data, self.window.uv_per_bit_of(signal), valid)
                if not np.isfinite(values).all():
                    raise UserError(f"{encoder.url} gives features that are no numbers")
                found[signal] = torch.from_numpy(values), torch.from_numpy(valid)
        return found


def _given(
    head: Head, kind: str, features: Mapping[str, tuple[Tensor, Tensor]], windows: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
    """Pooled features of each signal, and their availability."""
    inputs, there = {}, {}
    for signal, size in head.features.items():
        if signal in features:
            inputs[signal], there[signal] = make_tokens(*features[signal], kind)
        else:
            inputs[signal] = torch.zeros(windows, head.tokens[signal], size)
            there[signal] = torch.zeros(windows, 1, dtype=torch.bool)
    return inputs, there


def _signal(name: str, values: npt.ArrayLike, channels: Sequence[str], rate: float, unit: str = "uV") -> Signal:
    data, scale = np.asarray(values, dtype=np.float64), MICROVOLTS.get(unit.lower())
    if data.ndim != 2 or len(channels) != len(data):
        raise UserError(f"{name}: values of shape {list(data.shape)} do not fit {len(channels)} channel names")
    if scale is None:
        raise UserError(f"{name}: the unit {unit!r} is none of uV, mV, V, nV")
    if not 0 < rate < math.inf:
        raise UserError(f"{name}: a rate of {rate} samples a second")
    return Signal((data * scale).astype(np.float32), float(rate), tuple(map(str, channels)))


def _read_config(url: str) -> tuple[str, dict[str, Any]]:
    """The classifier's own URL, and its ``config.json``."""
    url = url.rstrip("/").removesuffix(f"/{CONFIG}")
    for where in (url, storage.join(url, FOLDER)):
        try:
            about = storage.read_json(storage.join(where, CONFIG))
        except storage.NotFoundError:
            continue
        name = storage.join(where, CONFIG)
        if not isinstance(about, dict) or about.get("kind") != KIND:
            raise UserError(f"{name} is not a classifier's; give a sweep's folder, or the {FOLDER}/ in it")
        if about.get("format") not in FORMATS:
            known = " and ".join(map(str, FORMATS))
            raise UserError(f"{name} has format {about.get('format')!r}, this version reads formats {known}")
        if about.get("sha256") != hash_of(about):
            raise DataError(f"{name} was altered: its hash does not fit its content; copy the classifier again")
        return where, about
    names = set(storage.names(url))
    if "results.json" in names:
        raise UserError(
            f"{url} is a sweep without a classifier: its log says why, or it is of an earlier version; sweep again "
            "under another run.name"
        )
    half = f": it is not whole, {CONFIG} is missing" if any(name.startswith("heads-") for name in names) else ""
    raise UserError(f"{url} holds no classifier{half}; give the folder of a finished sweep, or the {FOLDER}/ in it")


def _verified(url: str, name: str, files: Mapping[str, str]) -> bytes:
    where = storage.join(url, name)
    if name not in files or not _FILE.fullmatch(name):
        raise DataError(f"{where} is none of the classifier's files; copy it again")
    try:
        data = storage.read_bytes(where)
    except storage.NotFoundError:
        raise DataError(f"{where} is in {CONFIG} but not there; copy the classifier again") from None
    if hashlib.sha256(data).hexdigest() != files[name]:
        raise DataError(f"{where} disagrees with {CONFIG} (sha256): it was truncated or altered; copy it again")
    return data


def _heads(members: Sequence[Mapping[str, Any]], data: bytes) -> tuple[Head, ...]:
    tensors, heads = safetensors.torch.load(data), list[Head]()
    for member in members:
        for _ in range(member["heads"]):
            head, start = build_head(member["head"]), f"{len(heads)}."
            head.load_state_dict({n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)})
            heads.append(head.eval())
    return tuple(heads)
