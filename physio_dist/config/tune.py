"""Options of ``tune.py`` and of ``physio-dist folds``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from physio_dist.config.cache import CacheOptions
from physio_dist.config.cluster import MAX_WAIT_S
from physio_dist.config.options import POSITIVE, ChangeUrl, OneOf, Range, at_least, inside, one_url, option
from physio_dist.config.pretrain import RunOptions
from physio_dist.config.search import SearchOptions
from physio_dist.config.task import TaskOptions
from physio_dist.errors import UserError, nearest

SIGNALS = ("ecg", "eeg")
_FOLD = "{fold}"


@dataclass(frozen=True)
class FoldEncoders:
    """URL of the frozen encoder that each fold takes for one signal.

    Attributes:
        url: of all folds, with ``{fold}`` for the fold's name; empty if ``by_fold`` lists them.
        by_fold: fold's name -> URL.
    """

    url: str = ""
    by_fold: Mapping[str, str] = field(default_factory=dict)

    @property
    def differ(self) -> bool:
        """True if folds may take different encoders."""
        return not self.url or _FOLD in self.url

    def urls(self, folds: Sequence[str]) -> dict[str, str]:
        """Fold's name -> URL, for the given folds, or for those listed."""
        return {name: self.url.replace(_FOLD, name) for name in folds} if self.url else dict(self.by_fold)

    def map(self, change: Callable[[str], str]) -> FoldEncoders:
        """A copy with every URL changed."""
        return FoldEncoders(
            change(self.url) if self.url else "", {fold: change(url) for fold, url in self.by_fold.items()}
        )


def parse_encoders(name: str, value: Any) -> dict[str, FoldEncoders]:
    """Encoders by signal from ``{ecg: URL, eeg: URL}``, each value a URL or ``{fold: URL}``.

    Raises:
        UserError: a value of another form, or an unknown signal.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be {{ecg: URL, eeg: URL}}, not {value!r}")
    encoders = {}
    for signal, urls in value.items():
        if signal not in SIGNALS:
            raise UserError(f"unknown option '{name}.{signal}': {nearest(str(signal), SIGNALS)}")
        each = list(urls.values()) if isinstance(urls, Mapping) else [urls]
        if not each or not all(isinstance(url, str) and url for url in each):
            raise UserError(f"{name}.{signal} must be a folder or {{fold: folder}}, not {urls!r}")
        by_fold = isinstance(urls, Mapping)
        encoders[str(signal)] = (
            FoldEncoders(by_fold={str(fold): url for fold, url in urls.items()}) if by_fold else FoldEncoders(urls)
        )
    return encoders


def _plain_encoders(encoders: Mapping[str, FoldEncoders]) -> dict[str, Any]:
    return {signal: each.url or dict(each.by_fold) for signal, each in encoders.items()}


def _encoder_urls(encoders: Mapping[str, FoldEncoders], change: ChangeUrl) -> dict[str, FoldEncoders]:
    return {signal: each.map(functools.partial(change, key=f".{signal}")) for signal, each in encoders.items()}


@dataclass
class TuneOptions(TaskOptions):
    """A sweep: data, encoders, trials."""

    data: str = option("", "Shard set with both signals and labels.", required=True, urls=one_url)
    encoders: dict[str, FoldEncoders] = option(
        {},
        "`{ecg: URL, eeg: URL}`: folders that `physio-dist export` wrote, with `{fold}` for the fold's name, or "
        "`{fold: URL}`; for EEG also a CBraMod checkpoint, or `cbramod`.",
        parse=parse_encoders, plain=_plain_encoders, urls=_encoder_urls,
    )  # fmt: skip
    trials: int = option(32, "Configurations that are tried, for each kind of input.", at_least(1))
    search: str = option(
        "latin_hypercube",
        "`latin_hypercube` samples all configurations beforehand; `optuna` suggests them by earlier results, for each "
        "row and fold.",
        OneOf(("latin_hypercube", "optuna")),
    )
    scheduler: str = option(
        "asha", "`asha` stops trials that fall behind; `fifo` lets every trial finish.", OneOf(("asha", "fifo"))
    )
    max_epochs: int = option(40, "Most epochs of a trial.", at_least(1))
    ensemble_size: int = option(
        1,
        "Configurations that each fold selects, best first, whose probabilities are averaged at the test.",
        at_least(1),
    )
    cpus: float = option(
        1.0, "CPUs of a trial.", Range(0.0, float("inf"), "it must be positive", open_low=True, open_high=True)
    )
    placement_timeout_s: float = option(
        0.0, "Seconds to wait for nodes that an autoscaler may add if there is no room for a trial at first.",
        inside(0.0, MAX_WAIT_S),
    )  # fmt: skip
    ray_storage: str = option("", "Folder of Ray Tune's own state; empty for `run.dir/run.name/ray`.", urls=one_url)
    feature_cache: str = option(
        "",
        "Folder of frozen features, for this sweep and later ones; empty for `run.dir/features`.",
        urls=one_url,
    )
    permutations: int = option(
        0, "Evaluations with labels permuted by recording within subjects, as a control for leakage.", at_least(0)
    )
    calibrate: bool = option(False, "Fit the temperature of each head's probabilities on its validation subjects.")
    noise_control: bool = option(
        False, "Add rows with one modality replaced by noise, which should gain nothing over the other alone."
    )
    finetune: bool = option(False, "Add a row with both encoders and a linear head trained end to end.")
    finetune_epochs: int = option(5, "Most epochs of that row.", at_least(1))
    finetune_lr: float = option(1e-4, "Learning rate of that row's encoders; the head's is ten times that.", POSITIVE)

    def validate(self) -> None:
        """Refuse options that do not go together."""
        super().validate()
        if not self.data:
            raise UserError("tune.data is empty: give the URL of a shard set with ECG and EEG")
        if self.ensemble_size > self.trials:
            raise UserError(
                f"tune.ensemble_size={self.ensemble_size}: only tune.trials={self.trials} configurations are tried"
            )


@dataclass
class TuneConfig:
    """Options of ``tune.py`` and of ``physio-dist folds``."""

    run: RunOptions = field(default_factory=lambda: RunOptions(name="sweep"))
    data: CacheOptions = field(default_factory=CacheOptions)
    tune: TuneOptions = field(default_factory=TuneOptions)
    search: SearchOptions = field(default_factory=SearchOptions)

    def validate(self) -> None:
        """Refuse options that do not go together.

        Raises:
            UserError: names the option.
        """
        self.tune.validate()
        for signal in SIGNALS:
            if signal not in self.tune.encoders:
                name = f"tune.encoders.{signal}"
                raise UserError(f"option {name} is needed and has no default: give {name}=...")


# Protocols in which subjects take turns as test subjects, and nobody trains in a fold that tests them.
_TURNS = ("grouped_kfold", "loso", "person_and_clip")


@dataclass
class FoldSplitOptions:
    """Subjects held out of pretraining beside the test subjects."""

    val: float = option(0.1, "Share of the subjects not tested in the validation split.", inside(0.0, 1.0))


@dataclass
class FoldsConfig(TuneConfig):
    """Options of ``physio-dist folds``: a sweep's, whose encoders need not exist yet, and ``split.val``."""

    split: FoldSplitOptions = field(default_factory=FoldSplitOptions)

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
