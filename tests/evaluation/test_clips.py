"""Clips, and what was recorded before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physio_dist.errors import UserError
from physio_dist.evaluation.clips import BaselinePeriod, subtract_baseline
from physio_dist.evaluation.label_table import load_label_table, published_result
from tests.evaluation.study_samples import opened, paired


def watched(people: int = 3, clips: int = 4, **more: Any) -> list[dict[str, Any]]:
    """Of each person and clip one window of rest and two of the clip; ratings go round from 1 to 5."""
    return [
        {
            "person": f"p{person}", "record": f"p{person}-{clip}-{phase}", "source": "built",
            "labels": {"clip": clip, "phase": phase, **({"valence": 1 + (person + clip) % 5} if n else {}), **more},
        }
        for person in range(people) for clip in range(clips) for phase, n in (("baseline", 0), ("stimulus", 1))
        for _ in range(n + 1)
    ]  # fmt: skip


def test_windows_know_their_clip_and_the_rest_before(tmp_path: Path) -> None:
    facts = watched()
    del facts[0]  # The first person's first clip has no rest any more.
    paired(str(tmp_path), facts)
    table = load_label_table(opened(str(tmp_path)), "dreamer", "valence", clip="clip", baseline=True)
    assert table.clip is not None and table.baseline is not None
    assert table.classes == ("low", "high") and len(table.label) == 3 * 4 * 2 - 2
    of_clip = [facts[i]["labels"]["clip"] for i in table.sample]
    assert table.clip.tolist() == of_clip
    assert table.label.tolist() == [int(facts[i]["labels"]["valence"] > 3) for i in table.sample]
    for row, before in zip(table.sample, table.baseline.before, strict=True):
        (own,) = table.baseline.sample[table.baseline.period == before]
        assert facts[own]["labels"]["phase"] == "baseline" and facts[own]["person"] == facts[row]["person"]
        assert facts[own]["labels"]["clip"] == facts[row]["labels"]["clip"]
    notes = " ".join(table.notes)
    assert "tune.neutral=low" in notes and "2 windows without a rest are left out" in notes
    assert "11 of 35 windows do not have the label" in notes
    plain = load_label_table(opened(str(tmp_path)), "dreamer", "valence")
    assert plain.clip is None and plain.baseline is None and len(plain.label) == 24


def test_what_is_left_is_the_difference_from_the_rest() -> None:
    values = np.array([[1, 10], [3, np.nan], [5, 1], [7, 2], [9, 3], [np.nan, np.nan]])
    rest = BaselinePeriod(sample=np.array([0, 1, 5]), period=np.array([0, 0, 1]), before=np.array([0, 0, 1]))
    found = subtract_baseline(values.__getitem__, np.array([2, 3, 4]), rest)
    np.testing.assert_array_equal(found, [[3, -9], [5, -8], [np.nan, np.nan]])
    assert subtract_baseline(values.__getitem__, np.array([2]), None).tolist() == [[5, 1]]
    small = subtract_baseline(
        values.astype(np.float32).__getitem__, np.array([2]), BaselinePeriod(*(np.array([0]),) * 3)
    )
    assert small.dtype == np.float32


def test_tokens_are_taken_from_the_tokens_of_the_rest() -> None:
    values = np.arange(4 * 3 * 2, dtype=np.float32).reshape(4, 3, 2)
    rest = BaselinePeriod(sample=np.array([0, 1]), period=np.array([0, 0]), before=np.array([0, 0]))
    found = subtract_baseline(values.__getitem__, np.array([2, 3]), rest)
    np.testing.assert_array_equal(found, values[2:] - values[:2].mean(axis=0))


def other_scale() -> list[dict[str, Any]]:
    facts = watched()
    facts[5]["labels"]["valence"] = 7
    return facts


def two_in_one() -> list[dict[str, Any]]:
    return [{**one, "record": one["person"]} for one in watched()]


def half_told() -> list[dict[str, Any]]:
    facts = watched()
    del facts[1]["labels"]["clip"]
    return facts


CLIP, REST = {"clip": "clip"}, {"clip": "clip", "baseline": True}
BAD: dict[str, tuple[list[dict[str, Any]], dict[str, Any], list[str]]] = {
    "outside of the scale": (other_scale(), {}, ["label valence", "has 7", "from 1 to 5"]),
    "no clip label": (watched(), {"clip": "film"}, ["tune.clip=film", "it has clip, phase, valence"]),
    "another name": (watched(), {"clip": "clips"}, ["tune.clip=clips", "did you mean 'clip'?"]),
    "windows without clip": (half_told(), CLIP, ["tune.clip=clip: 1 of 24 windows", "do not say"]),
    "clips within a recording": (two_in_one(), CLIP, ["has both 0 and 1", "split by window"]),
    "recordings not told": ([{**one, "record": None} for one in watched()], CLIP, ["which recording"]),
    "no rest": (
        [one for one in watched() if one["labels"]["phase"] == "stimulus"], REST, ["tune.baseline=subtract: no window"],
    ),
    "one class": (
        [{**one, "labels": {**one["labels"], "valence": 5}} for one in watched()], {}, ["only the value high"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_clips_or_ratings_is_told(case: str, tmp_path: Path) -> None:
    facts, asked, words = BAD[case]
    paired(str(tmp_path), facts)
    with pytest.raises(UserError) as caught:
        load_label_table(opened(str(tmp_path)), "dreamer", "valence", **asked)
    for word in words:
        assert word in str(caught.value)


def test_good_and_bad_counters(tmp_path: Path) -> None:
    kinds = ["good", "bad", "good"]
    paired(str(tmp_path / "a"), [{"person": str(i), "labels": {"counter": kind}} for i, kind in enumerate(kinds)])
    table = load_label_table(opened(str(tmp_path / "a")), "eegmat", "counter")
    assert table.classes == ("bad", "good") and table.label.tolist() == [1, 0, 1]
    paired(str(tmp_path / "b"), [{"person": str(i), "labels": {"counter": i}} for i in range(3)])
    with pytest.raises(UserError, match="also has 0, 1, 2; it must be bad or good"):
        load_label_table(opened(str(tmp_path / "b")), "eegmat", "counter")


def test_the_papers_figures_stand_beside_its_labels_only() -> None:
    rows = {label: published_result("dreamer", label) for label in ("valence", "arousal", "dominance")}
    assert {label: (row.metric, row.value) for label, row in rows.items() if row} == {
        "valence": ("f1", 0.8114), "arousal": ("auc", 0.8479), "dominance": ("auc", 0.8669),
    }  # fmt: skip
    assert all(row and "divided between training and test" in row.unknown for row in rows.values())
    assert published_result("labels", "arousal") is None and published_result("eegmat", "task") is None
