"""Pooling of frozen features over channels and patches: the inputs of fusion heads."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from physio_dist.evaluation.clips import BaselinePeriod, subtract_baseline
from physio_dist.evaluation.features import Features
from physio_dist.models.fusion.pooling import make_tokens

# Windows pooled at a time: features of patches are much larger than their pooled values.
_WINDOWS = 256


def pool_features(
    features: Features, sample: npt.NDArray[np.int64], kind: str, baseline: BaselinePeriod | None = None,
    without: int | None = None,
) -> npt.NDArray[np.float32]:  # fmt: skip
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

    def pooled(sample: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        parts = []
        for start in range(0, len(sample), _WINDOWS):
            rows = sample[start : start + _WINDOWS]
            values, valid = torch.from_numpy(features.values[rows]), torch.from_numpy(features.valid[rows])
            parts.append(make_tokens(values if without is None else values[:, :, patches], valid, kind)[0].numpy())
        return np.concatenate(parts)

    return subtract_baseline(pooled, sample, baseline)
