"""Frozen features of some windows, pooled: what heads are given of a signal."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from physio_dist.evaluation.clips import Rest, since_rest
from physio_dist.evaluation.features import Features
from physio_dist.models.fusion.base import make_tokens

# Windows pooled at a time: features of patches are much larger than what becomes of them.
_WINDOWS = 256


def pooled(
    features: Features, sample: npt.NDArray[np.int64], kind: str, rest: Rest | None = None, without: int | None = None
) -> npt.NDArray[np.float32]:
    """What :func:`physio_dist.models.fusion.tokens` makes of windows, less the rest before their clips.

    Args:
        features: of the whole set.
        sample: ``[n]``, positions of the windows among all of the set.
        kind: of pooling.
        rest: of these windows; None: nothing is subtracted.
        without: number of a patch that has no part in it.

    Returns:
        ``[n, f]`` or ``[n, token, d]``.
    """
    others = [patch for patch in range(features.values.shape[2]) if patch != without]

    def of(sample: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        parts = []
        for start in range(0, len(sample), _WINDOWS):
            rows = sample[start : start + _WINDOWS]
            values, valid = torch.from_numpy(features.values[rows]), torch.from_numpy(features.valid[rows])
            parts.append(make_tokens(values if without is None else values[:, :, others], valid, kind)[0].numpy())
        return np.concatenate(parts)

    return since_rest(of, sample, rest)
