"""Pooling of frozen features over channels and patches: the inputs of fusion heads."""

from __future__ import annotations

import numpy as np
import torch

from physio_dist.evaluation.clips import BaselinePeriod, subtract_baseline
from physio_dist.evaluation.features import Features
from physio_dist.models.fusion.pooling import make_tokens
from physio_dist.runtime.arrays import Float32Array, Int64Array

# Windows pooled at a time: features of patches are much larger than their pooled values.
_WINDOWS = 256


def pool_features(
    features: Features, sample: Int64Array, kind: str, baseline: BaselinePeriod | None = None,
    without: int | None = None,
) -> Float32Array:  # fmt: skip
    """Pool the features of some windows with :func:`physio_dist.models.fusion.pooling.make_tokens`.

    Args:
        features: of the whole set.
        sample: ``[n]``, positions of the windows in the set.
        kind: of pooling.
        baseline: its mean is subtracted; None: nothing is.
        without: number of a patch to leave out.

    Returns:
        ``[n, f]`` or ``[n, token, d]``.
    """
    patches = [patch for patch in range(features.values.shape[2]) if patch != without]

    def pooled(sample: Int64Array) -> Float32Array:
        parts = []
        for start in range(0, len(sample), _WINDOWS):
            rows = sample[start : start + _WINDOWS]
            values, valid = torch.from_numpy(features.values[rows]), torch.from_numpy(features.valid[rows])
            parts.append(make_tokens(values if without is None else values[:, :, patches], valid, kind)[0].numpy())
        return np.concatenate(parts)

    return subtract_baseline(pooled, sample, baseline)
