"""Who trains, who selects, who tests: folds that keep people whole; and labels permuted as a control. All pure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold

from physio_dist.downstream.tasks import Table
from physio_dist.errors import UserError
from physio_dist.shards.index import SPLITS
from physio_dist.shards.order import permutation

Ints = npt.NDArray[np.int64]

# Ways to group people that are tried before it is said that there is none.
_ATTEMPTS = 50


@dataclass(frozen=True)
class Fold:
    """One division of the windows; no person stands on two sides of it.

    Attributes:
        name: ``0``, ``1``, ...
        test: int64, rows of the table, ascending.
        inner: pairs (rows to train on, rows to validate on) of the remaining people, who take turns as validation.
    """

    name: str
    test: Ints
    inner: tuple[tuple[Ints, Ints], ...]

    @property
    def train(self) -> Ints:
        """Rows of everybody who is not tested, ascending."""
        return np.sort(np.concatenate(self.inner[0]))


def folds_of(
    table: Table, protocol: str, folds: int, val_folds: int, seed: int, section: str = "tune"
) -> list[Fold]:  # fmt: skip
    """The folds of a protocol.

    Args:
        table: the labelled windows.
        protocol: ``grouped_kfold`` (``folds`` groups of people, classes balanced as far as they go),
            ``loso`` (one person a fold) or ``holdout`` (one fold, tested on the shard set's test split).
        folds: for ``grouped_kfold``.
        val_folds: groups of the remaining people that take turns as validation people; fewer where people are fewer.
        seed: of the grouping.
        section: of the options, for messages.

    Raises:
        UserError: too few people, an empty test split, or people cannot be grouped so that all classes are in every
            part that trains or validates.
    """
    people = np.unique(table.person)
    if protocol == "holdout":
        tests = [_held_out(table, section)]
    elif protocol == "loso":
        if len(people) < 3:
            raise UserError(f"tune.protocol=loso needs at least 3 people, {len(people)} have the label")
        tests = [np.flatnonzero(table.person == person) for person in people]
    else:
        if len(people) < folds:
            raise UserError(
                f"{section}.folds={folds}: only {len(people)} people have the label, and a person is never split; "
                f"set {section}.folds={len(people)} or less"
            )
        rows = np.arange(len(table.label))

        def leaves_all_classes(groups: Sequence[Ints]) -> bool:
            return all(_classes(table, np.setdiff1d(rows, group)) == len(table.classes) for group in groups)

        found = _groups(table, rows, folds, f"{seed}/outer", leaves_all_classes)
        if found is None:
            raise UserError(
                f"{section}.folds={folds}: people cannot be grouped so that those who are left to train on have all of "
                f"{', '.join(table.classes)}; a class is found in too few people"
            )
        tests = found
    return [_fold(table, str(number), test, val_folds, seed, section) for number, test in enumerate(tests)]


def _held_out(table: Table, section: str) -> Ints:
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


def _fold(table: Table, name: str, test: Ints, val_folds: int, seed: int, section: str) -> Fold:
    rest = np.setdiff1d(np.arange(len(table.label)), test)
    people = len(np.unique(table.person[rest]))
    if people < 2:
        raise UserError(f"fold {name} leaves {people} people to train and validate on; it takes at least 2")
    if inner := inner_splits(table, rest, val_folds, f"{seed}/inner/{name}"):
        return Fold(name, test, inner)
    raise UserError(
        f"fold {name}: its {people} people that are not tested cannot be grouped into a training and a validation part "
        f"that both have all of {', '.join(table.classes)}; a class is found in too few people: use fewer "
        f"{section}.folds, or a label that more people have"
    )


def inner_splits(table: Table, rest: Ints, val_folds: int, purpose: str) -> tuple[tuple[Ints, Ints], ...]:
    """Pairs (rows to train on, rows to validate on) of the rows ``rest``, as in `Fold`; empty if there are none."""

    def all_have_all_classes(groups: Sequence[Ints]) -> bool:
        parts = [*groups, *(np.setdiff1d(rest, group) for group in groups)]
        return all(_classes(table, part) == len(table.classes) for part in parts)

    # Fewer and therefore larger groups where a class is rare.
    for number in range(min(val_folds, len(np.unique(table.person[rest]))), 1, -1):
        groups = _groups(table, rest, number, purpose, all_have_all_classes)
        if groups is not None:
            return tuple((np.setdiff1d(rest, group), group) for group in groups)
    return ()


def labelled(table: Table, rest: Ints, fraction: float, purpose: str) -> Ints:
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


def _classes(table: Table, rows: Ints) -> int:
    return len(np.unique(table.label[rows]))


def _groups(
    table: Table, rows: Ints, number: int, purpose: str, fits: Callable[[Sequence[Ints]], bool]
) -> list[Ints] | None:
    """``rows`` in ``number`` groups of whole people; the first of some ways to do so that fits, None if none does."""
    for attempt in range(_ATTEMPTS):
        # Sorting the rows by a permutation of people makes the grouping independent of the order of storage.
        people = np.unique(table.person[rows])
        rank = permutation(len(people), "folds", purpose, attempt)
        order = np.lexsort((table.label[rows], rank[np.searchsorted(people, table.person[rows])]))
        mine = rows[order]
        way = StratifiedGroupKFold(number, shuffle=False)
        with warnings.catch_warnings():
            # It warns of classes rarer than groups, which is checked here in its own way.
            warnings.simplefilter("ignore", UserWarning)
            try:
                person = rank[np.searchsorted(people, table.person[mine])]
                groups = [np.sort(mine[test]) for _, test in way.split(mine, table.label[mine], person)]
            except ValueError:
                return None
        if all(len(group) for group in groups) and fits(groups):
            return groups
    return None


def permuted(table: Table, seed: int) -> Table:
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
