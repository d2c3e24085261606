"""Dataclasses to JSON and back."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest

from physio_dist.errors import UserError
from physio_dist.runs.sweep_results import (
    ChannelOcclusion,
    EmbeddingSummary,
    FoldResult,
    FoldSize,
    NeighbourShares,
    OcclusionResults,
    PatchOcclusion,
    PermutationControl,
    Published,
    ResultRow,
    RowDifference,
    Scores,
    Selection,
    SweepResults,
    TrialResult,
)
from physio_dist.runs.typed_json import OPTIONAL, from_json, parse_lines, to_json


@dataclass(frozen=True)
class Inner:
    name: str
    value: float = 0.0


@dataclass(frozen=True)
class Outer:
    count: int
    flag: bool = False
    pair: tuple[int, float] | None = None
    inner: list[Inner] = field(default_factory=list)
    table: dict[str, list[int]] = field(default_factory=dict)
    anything: Any = None
    extra: Inner | None = field(default=None, metadata=OPTIONAL)


def sweep() -> SweepResults:
    fold = FoldResult("0", 3, 30, 0.5, config={"lr": 0.1}, epoch=4)
    row = ResultRow("fused", ["ecg", "eeg"], auc=0.75, auc_ci=(0.7, 0.8), per_fold=[fold], spread=Scores(0.125),
                    confusion=[[1, 2], [3, 4]])  # fmt: skip
    occlusion = OcclusionResults(
        30, 3, 0.75, [], [ChannelOcclusion(signal="eeg", channel="Cz", auc_drop=0.25, ci=(0.125, 0.5), prob_shift=0.5)],
        [PatchOcclusion(signal="ecg", start_s=1.0, seconds=1.0, auc_drop=0.0, prob_shift=0.0)],
    )  # fmt: skip
    return SweepResults(
        rows=[row], task="labels", classes=["a", "b"], simulated=False, windows=30, people=3,
        folds=[FoldSize("0", 3, 30)], encoders={"ecg": {"url": "/e", "people": None}},
        selection=Selection("best", trials={"fused": 4}, val_auc={"fused": [0.5]}), notes=["note"],
        differences=[RowDifference("fused", "ecg", 0.25, (0.0, 0.5), 0.5)], published=Published("paper", "f1", 0.5),
        permuted=PermutationControl(2, [0.5, 0.25], 0.375, 0.5, 0.5), occlusion=occlusion,
        embedding=EmbeddingSummary(10, eeg=NeighbourShares(30, 3, 0.5, 0.25, 0.5, 0.25)),
    )  # fmt: skip


def test_to_json_writes_null_for_nan_and_leaves_out_optional_fields_without_value() -> None:
    assert to_json(Outer(1, inner=[Inner("a", math.nan)])) == {
        "count": 1, "flag": False, "pair": None, "inner": [{"name": "a", "value": None}], "table": {}, "anything": None,
    }  # fmt: skip


@pytest.mark.parametrize("value", [sweep(), Outer(1, True, (2, 0.5), [Inner("a")], {"t": [1]}, [1], Inner("b"))])
def test_from_json_inverts_to_json(value: Any) -> None:
    text = json.dumps(to_json(value), allow_nan=False)
    assert repr(from_json(type(value), json.loads(text), "file")) == repr(value)
    assert json.dumps(to_json(from_json(type(value), json.loads(text), "file"))) == text


def test_from_json_takes_defaults_and_ignores_unknown_keys() -> None:
    assert from_json(Outer, {"count": 2, "unknown": 1}, "file") == Outer(2)


def test_from_json_reads_null_and_not_finite_as_nan() -> None:
    for value in (None, math.inf, math.nan):
        assert math.isnan(from_json(Inner, {"name": "a", "value": value}, "file").value)


def test_from_json_takes_control_characters_out_of_text() -> None:
    assert from_json(Inner, {"name": "a\x00b\ud800"}, "file").name == "ab"


@pytest.mark.parametrize(
    ("document", "field_name"),
    [
        ([], "the document"), ({}, "count"), ({"count": True}, "count"), ({"count": 1.5}, "count"),
        ({"count": 1, "flag": 1}, "flag"), ({"count": 1, "pair": [1]}, "pair"),
        ({"count": 1, "pair": ["a", 1]}, "pair"),
        ({"count": 1, "inner": {}}, "inner"), ({"count": 1, "inner": [{"name": "a"}, {}]}, "inner[1]"),
        ({"count": 1, "inner": [{"name": 3}]}, "inner[0].name"),
        ({"count": 1, "inner": [{"name": "a", "value": "x"}]}, "inner[0].value"),
        ({"count": 1, "inner": [{"name": "a", "value": False}]}, "inner[0].value"),
        ({"count": 1, "table": {"t": [1, "x"]}}, "table['t'][1]"), ({"count": 1, "extra": []}, "extra"),
    ],
)  # fmt: skip
def test_from_json_names_file_and_field_of_a_wrong_type(document: Any, field_name: str) -> None:
    with pytest.raises(UserError) as caught:
        from_json(Outer, document, "some file")
    assert str(caught.value).startswith("some file: ") and field_name in str(caught.value)


def trial(document: Any, where: str) -> TrialResult:
    return from_json(TrialResult, document, where)


def test_parse_lines_leaves_out_an_unfinished_last_line() -> None:
    lines, unfinished = parse_lines(b'{"row": "ecg", "config": {}}\n\n{"row": "e', "file", trial)
    assert [line.row for line in lines] == ["ecg"] and unfinished
    assert parse_lines(None, "file", trial) == ([], False)


def test_parse_lines_raises_on_a_damaged_line_and_names_it() -> None:
    with pytest.raises(UserError, match="file, line 2"):
        parse_lines(b'{"row": "ecg", "config": {}}\n{"row": "e\n', "file", trial)
