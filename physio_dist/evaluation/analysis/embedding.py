"""Frozen features of each signal on a plane, and by whom and by what they lie together: people, or labels.

Where neighbours are mostly of one person, features tell people apart, and a split that shares people between training
and test lets heads recognise them. No label has a part in the plane, and no head.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save as save_safetensors
from scipy.spatial.distance import cdist
from sklearn.manifold import TSNE
from threadpoolctl import threadpool_limits

from physio_dist.evaluation.features import open_features
from physio_dist.evaluation.head_training import one_thread
from physio_dist.evaluation.label_table import SIGNALS
from physio_dist.evaluation.pooling import pool_features
from physio_dist.evaluation.results import canonical_bytes
from physio_dist.evaluation.trials import EncoderKey, EncoderRole, Study
from physio_dist.models.fusion.reduction import fit_reduction
from physio_dist.runs.sweep_results import EmbeddingSummary, NeighbourShares
from physio_dist.runtime.arrays import BoolArray, Float32Array, Float64Array, Int64Array, UInt64Array
from physio_dist.runtime.seeding import permutation

_DIGITS = 6
# Windows at most: t-SNE takes a quarter of a minute for so many, and a drawing shows no more.
_MOST_WINDOWS = 1000
_COMPONENTS = 50
_NEIGHBOURS = 10
_PERPLEXITY = 30.0


def embedding(study: Study) -> tuple[EmbeddingSummary, bytes]:
    """``embedding`` in ``results.json`` and ``embedding.safetensors``, of the signals of which there are some windows.

    Features are the richest that heads may get, mean and standard deviation over patches of each channel by itself,
    standardised, in their first principal components; where folds have encoders of their own, those of the first one.
    """
    table = study.table
    shares: dict[str, NeighbourShares] = {}
    some = np.sort(permutation(len(table.label), "embedding", study.options.run.seed)[:_MOST_WINDOWS])
    tensors: dict[str, npt.NDArray[Any]] = {}
    for signal in SIGNALS:
        url = study.features[EncoderKey(signal, study.encoders[EncoderRole(signal)][0])]
        there = study.valid.get(signal)
        rows = some if there is None else some[there[some].any(axis=1)]
        if len(rows) <= 3:
            continue
        rest = None if table.baseline is None else table.baseline.select(rows)
        features = open_features(url)
        values = pool_features(features, table.sample[rows], "channels_mean_std", rest)
        values = _filled(values, features.valid[table.sample[rows]])
        with one_thread(), threadpool_limits(1):
            given = fit_reduction(values, _COMPONENTS)
            x = ((values - given.mean) * given.scale @ given.axes).astype(np.float64)
            place = TSNE(
                init="pca", random_state=0, perplexity=min(_PERPLEXITY, (len(rows) - 1) / 3), method="barnes_hut"
            ).fit_transform(x)
        label, person = table.label[rows], table.person[rows]
        shares[signal] = NeighbourShares(len(rows), len(np.unique(person)), **neighbours(x, person, label))
        tensors |= {f"{signal}.place": place.astype(np.float32), f"{signal}.person": person, f"{signal}.label": label}
    header = {"classes": json.dumps(list(table.classes))}
    file = save_safetensors({name: np.ascontiguousarray(t) for name, t in tensors.items()}, metadata=header)
    return EmbeddingSummary(_NEIGHBOURS, **shares), canonical_bytes(file)


def _filled(values: Float32Array, valid: BoolArray) -> Float32Array:
    """``[n, channel x f]`` with a channel's mean where it is not valid: that it is missing puts nobody together."""
    each = values.reshape(*valid.shape, -1)
    shown = valid[:, :, None]
    mean = np.where(shown, each, 0).sum(axis=0, dtype=np.float64) / np.maximum(shown.sum(axis=0), 1)
    return np.where(shown, each, mean.astype(np.float32)).reshape(values.shape)


def neighbours(x: Float64Array, person: UInt64Array, label: Int64Array, k: int = _NEIGHBOURS) -> dict[str, float]:
    """Compute shares of nearest neighbours: the same person among the ``k`` nearest windows, and the same label among
    the ``k`` nearest windows of *other* people, because windows of one recording share label and person.

    Args:
        x: ``[n, f]``.
        person, label: ``[n]``.

    Returns:
        ``person``, ``label``: shares, means over windows; ``person_chance``, ``label_chance``: what neighbours drawn at
        random would show. NaN where nobody else is there.
    """
    distance = cdist(x, x)
    np.fill_diagonal(distance, np.inf)
    same = person[:, None] == person[None]
    alike = label[:, None] == label[None]
    np.fill_diagonal(same, False)
    others = person[:, None] != person[None]
    found = {"person": _share(distance, same, ~np.eye(len(x), dtype=bool), k)}
    found["label"] = _share(np.where(others, distance, np.inf), alike, others, k)
    return {
        name + suffix: round(value, _DIGITS)
        for name, pair in found.items() for suffix, value in zip(("", "_chance"), pair, strict=True)
    }  # fmt: skip


def _share(distance: Float64Array, hit: BoolArray, allowed: BoolArray, k: int) -> tuple[float, float]:
    """Share of hits among the nearest allowed ones, and among all of these."""
    count = allowed.sum(axis=1)
    if not count.min():
        return math.nan, math.nan
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :k]
    near, fits = np.take_along_axis(hit & allowed, nearest, 1), np.take_along_axis(allowed, nearest, 1)
    chance = (hit & allowed).sum(axis=1) / count
    return float((near.sum(axis=1) / fits.sum(axis=1)).mean()), float(chance.mean())
