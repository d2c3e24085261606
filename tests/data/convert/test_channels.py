"""The window specification of a set: which leads and electrodes a conversion stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from physio_dist.data.convert.channels import spec_behind
from physio_dist.data.format.index import ShardSet


def test_spec_behind_is_none_for_options_of_another_version(
    make_set: Callable[..., ShardSet], tmp_path: object
) -> None:
    shards = make_set(str(tmp_path))
    known = replace(shards, made_by={"options": {"window.seconds": 10.0, "missing_channels": "mask"}})
    spec = spec_behind(known)
    assert spec is not None and spec.missing_channels == "mask" and spec.leads == ("I", "II")
    assert spec_behind(replace(shards, made_by={"options": {"window.seconds": 10.0, "missing": "mask"}})) is None
    assert spec_behind(shards) is None
