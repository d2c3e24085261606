"""Options of sweeps and of clusters."""

from __future__ import annotations

from pathlib import Path

import pytest

from physio_dist.config import FoldEncoders, PretrainConfig, TuneConfig, WorkerRange, load, to_yaml
from physio_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("tune.data=d", "tune.encoders.ecg=a", "tune.encoders.eeg=b", "tune.label=x")


def tune(*words: str, file: str | None = None) -> TuneConfig:
    return load(TuneConfig, file, [*NEEDED, *words])


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
        ("tune.encoders.ecg=3", "tune.encoders.ecg must be a folder or {fold: folder}, not 3"),
        ("tune.encoders.eeg={}", "tune.encoders.eeg must be a folder or {fold: folder}, not {}"),
        ("tune.encoders.emg=a", "unknown option 'tune.encoders.emg'"),
        ("tune.encoders=a", "tune.encoders must be {ecg: URL, eeg: URL}, not 'a'"),
        ("tune.encoders.eeg={0: 1}", "tune.encoders.eeg must be a folder or {fold: folder}, not {0: 1}"),
        ("search.pooling=[]", "search.pooling is empty"),
        ("search.pooling=[max]", "search.pooling=max: it must be one of mean, mean_std"),
        ("search.head=[]", "search.head is empty"),
        ("search.head=[concat,lat]", "search.head=lat: it must be one of concat, gated, cross_attention, late"),
        ("search.modality_dropout=[1.5]", "search.modality_dropout=1.5: it must lie between 0 and 1"),
        ("search.class_weight=[equal]", "search.class_weight=equal: it must be one of none, balanced"),
        ("tune.calibrate=perhaps", "tune.calibrate"),
        ("tune.noise_controls=true", "did you mean 'tune.noise_control'?"),
        ("search.depth=[-1]", "search.depth=-1: it must not be negative"),
        ("search.width=[0]", "search.width=0: it must be at least 1"),
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


@pytest.mark.parametrize(
    ("value", "urls", "differ"),
    [
        ("s3://b/eeg-{fold}/e", {"0": "s3://b/eeg-0/e", "1": "s3://b/eeg-1/e"}, True),
        ("/one", {"0": "/one", "1": "/one"}, False),
        ("{0: /a, '1': /b}", {"0": "/a", "1": "/b"}, True),
    ],
)
def test_encoders_parse_a_url_a_pattern_or_a_mapping_by_fold(value: str, urls: dict[str, str], differ: bool) -> None:
    encoders = tune(f"tune.encoders.eeg={value}").tune.encoders["eeg"]
    assert (encoders.urls(["0", "1"]), encoders.differ) == (urls, differ)


def test_encoders_parse_from_one_word_and_from_one_word_a_signal(tmp_path: Path) -> None:
    expected = {"ecg": FoldEncoders("a"), "eeg": FoldEncoders(by_fold={"0": "x"})}
    words = [NEEDED[0], NEEDED[3], "tune.encoders={ecg: a, eeg: {0: x}}"]
    assert load(TuneConfig, None, words).tune.encoders == expected
    file = tmp_path / "sweep.yaml"
    file.write_text(to_yaml(tune("tune.encoders.eeg={0: x}", *NEEDED[:2])))
    assert tune(file=str(file)).tune.encoders["eeg"] == FoldEncoders("b")
    assert load(TuneConfig, str(file), []).tune.encoders["ecg"] == FoldEncoders("a")


def test_label_is_none_for_an_empty_word() -> None:
    assert tune("tune.task=eegmat", "tune.label=").tune.label is None


def test_needed_options_of_a_sweep_are_asked_for() -> None:
    with pytest.raises(UserError, match=r"option tune.data is needed"):
        load(TuneConfig, None, NEEDED[1:])


@pytest.mark.parametrize(("given", "pair"), [("3", (3, 3)), ("[1, 4]", (1, 4)), ("[2,2]", (2, 2))])
def test_workers_are_a_number_or_a_range(given: str, pair: tuple[int, int]) -> None:
    options = load(PretrainConfig, None, ["data.index=x", f"cluster.workers={given}"])
    assert options.cluster.workers == WorkerRange(*pair)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("cluster.workers=0", "cluster.workers=0: it must be a number of ranks, or [min, max]"),
        ("cluster.workers=[3,2]", "cluster.workers=[3, 2]: it must be a number of ranks"),
        ("cluster.workers=[1,2,3]", "cluster.workers=[1, 2, 3]: it must be a number"),
        ("cluster.workers=true", "cluster.workers=True: it must be a number"),
        ("cluster.workers=many", "cluster.workers=many: it must be a number"),
        ("cluster.max_failures=-1", "cluster.max_failures=-1: it must not be negative"),
        ("cluster.cpus_per_worker=0", "cluster.cpus_per_worker=0.0: it must be a positive number"),
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
        load(PretrainConfig, None, ["data.index=x", word])
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("written", "meant"),
    [("true", True), ("false", False), ("no", False), ("'true'", True), ("auto", None)],
)
def test_gpus_are_asked_for_in_a_file_as_on_the_command_line(tmp_path: Path, written: str, meant: bool | None) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(f"data: {{index: x}}\ncluster: {{gpu: {written}}}\n")
    options = load(PretrainConfig, str(file), [])
    assert options.cluster.gpu is meant


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "pretrain").glob("*.yaml")), ids=lambda file: file.name)
def test_configurations_of_pretraining_load(file: Path) -> None:
    load(PretrainConfig, str(file), ["data.index=x"])


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "tune").glob("*.yaml")), ids=lambda file: file.name)
def test_configurations_of_sweeps_load(file: Path) -> None:
    load(TuneConfig, str(file), ["tune.data=d", "tune.encoders.ecg=a", "tune.encoders.eeg=b"])
