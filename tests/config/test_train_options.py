"""Options of the training room that no run could use are refused before any work."""

from __future__ import annotations

import re

import pytest

from physio_dist.config import PretrainConfig, check_pretrain
from physio_dist.errors import UserError


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"spike_factor": 0.5}, "train.spike_factor=0.5: it must be above 1"),
        ({"spike_factor": float("nan")}, "train.spike_factor=nan"),
        ({"spike_factor": 0.0, "skip_spikes": True}, "train.skip_spikes=true"),
        ({"ema": 1.0}, "train.ema=1.0"),
        ({"ema": -0.1}, "train.ema=-0.1"),
        ({"stall_s": 0.0}, "train.hang_timeout_s=0.0"),
        ({"profile": [3]}, "train.profile=[3]"),
        ({"profile": [5, 2]}, "train.profile=[5, 2]"),
        ({"profile": [0, 2]}, "train.profile=[0, 2]"),
        ({"tracker": "mlfow"}, "did you mean 'mlflow'?"),
    ],
)
def test_what_no_run_could_use(given: dict[str, object], told: str) -> None:
    options = PretrainConfig()
    options.data.index = "shards"
    check_pretrain(options)
    for name, value in given.items():
        setattr(options.train, name, value)
    with pytest.raises(UserError, match=re.escape(told)):
        check_pretrain(options)
