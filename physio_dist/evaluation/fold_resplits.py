"""The folds of a sweep, and for each a resplit of its shard set with the fold's test people as test split."""

from __future__ import annotations

import numpy as np

from physio_dist import storage
from physio_dist.config import FoldsConfig, TuneConfig
from physio_dist.data.format.index import SPLITS, ShardSet
from physio_dist.data.format.people import split_of
from physio_dist.data.format.resplit import publish_resplits, with_splits
from physio_dist.data.format.sample_table import SampleTable
from physio_dist.data.handle import ShardSetHandle
from physio_dist.errors import UserError
from physio_dist.evaluation.label_table import LabelTable, label_name, load_label_table, require_paired
from physio_dist.evaluation.splits import Fold, folds_of
from physio_dist.runtime.arrays import UInt8Array, UInt64Array


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


def fold_split(samples: SampleTable, tested: UInt64Array, val: float) -> UInt8Array:
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
