"""Folds keep people whole; permuted labels keep what leaks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from physio_dist.config.task import PROTOCOLS
from physio_dist.errors import UserError
from physio_dist.evaluation.label_table import LabelTable
from physio_dist.evaluation.splits import Fold, can_permute, folds_of, labelled, permuted
from tests.evaluation.study_samples import table_of


def people(table: LabelTable, rows: np.ndarray) -> set[int]:
    return set(table.person[rows].tolist())


def check(table: LabelTable, folds: list[Fold], val_folds: int) -> None:
    everything = set(range(len(table.label)))
    for fold in folds:
        rest = everything - set(fold.test.tolist())
        assert len(fold.test) and 2 <= len(fold.inner) <= val_folds
        validated: list[int] = []
        for train, valid in fold.inner:
            assert set(train.tolist()) | set(valid.tolist()) == rest
            assert not people(table, train) & people(table, valid)
            for part in (train, valid):
                assert not people(table, part) & people(table, fold.test)
                assert set(table.label[part].tolist()) == set(range(len(table.classes)))
                assert (np.diff(part) > 0).all()
            validated += valid.tolist()
        # Everybody who is not tested validates once.
        assert sorted(validated) == sorted(rest) == fold.train.tolist()


@settings(max_examples=40, deadline=None)
@given(
    st.integers(6, 20), st.integers(2, 4), st.integers(1, 5), st.integers(2, 5), st.integers(2, 4), st.integers(0, 9),
)  # fmt: skip
def test_every_window_is_tested_once_and_people_stay_whole(
    n: int, recordings: int, windows: int, number: int, val_folds: int, seed: int
) -> None:
    table = table_of(n, recordings, windows, seed=seed)
    folds = folds_of(table, "grouped_kfold", number, val_folds, seed)
    assert [fold.name for fold in folds] == [str(i) for i in range(number)]
    check(table, folds, val_folds)
    assert np.array_equal(np.sort(np.concatenate([fold.test for fold in folds])), np.arange(len(table.label)))
    sizes = [len(people(table, fold.test)) for fold in folds]
    assert max(sizes) - min(sizes) <= 1


def test_loso_tests_each_person_alone() -> None:
    table = table_of(7)
    folds = folds_of(table, "loso", 3, 3, 0)
    check(table, folds, 3)
    assert [people(table, fold.test) for fold in folds] == [{person} for person in np.unique(table.person).tolist()]


def test_holdout_tests_the_test_split_once() -> None:
    table = table_of(8)
    held = np.isin(table.person, np.unique(table.person)[[1, 5]])
    split = np.where(held, 2, np.where(table.person == table.person.min(), 1, 0)).astype(np.uint8)
    (fold,) = folds_of(replace(table, split=split), "holdout", 5, 3, 0)
    assert fold.name == "0" and np.array_equal(fold.test, np.flatnonzero(held))
    check(table, [fold], 3)


def test_folds_depend_on_the_seed_and_not_on_the_order_of_windows() -> None:
    table = table_of(12)

    def tested(table: LabelTable, seed: int) -> list[list[str]]:
        folds = folds_of(table, "grouped_kfold", 4, 3, seed)
        parts = [fold.test for fold in folds] + [valid for fold in folds for _, valid in fold.inner]
        return [sorted(table.keys[i] for i in part) for part in parts]

    order = np.random.default_rng(0).permutation(len(table.label))
    shuffled = replace(
        table, keys=[table.keys[i] for i in order], person=table.person[order], recording=table.recording[order],
        label=table.label[order], split=table.split[order],
    )  # fmt: skip
    assert tested(table, 1) == tested(table, 1) == tested(shuffled, 1)
    assert tested(table, 1)[:4] != tested(table, 2)[:4]
    assert tested(table, 1)[4:] != tested(table, 2)[4:]


def test_classes_that_people_do_not_share_are_balanced() -> None:
    """Each person has one class: a fold without stratification would soon miss one."""
    table = table_of(9, recordings=1, classes=2)
    label = (np.searchsorted(np.unique(table.person), table.person) < 3).astype(np.int64)
    folds = folds_of(replace(table, label=label), "grouped_kfold", 3, 3, 0)
    for fold in folds:
        assert set(label[fold.test]) == {0, 1}
        # Two people of the rare class are left: no three groups can all have one.
        assert len(fold.inner) == 2
    check(replace(table, label=label), folds, 3)


def test_fewer_people_than_groups_make_fewer_groups() -> None:
    table = table_of(4)
    assert [len(fold.inner) for fold in folds_of(table, "grouped_kfold", 2, 3, 0)] == [2, 2]


def watched(people: int = 9, clips: int = 6, windows: int = 2, classes: int = 2, seed: int = 0) -> LabelTable:
    """Everybody sees every clip; what they make of it is drawn."""
    table = table_of(people, clips, windows, classes, seed)
    drawn = np.random.default_rng(seed).integers(0, classes, people * clips)
    return replace(table, label=drawn[table.recording], clip=table.recording % clips)


def clips(table: LabelTable, rows: np.ndarray) -> set[int]:
    assert table.clip is not None
    return set(table.clip[rows].tolist())


@pytest.mark.parametrize(
    ("n", "k", "folds", "val_folds", "seed"), [(3, 9, 3, 2, 0), (8, 18, 5, 3, 1), (5, 12, 2, 4, 2)]
)  # fmt: skip
def test_clip_disjoint_never_trains_on_a_clip_it_tests(n: int, k: int, folds: int, val_folds: int, seed: int) -> None:
    table = watched(n, k, seed=seed)
    made = folds_of(table, "clip_disjoint", folds, val_folds, seed)
    assert np.array_equal(np.sort(np.concatenate([fold.test for fold in made])), np.arange(len(table.label)))
    for fold in made:
        assert people(table, fold.test) == people(table, fold.train) == people(table, np.arange(len(table.label)))
        for train, valid in fold.inner:
            assert not clips(table, fold.test) & (clips(table, train) | clips(table, valid))
            assert not clips(table, train) & clips(table, valid)
            assert set(table.label[train]) == set(table.label[valid]) == {0, 1}


@pytest.mark.parametrize(
    ("n", "k", "folds", "val_folds", "seed"), [(9, 12, 3, 2, 0), (12, 18, 2, 3, 1), (9, 15, 2, 2, 2)]
)  # fmt: skip
def test_person_and_clip_shares_neither(n: int, k: int, folds: int, val_folds: int, seed: int) -> None:
    table = watched(n, k, seed=seed)
    made = folds_of(table, "person_and_clip", folds, val_folds, seed)
    assert len(made) == folds**2 and [fold.name for fold in made] == [str(i) for i in range(folds**2)]
    assert np.array_equal(np.sort(np.concatenate([fold.test for fold in made])), np.arange(len(table.label)))
    for fold in made:
        others = ~np.isin(table.person, table.person[fold.test]) & ~np.isin(table.clip, table.clip[fold.test])
        assert np.array_equal(fold.train, np.flatnonzero(others))
        assert 2 <= len(fold.inner) <= val_folds
        for train, valid in fold.inner:
            assert set(train.tolist()) | set(valid.tolist()) <= set(fold.train.tolist())
            assert not people(table, train) & people(table, valid) and not clips(table, train) & clips(table, valid)
            assert set(table.label[train]) == set(table.label[valid]) == {0, 1}


def test_leaky_window_divides_recordings_and_is_the_only_one_that_does() -> None:
    table = watched(people=9, clips=12, windows=6)
    for protocol in PROTOCOLS:
        if protocol == "holdout":
            continue
        made = folds_of(table, protocol, 3, 3, 0)
        assert np.array_equal(np.sort(np.concatenate([fold.test for fold in made])), np.arange(len(table.label)))
        for fold in made:
            pairs = [(fold.test, fold.train), *fold.inner]
            shared = [len(set(table.recording[a]) & set(table.recording[b])) for a, b in pairs]
            assert min(shared) > 50 if protocol == "leaky_window" else max(shared) == 0
            if protocol == "leaky_window":
                assert abs(table.label[fold.test].mean() - table.label.mean()) < 0.02
    assert folds_of(table, "leaky_window", 3, 3, 0)[0].test.tolist() != (
        folds_of(table, "leaky_window", 3, 3, 1)[0].test.tolist()
    )


def test_there_is_something_to_permute_where_somebody_has_two_classes() -> None:
    table = table_of(6, recordings=2)
    assert can_permute(table)
    each = (np.searchsorted(np.unique(table.person), table.person) % 2).astype(np.int64)
    assert not can_permute(replace(table, label=each))


def with_split(table: LabelTable, code: int, rows: slice) -> LabelTable:
    split = table.split.copy()
    split[rows] = code
    return replace(table, split=split)


def rare(table: LabelTable) -> LabelTable:
    """Only one person has the second class at all."""
    return replace(table, label=(table.person == table.person[0]).astype(np.int64))


BAD = {
    "fewer people than folds": (table_of(4), "grouped_kfold", 5, ["tune.folds=5", "only 4 people"]),
    "nobody held out": (table_of(4), "holdout", 2, ["test split", "split.test="]),
    "a person in two splits": (with_split(table_of(4), 2, slice(0, 7)), "holdout", 2, ["1 people", "another split"]),
    "all held out": (with_split(table_of(4), 2, slice(None)), "holdout", 2, ["leaves 0 people", "at least 2"]),
    "two people": (table_of(2), "loso", 2, ["at least 3 people", "2 have"]),
    "one left": (table_of(2), "grouped_kfold", 2, ["fold 0 leaves 1 people", "at least 2"]),
    "class of one person": (
        rare(table_of(5)), "grouped_kfold", 3, ["tune.folds=3", "too few people (class0 in 4, class1 in 1)"],
    ),
    "fewer clips than folds": (watched(clips=3), "clip_disjoint", 5, ["tune.folds=5", "only 3 clips", "clip is never"]),
    "fewer clips than folds, crossed": (watched(clips=3), "person_and_clip", 4, ["tune.folds=4", "only 3 clips"]),
    "fewer people than folds, crossed": (watched(people=3), "person_and_clip", 4, ["tune.folds=4", "only 3 people"]),
    "fewer windows than folds": (table_of(2, 1, 2), "leaky_window", 5, ["tune.folds=5", "only 4 windows"]),
    "class of one clip": (
        replace(watched(), label=(watched().clip == 0).astype(np.int64)), "clip_disjoint", 3,
        ["too few clips", "class0 in 5, class1 in 1"],
    ),
    "class of one person, crossed": (rare(watched()), "person_and_clip", 3, ["class1 in 1", "too few people"]),
    "class of one person, loso": (rare(table_of(5)), "loso", 3, ["fold", "class0, class1", "too few people"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_divided_is_told(case: str) -> None:
    table, protocol, folds, words = BAD[case]
    with pytest.raises(UserError) as caught:
        folds_of(table, protocol, folds, 3, 0)
    for word in words:
        assert word in str(caught.value)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 4), st.integers(2, 4), st.integers(0, 99))
def test_permuted_labels_stay_with_the_person_and_whole_recordings(
    n: int, recordings: int, windows: int, classes: int, seed: int
) -> None:
    table = table_of(n, recordings, windows, classes, seed)
    new = permuted(table, seed)
    for person in np.unique(table.person):
        mine = table.person == person
        # Recordings are equally long here, so the counts stay too.
        assert sorted(new.label[mine].tolist()) == sorted(table.label[mine].tolist())
    for recording in np.unique(table.recording):
        assert len(set(new.label[table.recording == recording].tolist())) == 1
    if recordings == 1:
        assert np.array_equal(new.label, table.label)
    assert np.array_equal(permuted(table, seed).label, new.label)
    assert new.person is table.person and new.keys is table.keys


def test_permutations_differ_between_seeds_and_people() -> None:
    table = table_of(40, recordings=2, windows=2)
    swapped = []
    for seed in range(20):
        changed = permuted(table, seed).label != table.label
        by_person = changed.reshape(40, 4)
        assert (by_person.all(axis=1) | ~by_person.any(axis=1)).all()
        swapped.append(by_person[:, 0])
    shares = np.mean(swapped, axis=1)
    assert shares.min() > 0.2 and shares.max() < 0.8 and abs(shares.mean() - 0.5) < 0.06
    assert len({tuple(one.tolist()) for one in swapped}) == 20


def test_neighbouring_recordings_of_one_label_are_still_two() -> None:
    table = table_of(6, recordings=3, windows=2)
    label = np.tile([0, 0, 0, 0, 1, 1], 6)
    seen = set()
    for seed in range(12):
        new = permuted(replace(table, label=label), seed).label.reshape(6, 3, 2)
        assert (new == new[:, :, :1]).all()
        seen |= {tuple(one) for one in new[:, :, 0].tolist()}
    assert seen == {(0, 0, 1), (0, 1, 0), (1, 0, 0)}


def test_a_recording_of_several_labels_is_permuted_by_its_stretches() -> None:
    table = table_of(6, recordings=1, windows=12)
    label = np.tile(np.repeat([0, 1, 0], 4), 6)
    seen = set()
    for seed in range(12):
        new = permuted(replace(table, label=label), seed).label.reshape(6, 3, 4)
        assert (new == new[:, :, :1]).all()
        seen |= {tuple(one) for one in new[:, :, 0].tolist()}
    assert seen == {(0, 1, 0), (1, 0, 0), (0, 0, 1)}


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 40), st.integers(1, 3), st.integers(0, 9))
def test_a_share_of_people_is_labelled_smaller_ones_within_larger_ones(n: int, classes: int, seed: int) -> None:
    # Each person has one class.
    made = table_of(n * classes, 1, 2)
    number = np.unique(made.person, return_inverse=True)[1] % classes
    table = replace(made, label=number, classes=tuple("abc"[:classes]))
    rest = np.flatnonzero(table.person != table.person[0])
    before: set[int] = set()
    for fraction in (0.01, 0.1, 0.5, 1.0):
        rows = labelled(table, rest, fraction, str(seed))
        chosen = people(table, rows)
        assert np.array_equal(rows, rest[np.isin(table.person[rest], sorted(chosen))]), "people stay whole"
        assert before <= chosen
        wanted = max(1, round(fraction * len(people(table, rest))))
        assert wanted <= len(chosen) <= max(wanted, wanted + 2 * classes - 1)
        for one in range(classes):
            having = people(table, rest[table.label[rest] == one])
            assert len(chosen & having) >= min(2, len(having))
        before = chosen
    assert before == people(table, rest)
    assert labelled(table, rest, 0.2, "a").tolist() == labelled(table, rest, 0.2, "a").tolist()
