"""Options under ``train`` that no run could use."""

from __future__ import annotations

import re

import pytest

from physio_dist.config import PretrainConfig, load
from physio_dist.errors import UserError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.spike_factor=0.5"], "train.spike_factor=0.5: it must be above 1"),
        (["train.spike_factor=.nan"], "train.spike_factor=nan"),
        (["train.spike_factor=0", "train.skip_spikes=true"], "train.skip_spikes=true"),
        (["train.ema=1"], "train.ema=1.0"),
        (["train.ema=-0.1"], "train.ema=-0.1"),
        (["train.hang_timeout_s=0"], "train.hang_timeout_s=0.0"),
        (["train.profile=[3]"], "train.profile=[3]"),
        (["train.profile=[5,2]"], "train.profile=[5, 2]"),
        (["train.profile=[0,2]"], "train.profile=[0, 2]"),
        (["train.tracker=mlfow"], "did you mean 'mlflow'?"),
    ],
)
def test_load_refuses_training_options_out_of_range(words: list[str], message: str) -> None:
    load(PretrainConfig, None, ["data.index=shards"])
    with pytest.raises(UserError, match=re.escape(message)):
        load(PretrainConfig, None, ["data.index=shards", *words])
