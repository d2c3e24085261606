"""One fusion study from its options to its results. No Ray here: whoever drives the trials calls, in this order,
:func:`prepare`, :func:`train` for every configuration (``proposals.py``) and row, and :func:`conclude`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from physio_dist import storage
from physio_dist.config import TuneConfig, TuneOptions
from physio_dist.config.probe import ProbeOptions
from physio_dist.config.task import LEAKY
from physio_dist.data.format.index import ShardSet, open_set
from physio_dist.data.format.sample_table import read_sample_table
from physio_dist.data.handle import open_dataset
from physio_dist.errors import DataError, UserError
from physio_dist.evaluation.analysis.embedding import embedding
from physio_dist.evaluation.analysis.occlusion import occlusion
from physio_dist.evaluation.backbones import Backbone, open_backbone, refuse_overlap, untrained
from physio_dist.evaluation.clips import subtract_baseline
from physio_dist.evaluation.features import Features, check_fits, embed, open_features
from physio_dist.evaluation.finetune import finetune
from physio_dist.evaluation.fold_resplits import open_folds
from physio_dist.evaluation.handcrafted import paired_features
from physio_dist.evaluation.label_table import SIGNALS, LabelTable, label_name, published_result, shard_cache
from physio_dist.evaluation.logistic import fit_logistic
from physio_dist.evaluation.pooling import pool_features
from physio_dist.evaluation.results import (
    Outcome,
    Row,
    differences,
    majority,
    oracle_rows,
    permuted_part,
    predictions,
    row_of,
)
from physio_dist.evaluation.search_space import STARTUP
from physio_dist.evaluation.splits import LEAKY_NOTE, Fold, can_permute
from physio_dist.evaluation.trials import MODALITIES as MODALITIES
from physio_dist.evaluation.trials import SEARCHED as SEARCHED
from physio_dist.evaluation.trials import (
    Choice,
    Study,
    TrialRecord,
    control,
    noisy,
    predict,
    predict_ablated,
    reductions_of,
    select,
    trained_heads,
)
from physio_dist.evaluation.trials import train as train
from physio_dist.models.fusion.heads import input_kind
from physio_dist.runs.sweep_results import FoldSize, Selection, SweepResults
from physio_dist.runs.typed_json import to_json

Say = Callable[[str], None]

ROWS = ("majority", "untrained", "handmade", "ecg", "eeg", "fused")
"""Rows of every study, in the order of ``results.json``. ``search.modality_dropout`` adds ``fused_ecg_only
fused_eeg_only``, ``tune.noise_control`` ``noise_ecg noise_eeg``, ``tune.finetune`` ``finetuned``, simulated data
``bound_ecg bound_eeg bound_fused``."""

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


def _rule(tune: TuneOptions) -> str:
    """How test windows come by their probabilities, in words."""
    groups = {"clip_disjoint": "clips", "person_and_clip": "people and clips", LEAKY: "windows"}
    who, many = groups.get(tune.protocol, "people"), tune.ensemble_size
    what = "the configuration and epoch" if many == 1 else f"the {many} configurations, each at its best epoch,"
    return (
        f"for each fold on its own {what} with the best mean AUC on its validation {who}, which are groups of those "
        "not tested that take turns; test windows get the mean probability of the fold's inner models"
    )


def prepare(options: TuneConfig, features_url: str, say: Say) -> Study:
    """Open and check data and encoders, compute or find their features, pool them.

    Args:
        options: of the sweep.
        features_url: folder of frozen features, shared by sweeps; those that are there are not computed again.
        say: told what is going on.

    Raises:
        UserError: options, data and encoders do not go together, or an encoder knows test people.
        DataError: data or features are damaged.
    """
    tune, seed = options.tune, options.run.seed
    shards, table, folds = open_folds(options)
    valid = _valid(shards, table)
    if tune.protocol == LEAKY:
        say(LEAKY_NOTE)
    if tune.permutations and not can_permute(table):
        raise UserError(
            f"tune.permutations={tune.permutations}: nobody has recordings of two classes, so permuting labels within "
            "people changes none; set tune.permutations=0"
        )
    backbones = {signal: _backbones(options, signal, folds, table, shards) for signal in SIGNALS}
    encoders: dict[str, tuple[str, ...]] = {}
    inputs: dict[str, npt.NDArray[np.float32]] = {}
    features: dict[str, str] = {}
    for signal in SIGNALS:
        fresh = [untrained(backbone, seed) for backbone in backbones[signal]]
        for name, those in ((signal, backbones[signal]), (f"untrained_{signal}", fresh)):
            encoders[name] = tuple(backbone.sha256 for backbone in those)
            for backbone in {one.sha256: one for one in those}.values():
                folder = f"{signal}-{backbone.sha256[:16]}-{shards.fingerprint[:16]}"
                where = storage.join(features_url, folder)
                embed(backbone, tune.data, where, say)
                found = _features(where, table)
                for kind in _kinds(options):
                    inputs[f"{signal}/{backbone.sha256}/{kind}"] = pool_features(
                        found, table.sample, kind, table.baseline
                    )
                if name == signal:
                    features[f"{signal}/{backbone.sha256}"] = where
    measured = {
        name: subtract_baseline(values.__getitem__, table.sample, table.baseline)
        for name, values in paired_features(tune.data, say).items()
    }
    say("principal components of what each head is trained on")
    reductions = reductions_of(inputs, encoders, folds, max(options.search.components), valid)
    about = {signal: _about(backbones[signal], folds) for signal in SIGNALS}
    notes = tuple(_notes(options, shards, table, folds, backbones, valid))
    return Study(options, table, folds, encoders, inputs, measured, reductions, about, notes, valid, features)


def _kinds(options: TuneConfig) -> list[str]:
    """What heads may be given of a modality."""
    search = options.search
    return list(dict.fromkeys(input_kind({"pooling": p, "head": head}) for head in search.head for p in search.pooling))


def _valid(shards: ShardSet, table: LabelTable) -> dict[str, npt.NDArray[np.bool_]]:
    """Which channels are valid, ``[n, channel]``, of each signal that lacks some.

    Raises:
        UserError: no labelled window has a valid channel of a signal.
    """
    sample_table = read_sample_table(shards)
    found = {signal: sample_table.valid[signal][table.sample] for signal in SIGNALS}
    for signal, channels in found.items():
        if not channels.any():
            raise UserError(
                f"tune.data={shards.url}: the {signal.upper()} is missing in all {len(channels)} labelled windows (no "
                "channel is valid); fusion needs some windows with it. `physio-dist probe` takes a single signal"
            )
    return {signal: channels for signal, channels in found.items() if not channels.all()}


def _backbones(
    options: TuneConfig, signal: str, folds: tuple[Fold, ...], table: LabelTable, shards: ShardSet
) -> list[Backbone]:
    """The encoder of each fold."""
    names = [fold.name for fold in folds]
    urls = options.tune.encoders[signal].urls(names)
    missing, unknown = [n for n in names if n not in urls], sorted(set(urls) - set(names))
    if missing or unknown:
        what = f"has none for fold {', '.join(missing)}" if missing else f"names unknown folds {', '.join(unknown)}"
        raise UserError(f"tune.encoders.{signal} {what}; the folds are {', '.join(names)}")
    opened = {url: open_backbone(url, signal) for url in dict.fromkeys(urls.values())}
    for url, backbone in opened.items():
        check_fits(backbone, shards)
        if backbone.module.config.d != opened[urls[names[0]]].module.config.d:
            raise UserError(f"tune.encoders.{signal}: {url} has another number of features than fold {names[0]}'s")
    for fold in folds:
        refuse_overlap(opened[urls[fold.name]], np.unique(table.person[fold.test]).tolist(), fold.name)
    return [opened[urls[name]] for name in names]


def _features(where: str, table: LabelTable) -> Features:
    found = open_features(where)
    if [found.keys[i] for i in table.sample] != table.keys:
        raise DataError(f"{where} holds features of other windows than the shard set's; remove it")
    return found


def _about(backbones: list[Backbone], folds: tuple[Fold, ...]) -> dict[str, Any]:
    """What ``results.json`` says of a signal's encoders: of one, or of each fold's under ``by_fold``."""
    each = [
        {
            "url": storage.without_secrets(backbone.url),
            "sha256": backbone.sha256,
            "people": None if backbone.people is None else len(backbone.people),
            "simulated": backbone.simulated,
        }
        for backbone in backbones
    ]
    if all(one == each[0] for one in each):
        return each[0]
    return {"by_fold": {fold.name: one for fold, one in zip(folds, each, strict=True)}}


def _notes(
    options: TuneConfig, shards: ShardSet, table: LabelTable, folds: tuple[Fold, ...], backbones: dict[str, list[Backbone]],
    valid: dict[str, npt.NDArray[np.bool_]],
) -> list[str]:  # fmt: skip
    tune = options.tune
    notes = [f"Protocol {tune.protocol}: {_PROTOCOL[tune.protocol]}.", f"Selection: {_rule(tune)}."]
    if tune.search == "optuna" and tune.trials > STARTUP:
        notes.append(
            f"Search: {STARTUP} configurations drawn for all folds, then {tune.trials - STARTUP} for each row and fold "
            "that Optuna proposed, by that fold's validation AUC alone."
        )
    if tune.finetune:
        rest = "; nothing of the rest before a clip is subtracted there" if tune.baseline != "none" else ""
        notes.append(
            "Row finetuned: both encoders and a linear head, trained end to end on the first of each fold's turns, the "
            f"epoch chosen by its validation people{rest}."
        )
    if table.simulated:
        notes.append("SIMULATED signals: the figures say that the software works, and nothing about people.")
    notes += table.notes
    fewer = [f"{fold.name} ({len(fold.inner)})" for fold in folds if len(fold.inner) < tune.val_folds]
    if fewer:
        what = "clips" if tune.protocol == "clip_disjoint" else "people"
        notes.append(f"Too few {what} for tune.val_folds={tune.val_folds} groups in fold {', '.join(fewer)}.")
    for signal, known in valid.items():
        if lacking := int((~known.any(axis=1)).sum()):
            notes.append(
                f"The {signal.upper()} is missing in {lacking} of {len(known)} windows: heads answer from the other "
                f"signal, the row {signal} without any, from the classes' frequencies."
            )
    for signal, those in backbones.items():
        distinct = list({backbone.sha256: backbone for backbone in those}.values())
        if any(backbone.people is None for backbone in distinct):
            notes.append(
                f"The {signal.upper()} encoder has no list of the people it was pretrained on: whether test people are "
                "among them cannot be checked."
            )
        others = [one for one in distinct if one.people and one.sources and not set(one.sources) & set(shards.sources)]
        if others:
            notes.append(
                f"The {signal.upper()} encoder was pretrained on {', '.join(others[0].sources)}, this set is "
                f"{', '.join(shards.sources)}: people are compared by corpus and id, so somebody who is in both under "
                "other names would not be noticed."
            )
        if not table.simulated and any(backbone.simulated for backbone in distinct):
            notes.append(f"The {signal.upper()} encoder was pretrained on simulated signals.")
    return notes


def conclude(study: Study, records: list[TrialRecord], say: Say) -> Outcome:
    """Select, train the selected again, evaluate on the test people, compare.

    Nothing of the test people enters a selection: it reads ``records`` alone, which hold AUCs on validation people. The
    same study and records, in any order, give the same outcome byte for byte.

    Args:
        study: what the trials were given.
        records: of all trials.
        say: told what is going on.

    Raises:
        UserError: a row has no trial that finished an epoch.
    """
    table, folds, seed = study.table, study.folds, study.options.run.seed
    chosen = {name: select(study, name, records) for name in SEARCHED}
    rows = {"majority": majority(table, folds), "handmade": _handmade_row(study)}
    for name, choices in chosen.items():
        say(f"testing {name}: the selected heads of {len(folds)} folds")
        rows |= _searched_rows(study, name, choices)
    if study.options.tune.noise_control:
        say("training fused heads with noise in place of each modality")
        rows |= _noise_rows(study, chosen["fused"])
    if study.options.tune.finetune:
        rows["finetuned"] = _finetuned_row(study, say)
    extra = [name for name in rows if name not in ROWS]
    ordered = [*(rows[name] for name in (*ROWS, *extra)), *oracle_rows(table, folds)]
    found = [row_of(row, table, folds, seed) for row in ordered]
    tested = np.concatenate([fold.test for fold in folds])
    label = label_name(study.options.tune.task, study.options.tune.label)
    results = SweepResults(
        task=study.options.tune.task,
        protocol=study.options.tune.protocol,
        leaky=study.options.tune.protocol == LEAKY,
        label=label,
        classes=list(table.classes),
        simulated=table.simulated,
        windows=len(tested),
        people=len(np.unique(table.person[tested])),
        folds=[FoldSize(fold.name, len(np.unique(table.person[fold.test])), len(fold.test)) for fold in folds],
        encoders=study.about,
        selection=Selection(
            rule=_rule(study.options.tune),
            trials={name: sum(record.row == name for record in records) for name in SEARCHED},
            val_auc={name: [round(choice.val_auc, 6) for choice in choices] for name, choices in chosen.items()},
        ),
        notes=list(study.notes),
        rows=found,
        differences=differences(ordered, table, folds),
        published=published_result(study.options.tune.task, label),
    )
    if repeats := study.options.tune.permutations:
        say(f"training fused heads on labels permuted by recording within people, {repeats} times")
        observed = next(row.auc for row in found if row.name == "fused")
        results = replace(results, permuted=permuted_part(observed, control(study, chosen["fused"], repeats)))
    plane = None
    if study.features:
        say("occlusion of each signal, channel and patch in the input of the fused heads")
        effects = occlusion(study, chosen["fused"], trained_heads(study, "fused", chosen["fused"]))
        say("embedding of frozen features")
        shares, plane = embedding(study)
        results = replace(results, occlusion=effects, embedding=shares)
    return Outcome(to_json(results), predictions(ordered, table, folds), plane)


def _handmade_row(study: Study) -> Row:
    label, classes = study.table.label, len(study.table.classes)
    fitted = [fit_logistic(study.handmade, label, classes, fold) for fold in study.folds]
    none = [None] * len(fitted)
    return Row("handmade", SIGNALS, [one.probability for one in fitted], [{"C": one.c} for one in fitted], none)


def _finetuned_row(study: Study, say: Say) -> Row:
    """Both encoders trained end to end with a linear head over them, each fold from its own encoders."""
    options, table, folds = study.options, study.table, study.folds
    shards = open_set(options.tune.data)
    backbones = {signal: _backbones(options, signal, folds, table, shards) for signal in SIGNALS}
    sources = {signal: open_dataset([(shards.url, 1.0)], signal, shard_cache()) for signal in SIGNALS}
    how = ProbeOptions(epochs=options.tune.finetune_epochs, lr=options.tune.finetune_lr)
    probability: list[npt.NDArray[np.floating]] = []
    epochs: list[int | None] = []
    for number, fold in enumerate(folds):
        say(f"fine-tuning both encoders: fold {fold.name}, {number + 1} of {len(folds)}")
        mine = {signal: those[number] for signal, those in backbones.items()}
        tested, epoch = finetune(mine, sources, table, fold, how, f"{options.run.seed}/fused/{fold.name}")
        probability.append(tested.astype(np.float32))
        epochs.append(epoch)
    return Row("finetuned", SIGNALS, probability, [None] * len(folds), epochs)


def _searched_rows(study: Study, name: str, choices: list[Choice]) -> dict[str, Row]:
    """A row that was searched for; with ``fused`` also what its heads say with a modality withheld."""
    wanted = ["all", *(["uncalibrated"] if study.options.tune.calibrate else [])]
    withheld = list(MODALITIES[name]) if name == "fused" and max(study.options.search.modality_dropout) > 0 else []
    found = predict_ablated(study, name, choices, [*wanted, *withheld])
    configs, epochs = [choice.config for choice in choices], [choice.epoch for choice in choices]
    rows = {name: Row(name, MODALITIES[name], found["all"], configs, epochs, found.get("uncalibrated"))}
    for signal in withheld:
        rows[f"{name}_{signal}_only"] = Row(f"{name}_{signal}_only", (signal,), found[signal], configs, epochs)
    return rows


def _noise_rows(study: Study, choices: list[Choice]) -> dict[str, Row]:
    """What fused heads make of one modality and noise; ``noise_ecg`` has the EEG alone to go by."""
    configs, epochs = [choice.config for choice in choices], [choice.epoch for choice in choices]
    rows = {}
    for signal in SIGNALS:
        others = tuple(name for name in SIGNALS if name != signal)
        probability = predict(noisy(study, signal), "fused", choices)
        rows[f"noise_{signal}"] = Row(f"noise_{signal}", others, probability, configs, epochs)
    return rows
