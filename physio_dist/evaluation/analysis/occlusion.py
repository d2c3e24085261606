"""Occlusion analysis of the fused heads: the AUC lost when a signal, a channel or a patch is ablated at test time.

A signal or a channel is ablated by replacing its pooled features by their mean over the fold's training windows, so
that it is the same in every window; a patch by pooling over the other patches. Heads stay as they are. The encoders
have seen everything: features of a channel also carry what the encoder took from other channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch

from physio_dist.data.format.index import ShardSet
from physio_dist.evaluation.features import Features, open_features
from physio_dist.evaluation.head_training import one_thread
from physio_dist.evaluation.label_table import SIGNALS
from physio_dist.evaluation.pooling import pool_features
from physio_dist.evaluation.trained_heads import TrainedHeads, mean_probability
from physio_dist.evaluation.trials import Choice, EncoderKey, EncoderRole, InputKey, Study
from physio_dist.models.encoders.criss_cross import PATCH
from physio_dist.models.fusion.head import Head
from physio_dist.models.fusion.heads import input_kind
from physio_dist.runs.sweep_results import ChannelOcclusion, Occlusion, OcclusionResults, PatchOcclusion
from physio_dist.runtime.arrays import BoolArray, Float32Array, Int64Array
from physio_dist.runtime.seeding import permutation
from physio_dist.stats.auc import compare_all_pairs, pooled_auc
from physio_dist.stats.bootstrap import Difference, auc_difference

_DIGITS = 6
# Limits of the windows that are tested and of those that only train: the cost is proportional to them.
_MAX_WINDOWS = 4096
_WINDOWS = 256


class Part(Enum):
    """A kind of part of the input that can be ablated."""

    SIGNAL = "signal"
    CHANNEL = "channel"
    PATCH = "patch"


class Ablation(NamedTuple):
    """A signal, or one of its channels or patches."""

    signal: str
    kind: Part
    number: int = 0


def occlusion(study: Study, trained: TrainedHeads, shards: ShardSet) -> OcclusionResults:
    """``occlusion`` in ``results.json``.

    Args:
        study: see :func:`physio_dist.evaluation.study.prepare`; with URLs of its frozen features.
        trained: the heads of the fused row.
        shards: index of the study's shard set.
    """
    table = study.table
    tested, complete, ablated = _predictions(study, trained)
    label, person = table.label[tested], table.person[tested]
    baseline = compare_all_pairs(label, person, complete.astype(np.float64))
    results = OcclusionResults(len(tested), len(np.unique(person)), _rounded(pooled_auc(baseline)))
    for ablation, probability in ablated.items():
        drop = auc_difference(baseline, compare_all_pairs(label, person, probability.astype(np.float64)))
        effect = _effect(ablation.signal, drop, float(np.abs(probability - complete).sum(axis=1).mean()) / 2)
        if ablation.kind is Part.CHANNEL:
            channel = shards.signals[ablation.signal].channels[ablation.number]
            results.channels.append(ChannelOcclusion(channel=channel, **effect))
        elif ablation.kind is Part.PATCH:
            seconds = PATCH / shards.rate
            results.patches.append(PatchOcclusion(start_s=ablation.number * seconds, seconds=seconds, **effect))
        else:
            results.signals.append(Occlusion(**effect))
    return results


def _predictions(study: Study, trained: TrainedHeads) -> tuple[Int64Array, Float32Array, dict[Ablation, Float32Array]]:
    """Rows of the table that are tested, the probabilities of their classes, and those with each ablation."""
    sample = _sample(study)
    tested: list[Int64Array] = []
    complete: list[Float32Array] = []
    ablated: dict[Ablation, list[Float32Array]] = {}
    opened: dict[str, _OpenedFeatures] = {}
    with one_thread():
        for number, (fold, choice) in enumerate(zip(study.folds, trained.choices, strict=True)):
            rows, train = np.intersect1d(fold.test, sample), np.intersect1d(fold.train, sample)
            if not len(rows):
                continue
            tested.append(rows)
            for signal in SIGNALS:
                key = EncoderKey(signal, study.encoders[EncoderRole(signal)][number])
                # Features of one encoder of a signal at a time: each fold may have its own.
                if signal not in opened or opened[signal].key != key:
                    opened[signal] = _OpenedFeatures(study, key, sample)
            members = []
            each: dict[Ablation, list[Float32Array]] = {}
            for member, heads in zip(choice.members, trained.heads[number], strict=True):
                inputs = _FoldInputs(study, number, member, opened, rows, train)
                members.append(_probability(heads, inputs.values, inputs.available))
                for ablation, values, available in inputs.ablations():
                    each.setdefault(ablation, []).append(_probability(heads, values, available))
            complete.append(mean_probability(members))
            for ablation, parts in each.items():
                ablated.setdefault(ablation, []).append(mean_probability(parts))
    return (
        np.concatenate(tested),
        np.concatenate(complete),
        {ablation: np.concatenate(parts) for ablation, parts in ablated.items()},
    )


def _sample(study: Study) -> Int64Array:
    """Rows of the table that the analysis uses: of those that are tested, and of the others that only train."""
    order = permutation(len(study.table.label), "occlusion", study.options.run.seed)
    tested = np.isin(order, np.concatenate([fold.test for fold in study.folds]))
    return np.sort(np.concatenate([order[tested][:_MAX_WINDOWS], order[~tested][:_MAX_WINDOWS]]))


def _effect(signal: str, drop: Difference, shift: float) -> dict[str, Any]:
    """Fields of an ``Occlusion``."""
    return {
        "signal": signal,
        "auc_drop": _rounded(drop.value),
        "ci": None if math.isnan(drop.low) else (_rounded(drop.low), _rounded(drop.high)),
        "prob_shift": _rounded(shift),
    }


def _rounded(value: float) -> float:
    return round(value, _DIGITS)


class _OpenedFeatures:
    """An encoder's frozen features of some rows of the table.

    Args:
        study: with the URL of the features.
        key: of the encoder.
        rows: int64, ascending rows of the table.

    Attributes:
        key: of the encoder.
        pooled: float32 ``[row, channel, 2 d]``, mean and standard deviation over patches of each channel.
        baseline: the mean over the baseline period before the clip, ``[row, channel, d]``; None where none is
            subtracted.
    """

    def __init__(self, study: Study, key: EncoderKey, rows: Int64Array) -> None:
        table = study.table
        self.key, self.rows = key, rows
        self.features: Features = open_features(study.features[key])
        self.sample = table.sample[rows]
        periods = None if table.baseline is None else table.baseline.select(rows)
        channels, d = self.features.values.shape[1], self.features.values.shape[3]
        shape = (len(rows), channels, 2 * d)
        self.pooled = pool_features(self.features, self.sample, "channels_mean_std", periods).reshape(shape)
        self.baseline: Float32Array | None = None
        if periods is not None:
            self.baseline = pool_features(self.features, self.sample, "channels_mean").reshape(len(rows), channels, d)
            self.baseline -= self.pooled[:, :, :d]

    def positions(self, rows: Int64Array) -> Int64Array:
        """Positions of rows of the table among the opened ones."""
        return np.searchsorted(self.rows, rows).astype(np.int64)

    def valid(self, rows: Int64Array) -> BoolArray:
        """Valid channels, bool ``[row, channel]``."""
        valid: BoolArray = self.features.valid[self.sample[self.positions(rows)]]
        return valid

    def by_channel(self, rows: Int64Array, pooling: str) -> Float32Array:
        """Pooled features of each channel before channels are averaged, ``[row, channel, f]``."""
        x = self.pooled[self.positions(rows)]
        return x if pooling.endswith("mean_std") else x[:, :, : x.shape[2] // 2]

    def means(self, rows: Int64Array, pooling: str) -> Float32Array:
        """Mean of :meth:`by_channel` over the rows in which a channel is valid, ``[channel, f]``; zeros if in none."""
        x, valid = self.by_channel(rows, pooling), self.valid(rows)[:, :, None]
        total = np.where(valid, x, 0).sum(axis=0, dtype=np.float64)
        return np.asarray(total / np.maximum(valid.sum(axis=0), 1), np.float32)

    def without_channel(
        self, inputs: Float32Array, rows: Int64Array, pooling: str, means: Float32Array, channel: int
    ) -> Float32Array:
        """Replace a channel's part of ``inputs`` by its mean, in the rows in which it is valid."""
        valid = self.valid(rows)
        affected, ablated = valid[:, channel], inputs.copy()
        if pooling.startswith("channels_"):
            ablated.reshape(len(rows), len(means), -1)[affected, channel] = means[channel]
            return ablated
        # Averages over the valid channels: the channel's share of them is exchanged.
        share = 1.0 / np.maximum(valid.sum(axis=1), 1, dtype=np.float32)
        if pooling != "attention":
            change = (means[channel] - self.by_channel(rows, pooling)[:, channel]) * share[:, None]
            ablated[affected] += change[affected]
            return ablated
        positions = self.positions(rows)
        values = self.features.values[self.sample[positions], channel]
        if self.baseline is not None:
            values = values - self.baseline[positions, channel][:, None]
        change = (means[channel] - values) * share[:, None, None]
        ablated[affected] += change[affected]
        return ablated

    def without_patches(self, inputs: Float32Array, rows: Int64Array, pooling: str) -> Iterator[Float32Array]:
        """Pool ``inputs`` over all patches but one, for each patch."""
        sample = self.sample[self.positions(rows)]
        # A difference, because the baseline before a clip is subtracted from both alike.
        offset = inputs - pool_features(self.features, sample, pooling)
        for patch in range(self.patches):
            yield offset + pool_features(self.features, sample, pooling, without=patch)

    @property
    def patches(self) -> int:
        """Number of patches that can be ablated: not the only one."""
        patches: int = self.features.values.shape[2]
        return patches if patches > 1 else 0


class _FoldInputs:
    """Inputs of a configuration's heads in a fold, and their ablations.

    Attributes:
        values: for each signal ``[row, f]`` or ``[row, token, f]``.
        available: for a signal bool ``[row, token]`` or ``[row, 1]``.
    """

    def __init__(
        self,
        study: Study,
        number: int,
        choice: Choice,
        opened: Mapping[str, _OpenedFeatures],
        rows: Int64Array,
        train: Int64Array,
    ) -> None:
        self._study, self._opened, self._rows, self._train = study, opened, rows, train
        self._pooling = input_kind(choice.config)
        self._keys = study.keys_of("fused", self._pooling, number)
        self.values = {signal: study.inputs[key][rows] for signal, key in self._keys.items()}
        self.available = {
            signal: mask[rows] for signal, key in self._keys.items() if (mask := study.available(key)) is not None
        }

    def ablations(self) -> Iterator[tuple[Ablation, dict[str, Float32Array], dict[str, BoolArray]]]:
        """Yield each ablation with the values and the availability that heads get."""
        for signal, features in self._opened.items():
            values = self.values[signal]
            mean = np.broadcast_to(self._train_mean(self._keys[signal]), values.shape)
            yield Ablation(signal, Part.SIGNAL), {**self.values, signal: mean}, self.available
            means = features.means(self._train, self._pooling)
            for channel in range(len(means)):
                ablated = features.without_channel(values, self._rows, self._pooling, means, channel)
                yield Ablation(signal, Part.CHANNEL, channel), {**self.values, signal: ablated}, self.available
            yield from self._patch_ablations(signal, features)

    def _patch_ablations(
        self, signal: str, features: _OpenedFeatures
    ) -> Iterator[tuple[Ablation, dict[str, Float32Array], dict[str, BoolArray]]]:
        values = self.values[signal]
        if self._pooling == "attention":
            # Patches are tokens: one of them is masked.
            mask = np.broadcast_to(self.available.get(signal, np.ones((len(values), 1), bool)), values.shape[:2])
            for patch in range(features.patches):
                others = mask & (np.arange(features.patches) != patch)
                yield Ablation(signal, Part.PATCH, patch), self.values, {**self.available, signal: others}
            return
        for patch, ablated in enumerate(features.without_patches(values, self._rows, self._pooling)):
            yield Ablation(signal, Part.PATCH, patch), {**self.values, signal: ablated}, self.available

    def _train_mean(self, key: InputKey) -> Float32Array:
        """Mean of a signal's inputs over the training windows in which it is available."""
        inputs, mask = self._study.inputs[key][self._train], self._study.available(key)
        if mask is not None and not (available := mask[self._train].any(axis=1)).all():
            inputs = inputs[available]
        mean: Float32Array = inputs.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean


@torch.no_grad()
def _probability(
    heads: Sequence[Head], values: Mapping[str, Float32Array], available: Mapping[str, BoolArray]
) -> Float32Array:
    """Mean of the heads' probabilities, ``[row, class]``."""
    n = len(next(iter(values.values())))
    parts = []
    for start in range(0, n, _WINDOWS):
        piece = slice(start, start + _WINDOWS)
        inputs = {name: torch.from_numpy(np.ascontiguousarray(x[piece])) for name, x in values.items()}
        masks = {name: torch.from_numpy(np.ascontiguousarray(x[piece])) for name, x in available.items()}
        each = [head(inputs, masks).softmax(-1).nan_to_num(1.0 / head.classes) for head in heads]
        parts.append(torch.stack(each).double().mean(dim=0).float().numpy())
    return np.concatenate(parts)
