"""Options of ``physio-dist probe``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from physio_dist.config.cache import CacheOptions
from physio_dist.config.options import POSITIVE, OneOf, at_least, inside, option
from physio_dist.config.pretrain import RunOptions
from physio_dist.config.search import POOLINGS
from physio_dist.errors import UserError

MASKS = ("chest", "chest_lead", "limb", "time")


def _parse_runs(name: str, value: Any) -> list[str]:
    runs = value if isinstance(value, list) else [value] if value else []
    if not all(isinstance(run, str) and run for run in runs):
        raise UserError(f"{name} must be the folder run.dir/run.name of a run, or a list of them, not {value!r}")
    return [run.rstrip("/") for run in runs]


@dataclass
class ProbeOptions:
    """Task, data and protocol of a probe."""

    task: str = option(
        "labels",
        "`labels`: a linear probe of a label; `reconstruction`: hidden leads and patches against simple predictors.",
        OneOf(("labels", "reconstruction")),
    )
    data: str = option("", "A shard set.", required=True)
    encoder: str = option(
        "", "For `labels`: an export's folder, or a CBraMod checkpoint (`.pth` or `.safetensors`) by URL."
    )
    label: str = option("", "For `labels`: name of a label of the shard set.")
    protocol: str = option(
        "grouped_kfold", "`holdout` tests on the shard set's test split.", OneOf(("grouped_kfold", "holdout"))
    )
    folds: int = option(5, "Number of folds.", at_least(2))
    val_folds: int = option(
        3, "Groups of training subjects that take turns as validation subjects, on whom C is chosen.", at_least(2)
    )
    seeds: int = option(
        3, "Repetitions: of the split, of who is labelled, of the untrained encoder's weights.", at_least(1)
    )
    fractions: list[float] = option(
        [0.01, 0.1, 1.0], "Shares of the training subjects whose labels are used.", inside(1e-6, 1.0)
    )
    pooling: str = option(
        "channels_mean_std", "Pooling over patches, with channels averaged or kept apart.", OneOf(POOLINGS)
    )
    feature_cache: str = option(
        "", "Folder of frozen features, for this probe and later ones; empty for `run.dir/features`."
    )
    finetune: bool = option(
        False, "Also train encoder and head end to end, from the pretrained and from the untrained weights."
    )
    epochs: int = option(10, "Most epochs of that.", at_least(1))
    lr: float = option(1e-4, "Learning rate of that.", POSITIVE)
    batch: int = option(32, "Windows of a batch of that.", at_least(1))
    runs: list[str] = option(
        [], "For `reconstruction`: a pretraining run, or a list of runs that differ in their seed.", parse=_parse_runs
    )
    split: str = option(
        "test",
        "Split that is reconstructed; the ridge regression is fitted on `train`.",
        OneOf(("val", "test")),
    )
    masks: list[str] = option(
        list(MASKS),
        "`chest`: all V leads from the others; `chest_lead`: each V lead from all others; `limb`: five limb leads from "
        "one and the V leads; `time`: half of the patches of each group of leads.",
        OneOf(MASKS),
    )
    context: int = option(
        0, "Samples before and after that the ridge regression across leads sees as well.", at_least(0)
    )


@dataclass
class ProbeConfig:
    """Options of ``physio-dist probe``."""

    run: RunOptions = field(default_factory=lambda: RunOptions(name="probe"))
    data: CacheOptions = field(default_factory=CacheOptions)
    probe: ProbeOptions = field(default_factory=ProbeOptions)

    def validate(self) -> None:
        """Refuse options that do not go together.

        Raises:
            UserError: names the option.
        """
        probe = self.probe
        if not probe.data:
            raise UserError("probe.data is empty: give the URL of a shard set")
        if probe.task == "labels":
            self._validate_labels()
        elif not probe.runs:
            raise UserError(
                "probe.task=reconstruction needs probe.runs: the folder run.dir/run.name of a run, or a list"
            )
        elif not probe.masks:
            raise UserError(f"probe.masks is empty: give some of {', '.join(MASKS)}")

    def _validate_labels(self) -> None:
        if not self.probe.encoder or not self.probe.label:
            raise UserError(
                "probe.task=labels needs probe.encoder, the folder that `physio-dist export RUN OUT` wrote, and "
                "probe.label, the name of a label of the shard set"
            )
        if not self.probe.fractions:
            raise UserError("probe.fractions is empty: give shares of the training people, such as [0.1, 1.0]")
