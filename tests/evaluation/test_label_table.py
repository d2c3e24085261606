"""Labelled windows of a shard set as a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from physio_dist.data.format.index import open_set
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.errors import UserError
from physio_dist.evaluation.label_table import load_label_table, require_paired
from tests.evaluation.study_samples import facts_of, opened, paired, publish_set, waves


def labelled(values: list[Any], name: str = "x") -> list[dict[str, Any]]:
    return [
        {"person": f"p{i}", "record": f"r{i}", "labels": {} if value is None else {name: value}}
        for i, value in enumerate(values)
    ]


def test_eegmat_has_rest_before_arithmetic_and_numbers_recordings(tmp_path: Path) -> None:
    facts = facts_of(people=2, recordings=2, windows=3)
    paired(str(tmp_path), facts, split=[0] * 6 + [2] * 6)
    table = load_label_table(opened(str(tmp_path)), "eegmat", None)
    assert table.classes == ("rest", "arithmetic")
    assert table.label.tolist() == [0, 0, 0, 1, 1, 1] * 2
    assert table.recording.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert table.sample.tolist() == list(range(12))
    assert table.split.tolist() == [0] * 6 + [2] * 6
    assert np.array_equal(table.person, read_sample_table(open_set(str(tmp_path))).person)
    assert table.keys == [f"k-{i:04d}" for i in range(12)]
    assert not table.simulated and table.simulated_drive == {}


def test_windows_without_the_label_are_left_out(tmp_path: Path) -> None:
    paired(str(tmp_path), labelled(["b", None, "a", None, "b", "a", "a"]))
    table = load_label_table(opened(str(tmp_path)), "labels", "x")
    assert table.sample.tolist() == [0, 2, 4, 5, 6]
    assert table.keys == ["k-0000", "k-0002", "k-0004", "k-0005", "k-0006"]
    assert table.classes == ("a", "b") and table.label.tolist() == [1, 0, 1, 0, 0]
    people = read_sample_table(open_set(str(tmp_path))).person
    assert np.array_equal(table.person, people[table.sample])


def test_whole_numbers_and_truth_values_are_classes(tmp_path: Path) -> None:
    paired(str(tmp_path / "n"), labelled([10, 2, 10, 2, 2, 9]))
    assert load_label_table(opened(str(tmp_path / "n")), "labels", "x").classes == ("2", "9", "10")
    paired(str(tmp_path / "b"), labelled([True, False]))
    assert load_label_table(opened(str(tmp_path / "b")), "labels", "x").classes == ("false", "true")


def test_recordings_of_two_sources_are_two(tmp_path: Path) -> None:
    facts = [
        {"person": f"p{i}", "record": "same", "source": source, "labels": {"x": i % 2}}
        for i, source in enumerate(["one", "two", "one", "two"])
    ]
    paired(str(tmp_path), facts)
    assert load_label_table(opened(str(tmp_path)), "labels", "x").recording.tolist() == [0, 1, 0, 1]


def test_a_window_that_tells_no_recording_is_one_of_its_own(tmp_path: Path) -> None:
    paired(str(tmp_path), [{"person": "p", "labels": {"x": i % 2}} for i in range(4)])
    assert len(set(load_label_table(opened(str(tmp_path)), "labels", "x").recording.tolist())) == 4


def test_hidden_drives_come_from_simulated_sets_only(tmp_path: Path) -> None:
    facts = [
        {
            "person": f"p{i}",
            "record": f"r{i}",
            "labels": {"arousal": i % 2, "x": i % 2, "drive_ecg": i / 2, "drive_eeg": -i},
        }
        for i in range(4)
    ]
    paired(str(tmp_path / "real"), facts)
    assert load_label_table(opened(str(tmp_path / "real")), "labels", "arousal").simulated_drive == {}
    paired(str(tmp_path / "made"), facts, simulated=True)
    made = load_label_table(opened(str(tmp_path / "made")), "labels", "arousal")
    assert made.simulated
    # They bound what can be known of the state, and of nothing else.
    assert load_label_table(opened(str(tmp_path / "made")), "labels", "x").simulated_drive == {}
    assert made.simulated_drive["ecg"].tolist() == [0.0, 0.5, 1.0, 1.5] and made.simulated_drive["eeg"].tolist() == [
        0,
        -1,
        -2,
        -3,
    ]


def one_signal(url: str) -> None:
    facts = facts_of(people=2)
    publish_set(url, facts, {"ecg": (waves(len(facts)), ("I", "II"), 1.0)})


BAD: dict[str, tuple[Callable[[str], Any], str, str | None, list[str]]] = {
    "another name": (lambda u: paired(u, facts_of()), "labels", "tusk", ["tune.label=tusk", "did you mean 'task'?"]),
    "far from any": (
        lambda u: paired(u, [{"person": str(i), "labels": {"age": i, "sex": "f"}} for i in range(3)]),
        "labels", "diagnosis", ["diagnosis", "age, sex"],
    ),
    "no labels": (lambda u: paired(u, [{"person": "p"}] * 3), "labels", "x", ["no labels at all", "table of labels"]),
    "one class": (lambda u: paired(u, labelled(["a"] * 4)), "labels", "x", ["only the value a", "nothing to tell"]),
    "one of two": (
        lambda u: paired(u, facts_of(recordings=1)), "eegmat", None, ["only the value rest", "nothing to tell apart"],
    ),
    "all null": (
        lambda u: paired(u, [{"person": "p", "labels": {"x": None}}] * 3), "labels", "x", ["no value", "x"],
    ),
    "fractions": (
        lambda u: paired(u, labelled([1.5, 2.5])), "labels", "x", ["no class label", "numbers with a fraction", "1.5"],
    ),
    "lists": (lambda u: paired(u, labelled([["a"], ["b"]])), "labels", "x", ["no class label", "a list", '["a"]']),
    "many": (lambda u: paired(u, labelled(list(range(21)))), "labels", "x", ["no class label", "21 different values"]),
    "mixed": (lambda u: paired(u, labelled([1, "1"])), "labels", "x", ["no class label", "different kinds"]),
    "not eegmat": (
        lambda u: paired(u, labelled(["rest", "sleep"], "task")), "eegmat", None,
        ["also has sleep", "tune.task=labels"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_table_is_told_in_one_sentence(case: str, tmp_path: Path) -> None:
    make, task, label, words = BAD[case]
    make(str(tmp_path))
    with pytest.raises(UserError) as caught:
        load_label_table(opened(str(tmp_path)), task, label)
    for word in words:
        assert word in str(caught.value)


def test_require_paired_refuses_a_set_without_eeg(tmp_path: Path) -> None:
    one_signal(str(tmp_path))
    with pytest.raises(UserError) as caught:
        require_paired(open_set(str(tmp_path)))
    for word in ("has no eeg, only ecg", "signals=ecg,eeg"):
        assert word in str(caught.value)


def test_twenty_values_are_still_classes(tmp_path: Path) -> None:
    paired(str(tmp_path), labelled(list(range(20))))
    assert len(load_label_table(opened(str(tmp_path)), "labels", "x").classes) == 20
