"""Notes and descriptions of a study in words, for ``results.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from physio_dist.config import TuneConfig, TuneOptions
from physio_dist.config.task import LEAKY
from physio_dist.data.format.index import ShardSet
from physio_dist.evaluation.backbones import Backbone
from physio_dist.evaluation.label_table import LabelTable
from physio_dist.evaluation.search_space import STARTUP
from physio_dist.evaluation.splits import LEAKY_NOTE, Fold
from physio_dist.runtime.arrays import BoolArray

_PROTOCOL = {
    "grouped_kfold": "groups of people take turns as test people; nobody is on two sides of a fold",
    "loso": "each person takes a turn as the only test person (leave one subject out)",
    "holdout": "the test people are those of the shard set's test split",
    "clip_disjoint": "groups of clips take turns as test clips; people are shared: whoever is tested also trains, with "
    "other clips, so this says nothing about new people",
    "person_and_clip": "groups of people and groups of clips take turns together; neither the person nor the clip of a "
    "test window trains or selects",
    LEAKY: LEAKY_NOTE,
}


def selection_rule(tune: TuneOptions) -> str:
    """Rule by which configurations are selected and test windows predicted."""
    groups = {"clip_disjoint": "clips", "person_and_clip": "people and clips", LEAKY: "windows"}
    units, size = groups.get(tune.protocol, "people"), tune.ensemble_size
    selected = "the configuration and epoch" if size == 1 else f"the {size} configurations, each at its best epoch,"
    return (
        f"for each fold on its own {selected} with the best mean AUC on its validation {units}, which are groups of "
        "those not tested that take turns; test windows get the mean probability of the fold's inner models"
    )


def study_notes(
    options: TuneConfig, shards: ShardSet, table: LabelTable, folds: Sequence[Fold],
    backbones: Mapping[str, Sequence[Backbone]], valid: Mapping[str, BoolArray],
) -> Iterator[str]:  # fmt: skip
    """Notes that a reader of the results needs."""
    yield from _method_notes(options.tune)
    if table.simulated:
        yield "SIMULATED signals: the figures say that the software works, and nothing about people."
    yield from table.notes
    yield from _fold_notes(options.tune, folds)
    for signal, channels in valid.items():
        if lacking := int((~channels.any(axis=1)).sum()):
            yield (
                f"The {signal.upper()} is missing in {lacking} of {len(channels)} windows: heads answer from the other "
                f"signal, the row {signal} without any, from the classes' frequencies."
            )
    for signal, of_folds in backbones.items():
        yield from _encoder_notes(signal, of_folds, shards, table.simulated)


def _method_notes(tune: TuneOptions) -> Iterator[str]:
    yield f"Protocol {tune.protocol}: {_PROTOCOL[tune.protocol]}."
    yield f"Selection: {selection_rule(tune)}."
    if tune.search == "optuna" and tune.trials > STARTUP:
        yield (
            f"Search: {STARTUP} configurations drawn for all folds, then {tune.trials - STARTUP} for each row and fold "
            "that Optuna proposed, by that fold's validation AUC alone."
        )
    if tune.finetune:
        baseline = "; nothing of the rest before a clip is subtracted there" if tune.baseline != "none" else ""
        yield (
            "Row finetuned: both encoders and a linear head, trained end to end on the first of each fold's turns, the "
            f"epoch chosen by its validation people{baseline}."
        )


def _fold_notes(tune: TuneOptions, folds: Sequence[Fold]) -> Iterator[str]:
    fewer = [f"{fold.name} ({len(fold.inner)})" for fold in folds if len(fold.inner) < tune.val_folds]
    if fewer:
        units = "clips" if tune.protocol == "clip_disjoint" else "people"
        yield f"Too few {units} for tune.val_folds={tune.val_folds} groups in fold {', '.join(fewer)}."


def _encoder_notes(signal: str, backbones: Sequence[Backbone], shards: ShardSet, simulated: bool) -> Iterator[str]:
    name, distinct = signal.upper(), list({backbone.sha256: backbone for backbone in backbones}.values())
    if any(backbone.people is None for backbone in distinct):
        yield (
            f"The {name} encoder has no list of the people it was pretrained on: whether test people are among them "
            "cannot be checked."
        )
    foreign = [b for b in distinct if b.people and b.sources and not set(b.sources) & set(shards.sources)]
    if foreign:
        yield (
            f"The {name} encoder was pretrained on {', '.join(foreign[0].sources)}, this set is "
            f"{', '.join(shards.sources)}: people are compared by corpus and id, so somebody who is in both under "
            "other names would not be noticed."
        )
    if not simulated and any(backbone.simulated for backbone in distinct):
        yield f"The {name} encoder was pretrained on simulated signals."
