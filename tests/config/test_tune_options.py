"""Options of sweeps and of clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from physio_dist.config import PretrainConfig, TuneConfig, check_pretrain, check_tune, cluster, load
from physio_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("tune.data=d", "tune.ecg_encoder=a", "tune.eeg_encoder=b", "tune.label=x")


def tune(*words: str, file: str | None = None) -> TuneConfig:
    return load(TuneConfig, file, [*NEEDED, *words], check_tune)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("tune.task=dremer", "tune.task=dremer: it must be one of labels, eegmat"),
        ("tune.protocol=kfold", "tune.protocol=kfold: it must be one of grouped_kfold, loso, holdout, clip"),
        ("tune.protocol=leaky", "tune.protocol=leaky: it must be one of"),
        ("tune.neutral=middle", "tune.neutral=middle: it must be one of high, low, drop"),
        ("tune.baseline=subtract", "tune.baseline=subtract is for tune.task=dreamer"),
        ("tune.scheduler=none", "tune.scheduler=none: it must be one of asha, fifo"),
        ("tune.search=tpe", "tune.search=tpe: it must be one of latin_hypercube, optuna"),
        ("tune.finetune_epochs=0", "tune.finetune_epochs=0: it must be at least 1"),
        ("tune.finetune_lr=0", "tune.finetune_lr=0.0: it must be a positive number"),
        ("tune.label=", "tune.task=labels needs tune.label"),
        ("tune.folds=1", "tune.folds=1: it must be at least 2"),
        ("tune.val_folds=1", "tune.val_folds=1: it must be at least 2"),
        ("tune.trials=0", "tune.trials=0: it must be at least 1"),
        ("tune.ensemble_size=0", "tune.ensemble_size=0: it must be at least 1"),
        ("tune.ensemble_size=33", "tune.ensemble_size=33: only tune.trials=32 configurations are tried"),
        ("tune.max_epochs=0", "tune.max_epochs=0: it must be at least 1"),
        ("tune.permutations=-1", "tune.permutations=-1: it must be at least 0"),
        ("tune.cpus=0", "tune.cpus=0.0: it must be positive"),
        ("tune.ecg_encoder=3", "tune.ecg_encoder must be a folder or {fold: folder}, not 3"),
        ("tune.eeg_encoder={}", "tune.eeg_encoder must be a folder or {fold: folder}, not {}"),
        ("tune.eeg_encoder={0: 1}", "tune.eeg_encoder must be a folder or {fold: folder}, not {0: 1}"),
        ("search.pooling=[]", "search.pooling is empty"),
        ("search.pooling=[max]", "search.pooling=max: it must be one of mean, mean_std"),
        ("search.head=[]", "search.head is empty"),
        ("search.head=[concat,lat]", "search.head=lat: it must be one of concat, gated, cross_attention, late"),
        ("search.modality_dropout=[1.5]", "search.modality_dropout=1.5: it must lie between 0 and 1"),
        ("search.class_weight=[equal]", "search.class_weight=equal: it must be one of none, balanced"),
        ("tune.calibrate=perhaps", "tune.calibrate"),
        ("tune.noise_controls=true", "did you mean 'tune.noise_control'?"),
        ("search.depth=[-1]", "search.depth must not be negative"),
        ("search.width=[0]", "search.width and search.components must be at least 1"),
        ("search.dropout=[1.0]", "search.dropout=1.0: it must lie between 0 and 0.9"),
        ("search.lr=[0.1]", "search.lr=[0.1]: it must be [low, high]"),
        ("search.lr=[0.1,0.01]", "search.lr=[0.1, 0.01]: it must be [low, high]"),
        ("search.weight_decay=[0.0,1.0]", "search.weight_decay=[0.0, 1.0]: it must be [low, high]"),
        ("tune.trails=3", "unknown option 'tune.trails' (command line): did you mean 'tune.trials'?"),
        ("run.name=a/b", "run.name='a/b': it must be a plain folder name"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_told_in_one_line(word: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        tune(word)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_encoders_are_a_folder_or_one_for_each_fold() -> None:
    assert tune("tune.eeg_encoder={0: s3://b/x, 1: y}").tune.eeg_encoder == {0: "s3://b/x", 1: "y"}
    assert tune("tune.task=eegmat", "tune.label=").tune.label is None


def test_needed_options_of_a_sweep_are_asked_for() -> None:
    with pytest.raises(UserError, match=r"option tune.data is needed"):
        load(TuneConfig, None, NEEDED[1:], check_tune)


@pytest.mark.parametrize(("given", "pair"), [("3", (3, 3)), ("[1, 4]", (1, 4)), ("[2,2]", (2, 2))])
def test_workers_are_a_number_or_a_range(given: str, pair: tuple[int, int]) -> None:
    options = load(PretrainConfig, None, ["data.index=x", f"cluster.workers={given}"], check_pretrain)
    assert cluster.workers(options.cluster) == pair


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("cluster.workers=0", "cluster.workers=0: it must be a number of ranks, or [min, max]"),
        ("cluster.workers=[3,2]", "cluster.workers=[3, 2]: it must be a number of ranks"),
        ("cluster.workers=[1,2,3]", "cluster.workers=[1, 2, 3]: it must be a number"),
        ("cluster.workers=true", "cluster.workers=True: it must be a number"),
        ("cluster.workers=many", "cluster.workers=many: it must be a number"),
        ("cluster.max_failures=-1", "cluster.max_failures=-1: it must not be negative"),
        ("cluster.cpus_per_worker=0", "cluster.cpus_per_worker=0: it must be a positive number"),
        ("cluster.cpus_per_worker=.inf", "cluster.cpus_per_worker=inf: it must be a positive number"),
        ("cluster.resize_s=.nan", "cluster.resize_s=nan: it must be a positive number"),
        ("cluster.resize_s=.inf", "cluster.resize_s=inf: it must be a positive number"),
        ("cluster.placement_timeout_s=-1", "cluster.placement_timeout_s=-1.0: it must lie between 0 and 1e+06"),
        ("cluster.placement_timeout_s=.nan", "cluster.placement_timeout_s=nan: it must lie between 0 and 1e+06"),
        ("cluster.placement_timeout_s=.inf", "cluster.placement_timeout_s=inf: it must lie between 0 and 1e+06"),
        ("cluster.gpu=maybe", "cluster.gpu=maybe: it must be one of auto, true, false"),
    ],
)
def test_what_is_wrong_with_a_cluster_is_told_in_one_line(word: str, told: str) -> None:
    with pytest.raises(UserError) as caught:
        load(PretrainConfig, None, ["data.index=x", word], check_pretrain)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("true", "true"), ("false", "false"), ("no", "false"), ("'true'", "true"), ("auto", "auto")],
)
def test_gpus_are_asked_for_in_a_file_as_on_the_command_line(tmp_path: Path, written: str, meant: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"data: {{index: x}}\ncluster: {{gpu: {written}}}\n")
    options = load(PretrainConfig, str(file), [], check_pretrain)
    assert cluster.gpu(options.cluster) == meant


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "pretrain").glob("*.yaml")), ids=lambda file: file.name)
def test_configurations_of_pretraining_load(file: Path) -> None:
    load(PretrainConfig, str(file), ["data.index=x"], check_pretrain)


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "tune").glob("*.yaml")), ids=lambda file: file.name)
def test_configurations_of_sweeps_load(file: Path) -> None:
    load(TuneConfig, str(file), ["tune.data=d", "tune.ecg_encoder=a", "tune.eeg_encoder=b"], check_tune)
