"""Options: defaults, then the file, then the command line; and whatever is wrong is named with its option."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from physio_dist import config
from physio_dist.config import PretrainConfig, Resume, ShardConfig, ShardSource, load
from physio_dist.config.loader import option_types
from physio_dist.errors import UserError

INDEX = "data.index=s3://b/set"


def pretrain(*words: str, file: Path | None = None) -> PretrainConfig:
    return load(PretrainConfig, str(file) if file else None, words)


@pytest.fixture()
def yaml(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(text: str | bytes) -> Path:
        path = tmp_path / "job.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_later_layers_win(yaml: Callable[[str], Path]) -> None:
    file = yaml("train: {steps: 7, lr: 1e-3}\ndata:\n  index: a\nrun: {name: fromfile}\n")
    made = pretrain("train.steps=9", "run.name=x", "run.name=y", file=file)
    assert (made.train.steps, made.train.lr, made.data.index, made.run.name) == (9, 1e-3, [ShardSource("a")], "y")
    assert made.train.global_batch == config.TrainOptions().global_batch
    assert pretrain(INDEX) == replace(PretrainConfig(), data=config.DataOptions(index=[ShardSource("s3://b/set")]))


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("run.name=007", "007"), ("run.name=1e-3", "1e-3"), ("run.name=on", "on"),
        ("run.name=2021-01-01", "2021-01-01"),
        ("run.name=a=b", "a=b"), ("run.name=null", "null"), ("data.cache_dir=/a b/#c", "/a b/#c"),
        ("train.lr=1e-3", 1e-3), ("train.lr=1", 1.0),
        ("train.log_sample_keys=true", True), ("train.log_sample_keys=no", False),
        ("resume=none", "none"),
        ("run.seed=12", 12), ("data.index=3.tar", "3.tar"),
    ],
)  # fmt: skip
def test_words_keep_their_meaning(word: str, value: object) -> None:
    found = config.flatten(pretrain(INDEX, word))[word.split("=")[0]]
    assert found == value
    assert type(found) is type(value)


def test_nothing_and_null_are_none_only_where_an_option_may_be() -> None:
    for text in ("", "null"):
        assert load(ShardConfig, None, [f"labels={text}"]).labels is None
    assert load(ShardConfig, None, ["labels=nullable.csv"]).labels == "nullable.csv"
    assert load(ShardConfig, None, ["leads="]).leads == ""


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train.stepz=3"], "unknown option 'train.stepz' (command line): did you mean 'train.steps'?"),
        (["trian.steps=3"], "unknown option 'trian.steps' (command line): did you mean 'train.steps'?"),
        (["steps=3"], "unknown option 'steps' (command line)"),
        (["data=x"], "unknown option 'data' (command line)"),
        (["data.index[0].url=x"], "unknown option 'data.index[0].url' (command line): did you mean 'data.index'?"),
        (["train.steps=abc"], "option train.steps (command line): Value 'abc' of type 'str' could not be converted"),
        (["train.steps=1.5"], "option train.steps (command line): Value '1.5' of type 'float' could not be converted"),
        (["train.log_sample_keys=maybe"], "train.log_sample_keys (command line): Value 'maybe' is not a valid bool"),
        (["train.steps=[1"], "option train.steps=[1 is not valid YAML"),
        (["train.steps"], "option 'train.steps' is not of the form key=value"),
        (["=3"], "option '=3' is not of the form key=value"),
        (["run.name=${nope}"], "option run.name: Interpolation key 'nope' not found"),
        (["run.name=${oc.env:NOPE}"], "Environment variable 'NOPE' not found"),
        (["run.name=a/b"], "run.name='a/b': it must be a plain folder name"),
        (["run.name="], "run.name='': it must be a plain folder name"),
        (["run.name=.x"], "run.name='.x': it must be a plain folder name"),
        (["model.preset=bse"], "model.preset=bse: it must be one of tiny, base, large, xl"),
        (["train.precision=fp8"], "train.precision=fp8: it must be one of fp32, bf16, fp16"),
        (["data.signal=emg"], "data.signal=emg: it must be one of ecg, eeg"),
        (["zero.stage=4"], "zero.stage=4: ZeRO has the stages 0, 1, 2 and 3"),
        (["mask.intra_ratio=1"], "mask.intra_ratio=1.0: it must be at least 0 and below 1"),
        (["mask.inter_ratio=-0.1"], "mask.inter_ratio=-0.1: it must be at least 0 and below 1"),
        (["mask.inter_ratio=nan"], "mask.inter_ratio=nan: it must be at least 0 and below 1"),
        (["mask.intra_ratio=0", "mask.inter_ratio=0"], "mask.intra_ratio and mask.inter_ratio are both 0"),
        (["mask.mode=alternating", "mask.intra_ratio=0"], "mask.mode=alternating needs"),
        (["mask.lead_dropout=0.5", "mask.intra_ratio=0"], "mask.lead_dropout needs mask.intra_ratio above 0"),
        (["mask.mode=bth"], "mask.mode=bth: it must be one of both, alternating; did you mean 'both'?"),
        (["mask.span=-1"], "mask.span=-1.0: it must lie between 0"),
        (["mask.lead_dropout=2"], "mask.lead_dropout=2.0: it must lie between 0 and 1"),
        (["mask.lead_dropout=0.5", "data.signal=eeg"], "mask.lead_dropout=0.5 is for data.signal=ecg"),
        (["model.dropout=1"], "model.dropout=1.0: it must lie between 0 and 0.9"),
        (["train.global_batch=0"], "train.global_batch=0: it must be at least 1"),
        (["train.keep_checkpoints=0"], "train.keep_checkpoints=0: it must be at least 1"),
        (["train.lr=0"], "train.lr=0.0: it must be a positive number"),
        (["train.lr=inf"], "train.lr=inf: it must be a positive number"),
        (["train.weight_decay=nan"], "train.weight_decay=nan: it must not be negative"),
        (["train.warmup_steps=-1"], "train.warmup_steps=-1: it must not be negative"),
        (["train.beta2=1"], "train.beta2=1.0: it must be at least 0 and below 1"),
        (["train.max_grad_norm=nan"], "train.max_grad_norm=nan: it must be positive"),
        (["data.cache_gb=0"], "data.cache_gb=0.0: it must be positive"),
        (["data.index=[]"], "data.index must be a URL or a list of {url: ..., weight: ...}, not []"),
        (["data.index=[a]"], "this entry is not: 'a'"),
        (["data.index=[{url: a, wight: 1}]"], "this entry is not: {'url': 'a', 'wight': 1}"),
        (["data.index=[{url: a, weight: 0}]"], "the weight of a must be a positive number, not 0"),
        (["data.index=[{url: a, weight: true}]"], "the weight of a must be a positive number, not True"),
        (["data.index=[{url: a, weight: .inf}]"], "the weight of a must be a positive number, not inf"),
        (["data.index=[{url: a"], "is not valid YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_on_the_command_line_is_named_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        pretrain(INDEX, *words)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train: {stepz: 3}", "unknown option 'train.stepz' ({}): did you mean 'train.steps'?"),
        ("trian: {steps: 3}", "unknown option 'trian' ({}): did you mean 'train'?"),
        ("1: 2", "unknown option '1' ({}): known: cluster, data, mask, model"),
        ("words without meaning", "unknown option 'words without meaning' ({})"),
        ("- a\n- b", "{} must hold options by name, not a list"),
        ("train: 3", "{}: train must hold options by name, not 3"),
        ("train: [a]", "{}: train must hold options by name, not ['a']"),
        ("a: [1", "{} is not valid YAML"),
        ("train: {steps: 3}\ntrain: {lr: 1}", "found duplicate key train"),
        ("a\tb:\n\t- c", "{} is not valid YAML"),
        (b"\xff\xfe\x00", "{} is not a text file"),
        ("train: {steps: many}", "option train.steps ({}): Value 'many'"),
        ("run: {name: null}", "option run.name ({}): Incompatible value 'None'"),
        ("data: {index: '???'}", "option data.index is needed and has no default: give data.index=..."),
        ("", "option data.index is needed"),
        ("# only a comment\n", "option data.index is needed"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_the_file(
    yaml: Callable[[str | bytes], Path], text: str | bytes, told: str
) -> None:
    file = yaml(text)
    with pytest.raises(UserError) as caught:
        pretrain(file=file)
    assert told.format(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sections_without_a_line_left_keep_their_defaults(yaml: Callable[[str], Path]) -> None:
    assert pretrain(INDEX, file=yaml("train:\n  # steps: 5\n")) == pretrain(INDEX)


def test_a_file_that_is_missing_or_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"configuration file .*no\.yaml does not exist"):
        pretrain(file=tmp_path / "no.yaml")
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        pretrain(file=tmp_path)


def test_an_index_may_be_a_mixture(yaml: Callable[[str], Path]) -> None:
    file = yaml("data:\n  index:\n  - {url: s3://b/x/index.json, weight: 2}\n  - url: y/\n")
    assert pretrain(file=file).data.index == [("s3://b/x", 2.0), ("y", 1.0)]
    assert pretrain("data.index=[{url: a, weight: 0.5}]").data.index == [("a", 1.0)]  # a single set's has no effect
    assert pretrain("data.index=/a/index.json").data.index == [("/a", 1.0)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["unusable=dorp"], "unusable=dorp: it must be one of keep, drop"),
        (["missing_channels=drop"], "missing_channels=drop: it must be one of reject, mask"),
        (["split.val=1.5"], "split.val=1.5: it must lie between 0 and 1"),
        (["split.val=0.7", "split.test=0.6"], "split.val and split.test add up to more than 1"),
        (["workers=-1"], "workers must not be negative"),
        (["samples_per_shard=0"], "samples_per_shard must be at least 1"),
        (["person=who"], "person=who names a column of a CSV: give labels=FILE.csv too"),
        (["window.rat=100"], "unknown option 'window.rat' (command line): did you mean 'window.rate'?"),
    ],
)
def test_options_that_no_conversion_could_use_are_refused(words: list[str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        load(ShardConfig, None, words)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [["window.seconds=0"], ["window.seconds=inf"], ["window.seconds=nan"], ["window.rate=0"], ["window.seconds=0.0033"],
     ["window.low=50"], ["window.high=100"], ["window.low=nan"], ["window.uv_per_bit=0"]],
)  # fmt: skip
def test_windows_that_make_no_sense_are_refused_before_anything_is_read(words: list[str]) -> None:
    from physio_dist.data.convert.converter import plan_job

    with pytest.raises(UserError, match=r"has to be|have to be|is no whole number|has to rise"):
        plan_job("wfdb", "/nowhere", load(ShardConfig, None, words))


def test_every_option_has_a_name_and_a_type() -> None:
    types = option_types(PretrainConfig)
    assert types["train.lr"] is float
    assert types["data.index"] is Any
    for schema in (PretrainConfig, ShardConfig):
        assert set(option_types(schema)) == set(config.option_fields(schema)) == set(config.flatten(schema()))


plain = st.text("abcXYZ01 .:#-_'\"{}[]é\\~", min_size=1, max_size=12)
# What a set of that URL is called once it is parsed.
urls = plain.filter(lambda x: x != "???" and not x.endswith("/"))
configs = st.builds(
    PretrainConfig,
    run=st.builds(
        config.RunOptions, name=plain.filter(lambda x: x[0] != "."), dir=plain, seed=st.integers(-(2**62), 2**62)
    ),
    data=st.builds(
        config.DataOptions,
        index=st.one_of(
            st.builds(lambda url: [ShardSource(url)], urls),
            st.lists(st.builds(ShardSource, urls, st.floats(1e-6, 1e6)), min_size=2, max_size=3),
        ),
        cache_gb=st.floats(1e-9, 1e300),
    ),
    train=st.builds(
        config.TrainOptions, lr=st.floats(1e-300, 1.0), log_sample_keys=st.booleans(), steps=st.integers(1, 2**40)
    ),
)  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(configs)
@pytest.mark.parametrize("special", ["null", "007", "1e3", "on", "- x", "a: b", "~"])
def test_resolved_options_read_back_as_they_were(tmp_path: Path, special: str, options: PretrainConfig) -> None:
    options.resume = Resume(url=special)
    file = tmp_path / "resolved.yaml"
    file.write_text(config.to_yaml(options))
    assert pretrain(file=file) == options
    assert math.isfinite(options.train.lr)
