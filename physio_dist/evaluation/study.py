"""A fusion study from its options to its results, without Ray.

Whoever runs the trials calls, in this order, :func:`prepare`, :func:`physio_dist.evaluation.trials.train` for every
configuration (``search_space.py``) and row, and :func:`conclude`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from physio_dist import storage
from physio_dist.config import TuneConfig
from physio_dist.config.probe import ProbeOptions
from physio_dist.config.task import LEAKY
from physio_dist.data.handle import ShardSetHandle
from physio_dist.errors import UserError
from physio_dist.evaluation.analysis.embedding import embedding
from physio_dist.evaluation.analysis.occlusion import occlusion
from physio_dist.evaluation.backbones import Backbone, open_backbone, refuse_overlap, untrained
from physio_dist.evaluation.clips import subtract_baseline
from physio_dist.evaluation.controls import permuted_label_aucs, with_noise
from physio_dist.evaluation.features import cached_features, check_fits
from physio_dist.evaluation.finetune import finetune
from physio_dist.evaluation.fold_resplits import open_folds
from physio_dist.evaluation.handcrafted import paired_features
from physio_dist.evaluation.label_table import SIGNALS, LabelTable, label_name, published_result
from physio_dist.evaluation.logistic import fit_logistic
from physio_dist.evaluation.pooling import pool_features
from physio_dist.evaluation.results import (
    Outcome,
    Row,
    compare_rows,
    differences,
    majority,
    oracle_rows,
    permutation_control,
    predictions,
    row_result,
    tested_rows,
)
from physio_dist.evaluation.splits import LEAKY_NOTE, Fold, can_permute
from physio_dist.evaluation.study_notes import selection_rule, study_notes
from physio_dist.evaluation.trained_heads import TrainedHeads, train_selected
from physio_dist.evaluation.trials import (
    MODALITIES,
    SEARCHED,
    Choice,
    EncoderKey,
    EncoderRole,
    InputKey,
    Study,
    TrialRecord,
    reductions_of,
    select,
)
from physio_dist.models.fusion.heads import input_kind
from physio_dist.runs.sweep_results import FoldSize, ResultRow, RowDifference, Selection, SweepResults
from physio_dist.runs.typed_json import to_json
from physio_dist.runtime.arrays import BoolArray, Float32Array, FloatArray

Say = Callable[[str], None]

ROWS = ("majority", "untrained", "handmade", "ecg", "eeg", "fused")
"""Rows of every study, in the order of ``results.json``. ``search.modality_dropout`` adds ``fused_ecg_only
fused_eeg_only``, ``tune.noise_control`` ``noise_ecg noise_eeg``, ``tune.finetune`` ``finetuned``, simulated data
``bound_ecg bound_eeg bound_fused``."""


def prepare(options: TuneConfig, data: ShardSetHandle, features_url: str, say: Say) -> Study:
    """Check data and encoders, compute or find their features, and pool them.

    Args:
        options: of the sweep.
        data: the shard set ``tune.data``.
        features_url: folder of frozen features, shared by sweeps; existing ones are not computed again.
        say: receives progress messages.

    Raises:
        UserError: options, data and encoders do not go together, or an encoder was pretrained on test people.
        DataError: data or features are damaged.
    """
    tune = options.tune
    table, folds = open_folds(options, data)
    valid = _valid_channels(data, table)
    if tune.protocol == LEAKY:
        say(LEAKY_NOTE)
    if tune.permutations and not can_permute(table):
        raise UserError(
            f"tune.permutations={tune.permutations}: nobody has recordings of two classes, so permuting labels within "
            "people changes none; set tune.permutations=0"
        )
    backbones = {signal: _fold_backbones(options, signal, folds, table, data) for signal in SIGNALS}
    encoders: dict[EncoderRole, tuple[str, ...]] = {}
    inputs: dict[InputKey, Float32Array] = {}
    features_urls: dict[EncoderKey, str] = {}
    for signal in SIGNALS:
        fresh = [untrained(backbone, options.run.seed) for backbone in backbones[signal]]
        for role, of_folds in ((EncoderRole(signal), backbones[signal]), (EncoderRole(signal, False), fresh)):
            encoders[role] = tuple(backbone.sha256 for backbone in of_folds)
            for backbone in {backbone.sha256: backbone for backbone in of_folds}.values():
                url, features = cached_features(backbone, data, features_url, table, say)
                for pooling in _input_kinds(options):
                    key = InputKey(signal, backbone.sha256, pooling)
                    inputs[key] = pool_features(features, table.sample, pooling, table.baseline)
                if role.pretrained:
                    features_urls[EncoderKey(signal, backbone.sha256)] = url
    handcrafted = {
        name: subtract_baseline(values.__getitem__, table.sample, table.baseline)
        for name, values in paired_features(data, say).items()
    }
    say("principal components of what each head is trained on")
    reductions = reductions_of(inputs, encoders, folds, max(options.search.components), valid)
    about = {signal: _encoder_info(backbones[signal], folds) for signal in SIGNALS}
    notes = tuple(study_notes(options, data.index, table, folds, backbones, valid))
    return Study(options, table, folds, encoders, inputs, handcrafted, reductions, about, notes, valid, features_urls)


def _input_kinds(options: TuneConfig) -> list[str]:
    """Poolings that the search may combine with its heads."""
    search = options.search
    return list(dict.fromkeys(input_kind({"pooling": p, "head": head}) for head in search.head for p in search.pooling))


def _valid_channels(data: ShardSetHandle, table: LabelTable) -> dict[str, BoolArray]:
    """Valid channels ``[n, channel]`` of each signal that has invalid ones.

    Raises:
        UserError: no labelled window has a valid channel of a signal.
    """
    valid = {signal: data.sample_table.valid[signal][table.sample] for signal in SIGNALS}
    for signal, channels in valid.items():
        if not channels.any():
            raise UserError(
                f"tune.data={data.index.url}: the {signal.upper()} is missing in all {len(channels)} labelled windows "
                "(no channel is valid); fusion needs some windows with it. `physio-dist probe` takes a single signal"
            )
    return {signal: channels for signal, channels in valid.items() if not channels.all()}


def _fold_backbones(
    options: TuneConfig, signal: str, folds: Sequence[Fold], table: LabelTable, data: ShardSetHandle
) -> list[Backbone]:
    """The encoder of each fold."""
    names = [fold.name for fold in folds]
    urls = options.tune.encoders[signal].urls(names)
    missing, unknown = [n for n in names if n not in urls], sorted(set(urls) - set(names))
    if missing or unknown:
        fault = f"has none for fold {', '.join(missing)}" if missing else f"names unknown folds {', '.join(unknown)}"
        raise UserError(f"tune.encoders.{signal} {fault}; the folds are {', '.join(names)}")
    opened = {url: open_backbone(url, signal) for url in dict.fromkeys(urls.values())}
    for url, backbone in opened.items():
        check_fits(backbone, data.index)
        if backbone.module.config.d != opened[urls[names[0]]].module.config.d:
            raise UserError(f"tune.encoders.{signal}: {url} has another number of features than fold {names[0]}'s")
    for fold in folds:
        refuse_overlap(opened[urls[fold.name]], np.unique(table.person[fold.test]).tolist(), fold.name)
    return [opened[urls[name]] for name in names]


def _encoder_info(backbones: Sequence[Backbone], folds: Sequence[Fold]) -> dict[str, Any]:
    """A signal's encoders in ``results.json``: the only one, or each fold's under ``by_fold``."""
    infos = [
        {
            "url": storage.without_secrets(backbone.url),
            "sha256": backbone.sha256,
            "people": None if backbone.people is None else len(backbone.people),
            "simulated": backbone.simulated,
        }
        for backbone in backbones
    ]
    if all(info == infos[0] for info in infos):
        return infos[0]
    return {"by_fold": {fold.name: info for fold, info in zip(folds, infos, strict=True)}}


def conclude(
    study: Study, records: Sequence[TrialRecord], say: Say, data: ShardSetHandle | None = None
) -> Outcome:  # fmt: skip
    """Select configurations, train their heads once, test them, and compare the rows.

    Nothing of the test people enters the selection: it reads ``records`` alone, which hold AUCs on validation people.
    The same study and records, in any order, give the same outcome byte for byte.

    Args:
        study: the inputs of the trials.
        records: of all trials.
        say: receives progress messages.
        data: the shard set ``tune.data``; needed for fine-tuning and, with frozen features, the occlusion analysis.

    Raises:
        UserError: a row has no trial that finished an epoch.
    """
    table, folds = study.table, study.folds
    choices = {name: select(study, name, records) for name in SEARCHED}
    rows, fused = _test_rows(study, choices, say, data)
    extra = [name for name in rows if name not in ROWS]
    ordered = [*(rows[name] for name in (*ROWS, *extra)), *oracle_rows(table, folds)]
    pairs = compare_rows(ordered, table, folds)
    row_results = [row_result(row, table, folds, pairs[row.name]) for row in ordered]
    selection = Selection(
        rule=selection_rule(study.options.tune),
        trials={name: sum(record.row == name for record in records) for name in SEARCHED},
        val_auc={name: [round(choice.val_auc, 6) for choice in chosen] for name, chosen in choices.items()},
    )
    results = _results(study, selection, row_results, differences(ordered, table, folds, pairs))
    if repeats := study.options.tune.permutations:
        say(f"training fused heads on labels permuted by recording within people, {repeats} times")
        observed = next(row.auc for row in row_results if row.name == "fused")
        areas = permuted_label_aucs(study, choices["fused"], repeats)
        results = replace(results, permuted=permutation_control(observed, areas))
    plane = None
    if study.features and data is not None:
        say("occlusion of each signal, channel and patch in the input of the fused heads")
        effects = occlusion(study, fused, data.index)
        say("embedding of frozen features")
        shares, plane = embedding(study)
        results = replace(results, occlusion=effects, embedding=shares)
    return Outcome(to_json(results), predictions(ordered, table, folds), fused, plane)


def _results(
    study: Study, selection: Selection, rows: list[ResultRow], differences: list[RowDifference]
) -> SweepResults:  # fmt: skip
    """``results.json`` without controls and analyses."""
    table, folds, tune = study.table, study.folds, study.options.tune
    tested, label = tested_rows(folds), label_name(tune.task, tune.label)
    return SweepResults(
        task=tune.task,
        protocol=tune.protocol,
        leaky=tune.protocol == LEAKY,
        label=label,
        classes=list(table.classes),
        simulated=table.simulated,
        windows=len(tested),
        people=len(np.unique(table.person[tested])),
        folds=[FoldSize(fold.name, len(np.unique(table.person[fold.test])), len(fold.test)) for fold in folds],
        encoders=study.about,
        selection=selection,
        notes=list(study.notes),
        rows=rows,
        differences=differences,
        published=published_result(tune.task, label),
    )


def _test_rows(
    study: Study, choices: Mapping[str, list[Choice]], say: Say, data: ShardSetHandle | None
) -> tuple[dict[str, Row], TrainedHeads]:
    """All rows of the table of results but the oracle's, and the trained heads of the fused one."""
    tune = study.options.tune
    rows = {"majority": majority(study.table, study.folds), "handmade": _handcrafted_row(study)}
    trained = {}
    for name in SEARCHED:
        say(f"testing {name}: the selected heads of {len(study.folds)} folds")
        ablate = MODALITIES[name] if name == "fused" and max(study.options.search.modality_dropout) > 0 else ()
        heads = train_selected(study, name, choices[name], ablate)
        rows |= _searched_rows(name, heads)
        if name == "fused":
            trained[name] = heads
    if tune.noise_control:
        say("training fused heads with noise in place of each modality")
        rows |= _noise_rows(study, choices["fused"])
    if tune.finetune:
        if data is None:
            raise ValueError("fine-tuning needs the shard set")
        rows["finetuned"] = _finetuned_row(study, data, say)
    return rows, trained["fused"]


def _handcrafted_row(study: Study) -> Row:
    label, classes = study.table.label, len(study.table.classes)
    fits = [fit_logistic(study.handcrafted, label, classes, fold) for fold in study.folds]
    return Row(
        "handmade", SIGNALS, [fit.probability for fit in fits], [{"C": fit.c} for fit in fits], [None] * len(fits)
    )


def _finetuned_row(study: Study, data: ShardSetHandle, say: Say) -> Row:
    """Both encoders trained end to end with a linear head over them, each fold from its own encoders."""
    options, table, folds = study.options, study.table, study.folds
    backbones = {signal: _fold_backbones(options, signal, folds, table, data) for signal in SIGNALS}
    datasets = {signal: data.dataset(signal) for signal in SIGNALS}
    training = ProbeOptions(epochs=options.tune.finetune_epochs, lr=options.tune.finetune_lr)
    probability: list[FloatArray] = []
    epochs: list[int | None] = []
    for number, fold in enumerate(folds):
        say(f"fine-tuning both encoders: fold {fold.name}, {number + 1} of {len(folds)}")
        own = {signal: of_folds[number] for signal, of_folds in backbones.items()}
        tested, epoch = finetune(own, datasets, table, fold, training, f"{options.run.seed}/fused/{fold.name}")
        probability.append(tested.astype(np.float32))
        epochs.append(epoch)
    return Row("finetuned", SIGNALS, probability, [None] * len(folds), epochs)


def _searched_rows(name: str, heads: TrainedHeads) -> dict[str, Row]:
    """A searched row, and for the fused one those with a single signal shown to its heads."""
    configs, epochs = [choice.config for choice in heads.choices], [choice.epoch for choice in heads.choices]
    rows = {name: Row(name, MODALITIES[name], heads.probability, configs, epochs, heads.uncalibrated)}
    for signal, probability in heads.ablated.items():
        rows[f"{name}_{signal}_only"] = Row(f"{name}_{signal}_only", (signal,), probability, configs, epochs)
    return rows


def _noise_rows(study: Study, choices: Sequence[Choice]) -> dict[str, Row]:
    """Fused heads trained with noise in place of one signal; ``noise_ecg`` has only the EEG as information."""
    configs, epochs = [choice.config for choice in choices], [choice.epoch for choice in choices]
    rows = {}
    for signal in SIGNALS:
        others = tuple(name for name in SIGNALS if name != signal)
        probability = train_selected(with_noise(study, signal), "fused", choices).probability
        rows[f"noise_{signal}"] = Row(f"noise_{signal}", others, probability, configs, epochs)
    return rows
