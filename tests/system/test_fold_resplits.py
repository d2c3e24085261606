"""Pretraining on a fold's resplit never sees the people the fold is tested on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from physio_dist.data.format.index import open_set
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.errors import UserError
from physio_dist.evaluation.backbones import open_backbone, refuse_overlap
from tests.evaluation.study_samples import facts_of, paired
from tests.system.launching import CONFIG, Run, physio


def test_pretraining_on_fold_resplit_never_sees_test_subjects(tmp_path: Path) -> None:
    paired(str(tmp_path / "data"), facts_of(people=9, recordings=2, windows=4), shard=12)
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text("run: {seed: 1}\ntune: {data: data, task: eegmat, folds: 3, val_folds: 2}\n")
    done = physio("folds", "--config", str(sweep), "--out", "resplits", "split.val=0.2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    resplit, cluster = f"{tmp_path}/resplits/1", ("--nodes", "1", "--gpus-per-node", "1")
    options = ("data.signal=eeg", "train.steps=8", "train.log_every=4")
    planned = physio("plan", "--config", CONFIG, *cluster, f"data.index={resplit}", "train.global_batch=16", *options)
    assert planned.returncode == 0, planned.stderr
    run = Run(tmp_path, "eeg-1", resplit, options)
    assert run(ranks=1, launcher="python") == 0, run.said()
    table = read_sample_table(open_set(resplit))
    keys = dict(zip(table.keys(np.arange(len(table.person))), table.person.tolist(), strict=True))
    seen = {keys[key] for batch in run.trace().values() for key in batch}
    of_split = [set(table.person[table.split == code].tolist()) for code in range(3)]
    # Two epochs and more: everybody who may be seen was.
    assert seen == of_split[0] and of_split[2] and not seen & of_split[2]
    encoder = f"{tmp_path}/runs/eeg-1/encoder"
    exported = physio("export", run.url, encoder)
    assert exported.returncode == 0, exported.stderr
    backbone = open_backbone(encoder, "eeg")
    assert backbone.people == of_split[0]
    refuse_overlap(backbone, of_split[2], "1")
    other = read_sample_table(open_set(f"{tmp_path}/resplits/0"))
    with pytest.raises(UserError, match=r"of fold 0: .*`physio-dist folds` makes a resplit"):
        refuse_overlap(backbone, np.unique(other.person[other.split == 2]).tolist(), "0")
