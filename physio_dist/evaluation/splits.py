"""Folds that keep people, clips or both on one side of a split; a leaky protocol that divides windows; permuted labels.

All functions are pure.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from physio_dist.config.task import LEAKY
from physio_dist.data.format.index import SPLITS
from physio_dist.errors import UserError
from physio_dist.evaluation.label_table import LabelTable
from physio_dist.runtime.arrays import Int64Array
from physio_dist.runtime.seeding import permutation

# Ways to group people that are tried before it is said that there is none.
_ATTEMPTS = 50
_ONE = {"people": "person", "clips": "clip"}


LEAKY_NOTE = (
    "LEAKY SPLIT: windows are divided at random, so that windows of the same person and recording train and test. The "
    "figures are too high and say nothing about new people or new recordings; they are for comparison with studies "
    "that split so"
)


@dataclass(frozen=True)
class Fold:
    """One division of the windows. What is kept whole (people, clips, both) stands on one side of it only.

    Attributes:
        name: ``0``, ``1``, ...
        test: int64, rows of the table, ascending.
        inner: pairs (rows to train on, rows to validate on) of the remaining rows, which take turns as validation.
        remaining: the remaining rows, ascending; None where each pair holds all of them.
    """

    name: str
    test: Int64Array
    inner: tuple[tuple[Int64Array, Int64Array], ...]
    remaining: Int64Array | None = None

    @property
    def train(self) -> Int64Array:
        """Rows of all who may train when this fold is tested, ascending."""
        return np.sort(np.concatenate(self.inner[0])) if self.remaining is None else self.remaining


@dataclass(frozen=True)
class _Whole:
    """Units that a protocol never divides.

    Attributes:
        unit: ``[n]``, the unit of each row.
        called: their name for messages.
        windows: whether each row is a unit of its own.
    """

    unit: npt.NDArray[np.generic]
    called: str
    windows: bool = False


def folds_of(
    table: LabelTable, protocol: str, folds: int, val_folds: int, seed: int, section: str = "tune"
) -> list[Fold]:  # fmt: skip
    """The folds of a protocol.

    Args:
        table: the labelled windows.
        protocol: ``grouped_kfold`` (``folds`` groups of people, classes balanced as far as they go),
            ``loso`` (one person a fold), ``holdout`` (one fold, tested on the shard set's test split),
            ``clip_disjoint`` (``folds`` groups of clips), ``person_and_clip`` (``folds`` groups of people times as many
            of clips: a fold tests some people on some clips, and trains on other people with other clips) or
            ``leaky_window`` (``folds`` groups of single windows).
        folds: for all but ``loso`` and ``holdout``.
        val_folds: groups of what remains that take turns in validation; fewer where people or clips are fewer.
        seed: of the grouping.
        section: of the options, for messages.

    Raises:
        UserError: too few people or clips, an empty test split, or they cannot be grouped so that all classes are in
            every part that trains or validates.
    """
    people = _Whole(table.person, "people")
    rows = np.arange(len(table.label))
    if protocol == "person_and_clip":
        return _crossed(table, folds, val_folds, seed, section)
    if protocol == "holdout":
        whole, tests = people, [_held_out(table, section)]
    elif protocol == "loso":
        whole, tests = people, [np.flatnonzero(table.person == person) for person in np.unique(table.person)]
        if len(tests) < 3:
            raise UserError(f"tune.protocol=loso needs at least 3 people, {len(tests)} have the label")
    else:
        whole = people
        if protocol == "clip_disjoint":
            whole = _clips(table)
        elif protocol == LEAKY:
            whole = _Whole(rows, "windows", windows=True)

        def leaves_all_classes(groups: Sequence[Int64Array]) -> bool:
            return all(_has_all(table, np.setdiff1d(rows, group)) for group in groups)

        tests = _outer(table, whole, folds, f"{seed}/outer", section, leaves_all_classes)
    return [_fold(table, whole, str(number), test, val_folds, seed, section) for number, test in enumerate(tests)]


def _clips(table: LabelTable) -> _Whole:
    if table.clip is None:
        raise ValueError("the table was loaded without clips")
    return _Whole(table.clip, "clips")


def _outer(
    table: LabelTable,
    whole: _Whole,
    folds: int,
    purpose: str,
    section: str,
    fits: Callable[[Sequence[Int64Array]], bool],
) -> list[Int64Array]:
    """All rows in ``folds`` groups that take turns as those tested."""
    count = len(np.unique(whole.unit))
    if count < folds:
        never = "" if whole.windows else f", and a {_ONE[whole.called]} is never split"
        raise UserError(
            f"{section}.folds={folds}: only {count} {whole.called} have the label{never}; "
            f"set {section}.folds={count} or less"
        )
    found = _groups(table, whole, np.arange(len(table.label)), folds, purpose, fits)
    if found is None:
        raise UserError(
            f"{section}.folds={folds}: {whole.called} cannot be grouped so that those who are left to train on have "
            f"all of {', '.join(table.classes)}; {_too_few(table, whole)}"
        )
    return found


def _too_few(table: LabelTable, whole: _Whole) -> str:
    """Message with the number of people or clips that each class is in."""
    counts = [f"{name} in {len(np.unique(whole.unit[table.label == one]))}" for one, name in enumerate(table.classes)]
    return f"a class is found in too few {whole.called} ({', '.join(counts)})"


def _held_out(table: LabelTable, section: str) -> Int64Array:
    held = table.split == SPLITS.index("test")
    if not held.any():
        raise UserError(
            f"{section}.protocol=holdout: nobody with the label is in the shard set's test split; convert again with "
            f"split.test=0.2 (a share of people), or set {section}.protocol=grouped_kfold"
        )
    both = np.intersect1d(table.person[held], table.person[~held])
    if len(both):
        raise UserError(f"{section}.protocol=holdout: {len(both)} people of the test split are also in another split")
    return np.flatnonzero(held)


def _fold(
    table: LabelTable, whole: _Whole, name: str, test: Int64Array, val_folds: int, seed: int, section: str
) -> Fold:
    rest = np.setdiff1d(np.arange(len(table.label)), test)
    count = len(np.unique(whole.unit[rest]))
    if count < 2:
        raise UserError(f"fold {name} leaves {count} {whole.called} to train and validate on; it takes at least 2")
    if inner := _turns(table, whole, rest, val_folds, f"{seed}/inner/{name}"):
        return Fold(name, test, inner)
    raise UserError(
        f"fold {name}: its {count} {whole.called} that are not tested cannot be grouped into a training and a "
        f"validation part that both have all of {', '.join(table.classes)}; {_too_few(table, whole)}: use fewer "
        f"{section}.folds, or a label that more {whole.called} have"
    )


def inner_splits(
    table: LabelTable, rest: Int64Array, val_folds: int, purpose: str
) -> tuple[tuple[Int64Array, Int64Array], ...]:
    """Pairs (rows to train on, rows to validate on) of the rows ``rest``, people whole, as in `Fold`; empty if there
    are none."""
    return _turns(table, _Whole(table.person, "people"), rest, val_folds, purpose)


def _turns(
    table: LabelTable, whole: _Whole, rest: Int64Array, val_folds: int, purpose: str
) -> tuple[tuple[Int64Array, Int64Array], ...]:  # fmt: skip
    def all_have_all_classes(groups: Sequence[Int64Array]) -> bool:
        return all(_has_all(table, part) for part in (*groups, *(np.setdiff1d(rest, group) for group in groups)))

    # Fewer and therefore larger groups where a class is rare.
    for number in range(min(val_folds, len(np.unique(whole.unit[rest]))), 1, -1):
        groups = _groups(table, whole, rest, number, purpose, all_have_all_classes)
        if groups is not None:
            return tuple((np.setdiff1d(rest, group), group) for group in groups)
    return ()


def _crossed(table: LabelTable, folds: int, val_folds: int, seed: int, section: str) -> list[Fold]:
    """Folds whose test windows have neither a person nor a clip in common with what trains or validates.

    Groups of people cross groups of clips; the rows that share one of both with the test windows are in no part of that
    fold. Validation is made alike within the rows that remain: the first group of people with the first of clips, and
    so on.
    """
    parts = []
    for whole, purpose in ((_Whole(table.person, "people"), "outer"), (_clips(table), "outer/clips")):
        parts.append((whole, _outer(table, whole, folds, f"{seed}/{purpose}", section, lambda _: True)))
    (people, by_person), (clips, by_clip) = parts
    found: list[Fold] = []
    for mine, theirs in itertools.product(by_person, by_clip):
        test = np.intersect1d(mine, theirs)
        if not len(test):
            continue
        rest = np.setdiff1d(np.arange(len(table.label)), np.union1d(mine, theirs))
        name = str(len(found))
        inner = _crossed_turns(table, (people, clips), rest, val_folds, f"{seed}/inner/{name}")
        if not inner:
            raise UserError(
                f"fold {name}: the {len(np.unique(table.person[rest]))} people with "
                f"{len(np.unique(clips.unit[rest]))} clips that share nothing with its test windows cannot be grouped "
                f"into a training and a validation part that both have all of {', '.join(table.classes)}; "
                f"{_too_few(table, people)}, or {_too_few(table, clips)}: use other {section}.folds"
            )
        found.append(Fold(name, test, inner, rest))
    return found


def _crossed_turns(
    table: LabelTable, wholes: tuple[_Whole, _Whole], rest: Int64Array, val_folds: int, purpose: str
) -> tuple[tuple[Int64Array, Int64Array], ...]:  # fmt: skip
    most = min(val_folds, *(len(np.unique(whole.unit[rest])) for whole in wholes))
    for number in range(most, 1, -1):
        for attempt in range(_ATTEMPTS):
            groups = [
                _groups(table, whole, rest, number, f"{purpose}/{whole.called}/{attempt}", lambda _: True)
                for whole in wholes
            ]
            if groups[0] is None or groups[1] is None:
                break
            turns = tuple(
                (np.setdiff1d(rest, np.union1d(mine, theirs)), np.intersect1d(mine, theirs))
                for mine, theirs in zip(*groups, strict=True)
            )
            if all(_has_all(table, part) for turn in turns for part in turn):
                return turns
    return ()


def labelled(table: LabelTable, rest: Int64Array, fraction: float, purpose: str) -> Int64Array:
    """The rows of ``rest`` of a share of its people, drawn evenly; a smaller share's people are among a larger one's.

    Every class comes with at least two people, as far as there are any, for one has to train and one to validate: a
    share too small for that is made up.
    """
    people = np.unique(table.person[rest])
    order = people[permutation(len(people), "labelled", purpose)]
    chosen = set(order[: max(1, round(fraction * len(people)))].tolist())
    for one in range(len(table.classes)):
        having = set(table.person[rest][table.label[rest] == one].tolist())
        missing = 2 - len(chosen & having)
        chosen |= set([person for person in order.tolist() if person in having - chosen][: max(missing, 0)])
    return rest[np.isin(table.person[rest], np.array(sorted(chosen), dtype=people.dtype))]


def _has_all(table: LabelTable, rows: Int64Array) -> bool:
    return len(np.unique(table.label[rows])) == len(table.classes)


def _groups(
    table: LabelTable, whole: _Whole, rows: Int64Array, number: int, purpose: str,
    fits: Callable[[Sequence[Int64Array]], bool],
) -> list[Int64Array] | None:  # fmt: skip
    """``rows`` in ``number`` groups of whole units; the first of some ways to do so that fits, None if none does."""
    for attempt in range(_ATTEMPTS):
        # Sorting the rows by a permutation of people makes the grouping independent of the order of storage.
        units = np.unique(whole.unit[rows])
        rank = permutation(len(units), "folds", purpose, attempt)
        order = np.lexsort((table.label[rows], rank[np.searchsorted(units, whole.unit[rows])]))
        mine = rows[order]
        with warnings.catch_warnings():
            # It warns of classes rarer than groups, which is checked here in its own way.
            warnings.simplefilter("ignore", UserWarning)
            try:
                unit = rank[np.searchsorted(units, whole.unit[mine])]
                groups = [np.sort(mine[test]) for _, test in _way(whole, number, mine, table.label[mine], unit)]
            except ValueError:
                return None
        if all(len(group) for group in groups) and fits(groups):
            return groups
    return None


def _way(
    whole: _Whole, number: int, rows: Int64Array, label: Int64Array, unit: Int64Array
) -> Iterator[tuple[Int64Array, Int64Array]]:
    if whole.windows:  # The same, without a search for every single window's best group.
        yield from StratifiedKFold(number, shuffle=False).split(rows, label)
    else:
        yield from StratifiedGroupKFold(number, shuffle=False).split(rows, label, unit)


def can_permute(table: LabelTable) -> bool:
    """True if :func:`permuted` can change anything: somebody has windows of two classes."""
    pairs = np.unique(np.stack([np.unique(table.person, return_inverse=True)[1], table.label]), axis=1)
    return bool((np.bincount(pairs[0]) > 1).any())


def permuted(table: LabelTable, seed: int) -> LabelTable:
    """The table with labels permuted by recording within each person: what leaks between windows of a recording or a
    person still leaks, what the labels have to do with the signals is gone.

    A recording whose windows have several labels is permuted by its stretches of one label. Somebody with one stretch
    keeps it. The labels that people have do not change, the numbers of windows with each may.

    Returns:
        A table that differs in ``label`` alone.
    """
    label = table.label.copy()
    order = np.lexsort((table.sample, table.recording, table.person))
    person, recording, old = table.person[order], table.recording[order], table.label[order]
    new_stretch = (np.diff(person) != 0) | (np.diff(recording) != 0) | (np.diff(old) != 0)
    stretch = np.concatenate([[0], np.cumsum(new_stretch)])
    first = np.concatenate([[0], np.flatnonzero(new_stretch) + 1])
    given = old[first].copy()
    for who in np.unique(person):
        mine = np.flatnonzero(person[first] == who)
        given[mine] = given[mine][permutation(len(mine), "permuted", seed, int(who))]
    label[order] = given[stretch]
    return replace(table, label=label)
