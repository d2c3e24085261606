"""What the fused heads lean on: what is lost when a signal, a channel or a patch is withheld from them at the test.

A signal or a channel is withheld by putting the mean of its pooled features over the fold's training windows in their
place, so that it says the same of every window and shifts none; a patch by pooling over the other patches. Heads stay
as they are. The encoders have seen everything: features of a channel also know what the encoder took from others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from physio_dist.data.format.index import open_set
from physio_dist.evaluation.features import Features, open_features
from physio_dist.evaluation.head_training import one_thread
from physio_dist.evaluation.pooling import pool_features
from physio_dist.evaluation.trials import Choice, Study
from physio_dist.models.encoders.criss_cross import PATCH
from physio_dist.models.fusion.head import Head
from physio_dist.models.fusion.heads import input_kind
from physio_dist.runs.sweep_results import ChannelOcclusion, Occlusion, OcclusionResults, PatchOcclusion
from physio_dist.runtime.seeding import permutation
from physio_dist.stats.auc import Difference, compare_all_pairs, difference, pooled_auc

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
# What is withheld: a signal, and its channel or its patch.
Item = tuple[str, str, int]
_NOTHING: Item = ("", "", 0)

_DIGITS = 6
# Windows at most, of those that are tested and of those that only train: what it costs is proportional to them.
_MOST_WINDOWS = 4096
_WINDOWS = 256


def occlusion(study: Study, choices: Sequence[Choice], heads: Sequence[Sequence[Sequence[Head]]]) -> OcclusionResults:
    """``occlusion`` in ``results.json``.

    Args:
        study: see :func:`physio_dist.evaluation.study.prepare`; it says where its frozen features are.
        choices: what each fold selected for the fused row.
        heads: of each fold, as :func:`physio_dist.evaluation.trials.kept_heads` gives them.
    """
    table = study.table
    some = _some(study)
    answers: dict[Item, list[Floats]] = {}
    tested: list[Ints] = []
    with one_thread():
        opened: dict[str, _Opened] = {}
        for number, (fold, choice) in enumerate(zip(study.folds, choices, strict=True)):
            rows = np.intersect1d(fold.test, some)
            if not len(rows):
                continue
            tested.append(rows)
            keys = {signal: f"{signal}/{study.encoders[signal][number]}" for signal in ("ecg", "eeg")}
            for signal, key in keys.items():
                # One encoder's at a time: each fold may have its own.
                if signal not in opened or opened[signal].key != key:
                    opened[signal] = _Opened(study, key, some)
            train = np.intersect1d(fold.train, some)
            said: dict[Item, list[Floats]] = {}
            for member, mine in zip(choice.members, heads[number], strict=True):
                for item, probability in _of_fold(study, number, member, mine, opened, rows, train):
                    said.setdefault(item, []).append(probability)
            for item, each in said.items():
                answers.setdefault(item, []).append(np.stack(each).mean(axis=0, dtype=np.float64).astype(np.float32))
    where = np.concatenate(tested)
    label, person = table.label[where], table.person[where]
    whole = {item: np.concatenate(parts) for item, parts in answers.items()}
    base = whole.pop(_NOTHING)
    ours = compare_all_pairs(label, person, base.astype(np.float64))
    results = OcclusionResults(len(where), len(np.unique(person)), _rounded(pooled_auc(ours)))
    shards = open_set(study.options.tune.data)
    for (signal, what, number), probability in whole.items():
        lost = difference(ours, compare_all_pairs(label, person, probability.astype(np.float64)))
        effect = _effect(signal, lost, float(np.abs(probability - base).sum(axis=1).mean()) / 2)
        if what == "channels":
            results.channels.append(ChannelOcclusion(channel=shards.signals[signal].channels[number], **effect))
        elif what == "patches":
            seconds = PATCH / shards.rate
            results.patches.append(PatchOcclusion(start_s=number * seconds, seconds=seconds, **effect))
        else:
            results.signals.append(Occlusion(**effect))
    return results


def _some(study: Study) -> Ints:
    """Rows of the table that it is measured on: of those that are tested, and of the others that only train."""
    order = permutation(len(study.table.label), "occlusion", study.options.run.seed)
    tested = np.isin(order, np.concatenate([fold.test for fold in study.folds]))
    return np.sort(np.concatenate([order[tested][:_MOST_WINDOWS], order[~tested][:_MOST_WINDOWS]]))


def _effect(signal: str, lost: Difference, shift: float) -> dict[str, Any]:
    return {
        "signal": signal,
        "auc_drop": _rounded(lost.value),
        "ci": None if math.isnan(lost.low) else (_rounded(lost.low), _rounded(lost.high)),
        "prob_shift": _rounded(shift),
    }


def _rounded(value: float) -> float:
    return round(value, _DIGITS)


class _Opened:
    """An encoder's frozen features of some rows of the table.

    Attributes:
        key: ``<signal>/<hash>``.
        each: float32 ``[some, channel, 2 d]``, mean and standard deviation over patches of each channel.
        still: what of the mean the rest before a clip was, ``[some, channel, d]``; None where none is subtracted.
    """

    def __init__(self, study: Study, key: str, some: Ints) -> None:
        table = study.table
        self.key, self.some = key, some
        self.features: Features = open_features(study.features[key])
        self.sample = table.sample[some]
        self.rest = None if table.baseline is None else table.baseline.select(some)
        channels, d = self.features.values.shape[1], self.features.values.shape[3]
        shape = (len(some), channels, 2 * d)
        self.each = pool_features(self.features, self.sample, "channels_mean_std", self.rest).reshape(shape)
        self.still: Floats | None = None
        if self.rest is not None:
            self.still = pool_features(self.features, self.sample, "channels_mean").reshape(len(some), channels, d)
            self.still -= self.each[:, :, :d]

    def at(self, rows: Ints) -> Ints:
        """Positions of rows of the table in ``some``."""
        return np.searchsorted(self.some, rows).astype(np.int64)

    def valid(self, rows: Ints) -> npt.NDArray[np.bool_]:
        """bool ``[row, channel]``."""
        found: npt.NDArray[np.bool_] = self.features.valid[self.sample[self.at(rows)]]
        return found

    def by_channel(self, rows: Ints, kind: str) -> Floats:
        """``[row, channel, f]``: what there is of each channel before they are averaged."""
        x = self.each[self.at(rows)]
        return x if kind.endswith("mean_std") else x[:, :, : x.shape[2] // 2]

    def means(self, rows: Ints, kind: str) -> Floats:
        """The mean of it over the rows in which a channel is valid, ``[channel, f]``; zeros where it never is."""
        x, valid = self.by_channel(rows, kind), self.valid(rows)[:, :, None]
        total = np.where(valid, x, 0).sum(axis=0, dtype=np.float64)
        return np.asarray(total / np.maximum(valid.sum(axis=0), 1), np.float32)

    def without_channel(self, inputs: Floats, rows: Ints, kind: str, means: Floats, channel: int) -> Floats:
        """``inputs`` of these rows with a channel's part replaced by its mean, where it is valid."""
        valid = self.valid(rows)
        here, found = valid[:, channel], inputs.copy()
        if kind.startswith("channels_"):
            found.reshape(len(rows), len(means), -1)[here, channel] = means[channel]
            return found
        # Averages over the valid channels: the channel's share of them is exchanged.
        share = 1.0 / np.maximum(valid.sum(axis=1), 1, dtype=np.float32)
        if kind != "attention":
            change = (means[channel] - self.by_channel(rows, kind)[:, channel]) * share[:, None]
            found[here] += change[here]
            return found
        at = self.at(rows)
        values = self.features.values[self.sample[at], channel]
        if self.still is not None:
            values = values - self.still[at, channel][:, None]
        change = (means[channel] - values) * share[:, None, None]
        found[here] += change[here]
        return found

    def without_patches(self, inputs: Floats, rows: Ints, kind: str) -> Iterator[Floats]:
        """``inputs`` of these rows pooled over all patches but one, for each of them."""
        sample = self.sample[self.at(rows)]
        # A difference, because the rest before a clip is subtracted from both alike.
        still = inputs - pool_features(self.features, sample, kind)
        for patch in range(self.patches):
            yield still + pool_features(self.features, sample, kind, without=patch)

    @property
    def patches(self) -> int:
        """How many can be withheld: of one nothing would be left."""
        patches: int = self.features.values.shape[2]
        return patches if patches > 1 else 0


def _of_fold(
    study: Study, number: int, choice: Choice, heads: Sequence[Head], opened: dict[str, _Opened], rows: Ints,
    train: Ints,
) -> Iterator[tuple[Item, Floats]]:  # fmt: skip
    """What a fold's heads say of its test rows ``[row, class]``: with nothing and with each item withheld."""
    kind = input_kind(choice.config)
    keys = study.keys_of("fused", kind, number)
    inputs = {signal: study.inputs[key][rows] for signal, key in keys.items()}
    there = {signal: known[rows] for signal, key in keys.items() if (known := study.available(key)) is not None}
    yield _NOTHING, _answer(heads, inputs, there)
    for signal, one in opened.items():
        mine = inputs[signal]
        known = study.available(keys[signal])
        kept = study.inputs[keys[signal]][train]
        if known is not None and not (here := known[train].any(axis=1)).all():
            kept = kept[here]
        mean = kept.mean(axis=0, dtype=np.float64).astype(np.float32)
        yield (signal, "signals", 0), _answer(heads, {**inputs, signal: np.broadcast_to(mean, mine.shape)}, there)
        means = one.means(train, kind)
        for channel in range(len(means)):
            changed = one.without_channel(mine, rows, kind, means, channel)
            yield (signal, "channels", channel), _answer(heads, {**inputs, signal: changed}, there)
        if kind == "attention":
            # Patches are tokens: the head does not see one of them.
            shown = np.broadcast_to(there.get(signal, np.ones((len(rows), 1), bool)), mine.shape[:2])
            for patch in range(one.patches):
                others = shown & (np.arange(one.patches) != patch)
                yield (signal, "patches", patch), _answer(heads, inputs, {**there, signal: others})
        else:
            for patch, changed in enumerate(one.without_patches(mine, rows, kind)):
                yield (signal, "patches", patch), _answer(heads, {**inputs, signal: changed}, there)


@torch.no_grad()
def _answer(heads: Sequence[Head], inputs: dict[str, Floats], there: dict[str, npt.NDArray[np.bool_]]) -> Floats:
    """The mean of their probabilities, ``[row, class]``."""
    n = len(next(iter(inputs.values())))
    parts = []
    for start in range(0, n, _WINDOWS):
        piece = slice(start, start + _WINDOWS)
        given = {name: torch.from_numpy(np.ascontiguousarray(x[piece])) for name, x in inputs.items()}
        seen = {name: torch.from_numpy(np.ascontiguousarray(x[piece])) for name, x in there.items()}
        shares = [head(given, seen).softmax(-1).nan_to_num(1.0 / head.classes) for head in heads]
        parts.append(torch.stack(shares).double().mean(dim=0).float().numpy())
    return np.concatenate(parts)
