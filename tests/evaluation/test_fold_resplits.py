"""A resplit for each fold of a sweep: its test people are nowhere but in the test split."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from physio_dist import config
from physio_dist.config import FoldsConfig
from physio_dist.data.format.index import ShardSet, open_set
from physio_dist.data.format.people import split_of
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.errors import UserError
from physio_dist.evaluation.fold_resplits import fold_split, open_folds, write_fold_resplits
from tests.conftest import S3
from tests.evaluation.study_samples import facts_of, opened, paired

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Twelve people; the first has windows without the label too, the last has none with it."""
    url = str(tmp_path_factory.mktemp("folds") / "set")
    facts = facts_of(people=12, recordings=2, windows=2)
    for unlabelled in (facts[0], facts[3], *facts[-4:]):
        unlabelled["labels"] = {}
    paired(url, facts)
    return url


def options(data: str, *more: str) -> FoldsConfig:
    words = [f"tune.data={data}", "tune.task=eegmat", "tune.folds=4", "tune.val_folds=2", "run.seed=5", *more]
    return config.load(FoldsConfig, None, words)


def write(options: FoldsConfig, out: str) -> tuple[list[ShardSet], int]:
    return write_fold_resplits(options, opened(options.tune.data), out)


@pytest.mark.parametrize("more", [(), ("tune.protocol=loso",), ("split.val=0", "run.seed=6")])
def test_the_resplits_are_the_folds_of_the_sweep(data: str, tmp_path: Path, more: tuple[str, ...]) -> None:
    given = options(data, *more)
    resplits, written = write(given, str(tmp_path / "resplits"))
    handle = opened(data)
    table, folds = open_folds(given, handle)
    assert written == len(resplits) == len(folds) == (11 if given.tune.protocol == "loso" else 4)
    whole = handle.sample_table
    tested = []
    for resplit, fold in zip(resplits, folds, strict=True):
        assert resplit.url == f"{tmp_path}/resplits/{fold.name}" and resplit.made_by["view"]["fold"] == fold.name
        sample_table = read_sample_table(open_set(resplit.url))
        people = {code: set(sample_table.person[sample_table.split == code].tolist()) for code in range(3)}
        assert people[2] == set(table.person[fold.test].tolist())
        # Whole people, windows without the label among them.
        assert not people[0] & people[1] and not (people[0] | people[1]) & people[2]
        assert people[1] == {one for one in set(whole.person.tolist()) - people[2] if split_of(one, given.split.val, 0)}
        assert people[0] and set.union(*people.values()) == set(whole.person.tolist())
        tested += sorted(people[2])
        for name in ("person", "key", "waveform"):
            assert np.array_equal(getattr(sample_table, name), getattr(whole, name))
    # Everybody with the label is tested once, nobody without.
    assert sorted(tested) == np.unique(table.person).tolist() and len(tested) == 11


def test_the_same_options_give_the_same_bytes_and_others_are_refused(data: str, tmp_path: Path) -> None:
    first, _ = write(options(data), str(tmp_path / "a"))
    bytes_of = {path.relative_to(tmp_path / "a"): path.read_bytes() for path in (tmp_path / "a").rglob("*.*")}
    assert len(bytes_of) == 8
    write(options(data), str(tmp_path / "b"))
    assert {path.relative_to(tmp_path / "b"): path.read_bytes() for path in (tmp_path / "b").rglob("*.*")} == bytes_of
    assert write(options(data), str(tmp_path / "a")) == (first, 0)
    for more in ("run.seed=6", "split.val=0.5"):
        with pytest.raises(UserError, match=r"a resplit made from other data or options; choose another --out"):
            write(options(data, more), str(tmp_path / "a"))
    with pytest.raises(UserError, match=r"holds something else than these 3 resplits: 3; choose another --out"):
        write(options(data, "tune.folds=3"), str(tmp_path / "a"))
    # A sweep over a resplit is of the same people, and so are its folds.
    again, _ = write(options(first[2].url), str(tmp_path / "c"))
    assert [one.fingerprint for one in again] == [one.fingerprint for one in first]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("tune.protocol=holdout", "tune.protocol=holdout has no people who take turns"),
        ("tune.folds=13", "tune.folds=13: only 11 people have the label"),
        ("split.val=1", "split.val=1.0 leaves nobody to train on in fold 0; give less"),
        ("split.val=nan", "split.val=nan: it must lie between 0 and 1"),
        ("split.test=0.1", "unknown option 'split.test' (command line): did you mean 'split.val'?"),
        ("tune.label=tusk", "no window of"),
    ],
)
def test_what_no_resplits_can_be_made_of_is_told_and_nothing_is_written(
    data: str, tmp_path: Path, more: str, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        write(options(data, more), str(tmp_path / "resplits"))
    assert told in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "resplits").exists()


def test_who_is_held_out_does_not_depend_on_who_is_tested(data: str) -> None:
    sample_table = read_sample_table(open_set(data))
    people = np.unique(sample_table.person)
    plain = fold_split(sample_table, people[:0], 0.4)
    assert {0, 1} == set(plain.tolist())
    for tested in (people[:3], people[5:7]):
        mine = np.isin(sample_table.person, tested)
        split = fold_split(sample_table, tested, 0.4)
        assert (split[mine] == 2).all() and np.array_equal(split[~mine], plain[~mine])


def test_the_command_in_a_bucket(tmp_path: Path, s3_here: S3, cli: Cli) -> None:
    bucket = s3_here.bucket
    paired(f"{bucket}/data", facts_of(people=6))
    file = tmp_path / "sweep.yaml"
    file.write_text(f"tune: {{data: {bucket}/data, task: eegmat, folds: 3, val_folds: 2}}\n")
    env = {**s3_here.env, "HOME": str(tmp_path)}
    done = cli("folds", "--config", file, "--out", f"{bucket}/resplits", "split.val=0", env=env)
    assert done.returncode == 0 and done.stdout.startswith(f"resplits of {bucket}/data\n{bucket}/resplits/0: "), (
        done.stderr
    )
    assert "24 train, 0 val, 12 test" in done.stdout
    again = cli("folds", "--config", file, "--out", f"{bucket}/resplits", "split.val=0", env=env)
    assert again.returncode == 0 and "3 of 3 were there already" in again.stdout
    assert open_set(f"{bucket}/resplits/2").base_url == f"{bucket}/data"
