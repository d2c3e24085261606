"""The folds of a sweep, and for each a resplit of its shard set with the fold's test people as test split."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from physio_dist import storage
from physio_dist.config import TuneConfig
from physio_dist.config.options import inside, option
from physio_dist.data.format.index import SPLITS, ShardSet
from physio_dist.data.format.people import split_of
from physio_dist.data.format.resplit import publish_resplits, with_splits
from physio_dist.data.format.sample_table import SampleTable
from physio_dist.data.handle import ShardSetHandle
from physio_dist.errors import UserError
from physio_dist.evaluation.label_table import LabelTable, label_name, load_label_table, require_paired
from physio_dist.evaluation.splits import Fold, folds_of

# Protocols in which people take turns as test people, and nobody trains in a fold that tests them.
_TURNS = ("grouped_kfold", "loso", "person_and_clip")


@dataclass
class SplitOptions:
    """Subjects held out of pretraining beside the test subjects."""

    val: float = option(0.1, "Share of the subjects not tested in the validation split.", inside(0.0, 1.0))


@dataclass
class FoldsConfig(TuneConfig):
    """Options of ``physio-dist folds``: a sweep's, whose encoders need not exist yet, and ``split.val``."""

    split: SplitOptions = field(default_factory=SplitOptions)

    def validate(self) -> None:
        """Refuse options of which no resplits could be made.

        Raises:
            UserError: names the option.
        """
        self.tune.validate()
        if self.tune.protocol not in _TURNS:
            raise UserError(
                f"tune.protocol={self.tune.protocol} has no people who take turns, so there is nothing to make a "
                f"resplit for each of; it takes {', '.join(_TURNS)}. Under holdout the test people are the shard set's "
                "own test split: pretrain on tune.data itself"
            )


def open_folds(options: TuneConfig, data: ShardSetHandle) -> tuple[LabelTable, tuple[Fold, ...]]:
    """Labelled windows and folds of a sweep.

    Raises:
        UserError: the set is not paired, lacks the label, or has too few people for the folds.
        DataError: it is damaged.
    """
    tune = options.tune
    require_paired(data.index)
    table = load_label_table(
        data, tune.task, tune.label, neutral=tune.neutral, clip=tune.clip_name, baseline=tune.baseline != "none"
    )
    return table, tuple(folds_of(table, tune.protocol, tune.folds, tune.val_folds, options.run.seed))


def fold_split(samples: SampleTable, tested: npt.NDArray[np.uint64], val: float) -> npt.NDArray[np.uint8]:
    """Split of a fold's resplit: uint8 ``[sample]``, position in ``SPLITS``.

    All windows of the people ``tested`` are test windows, with or without the label. A share ``val`` of the others is
    held out, by hash: whoever is not tested is in the same split in every fold.
    """
    people, owner = np.unique(samples.person, return_inverse=True)
    split = np.array([split_of(int(person), val, 0.0) for person in people], dtype=np.uint8)
    split[np.isin(people, tested)] = SPLITS.index("test")
    return split[owner]


def write_fold_resplits(options: FoldsConfig, data: ShardSetHandle, out: str) -> tuple[list[ShardSet], int]:
    """Write a resplit for each fold of a sweep to ``out/0``, ``out/1``, ...: under the names of the sweep's folds.

    Returns:
        The resplits, and how many of them were written now.

    Raises:
        UserError: as :func:`open_folds`; ``out`` holds something else; nobody is left to train on.
        DataError: the set is damaged.
    """
    out, tune = storage.absolute(out), options.tune
    table, folds = open_folds(options, data)
    about = {
        "protocol": tune.protocol, "folds": len(folds), "task": tune.task, "label": label_name(tune.task, tune.label),
        "seed": options.run.seed, "split.val": options.split.val, "set": data.index.fingerprint,
    }  # fmt: skip
    resplits = []
    for fold in folds:
        split = fold_split(data.sample_table, np.unique(table.person[fold.test]), options.split.val)
        if not (split == SPLITS.index("train")).any():
            raise UserError(f"split.val={options.split.val} leaves nobody to train on in fold {fold.name}; give less")
        url = storage.join(out, fold.name)
        resplits.append(with_splits(data.index, data.sample_table, split, url, {"fold": fold.name, **about}))
    return [resplit for resplit, _ in resplits], publish_resplits(resplits, out)
