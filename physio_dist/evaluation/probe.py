"""A linear probe of a frozen encoder, beside the rows without which its figures mean nothing.

Each seed is a whole repetition: another grouping of people, another draw of who is labelled, another untrained
encoder. C is chosen on validation people, who come out of the labelled share; nothing of the test people enters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from physio_dist import config, storage
from physio_dist.config.probe import ProbeConfig
from physio_dist.data.format.index import ShardSet, open_set
from physio_dist.data.handle import open_dataset
from physio_dist.errors import DataError, UserError
from physio_dist.evaluation.backbones import Backbone, open_backbone, refuse_overlap, untrained
from physio_dist.evaluation.features import Features, check_fits, embed, open_features
from physio_dist.evaluation.finetune import finetune
from physio_dist.evaluation.handcrafted import window_features
from physio_dist.evaluation.label_table import LabelTable, load_label_table, shard_cache
from physio_dist.evaluation.logistic import fit_logistic
from physio_dist.evaluation.results import majority
from physio_dist.evaluation.splits import Fold, folds_of, inner_splits, labelled
from physio_dist.models.fusion.pooling import pool
from physio_dist.stats.scores import score

Floats = npt.NDArray[np.float64]
Say = Callable[[str], None]

ROWS = ("majority", "validity", "handmade", "untrained", "encoder")
TUNED = ("finetuned_untrained", "finetuned")
METRICS = ("auc", "balanced_accuracy", "macro_f1")
CONFIG, RESULTS = "config.yaml", "results.json"

_C = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
_DIGITS = 6
_WINDOWS = 256
_MAY_DIFFER = frozenset(["run.dir", "probe.feature_cache"])


def probe(options: ProbeConfig, say: Say) -> dict[str, Any]:
    """Probe, and write ``config.yaml`` and ``results.json`` to ``run.dir/run.name``.

    Args:
        options: with ``probe.task=labels``.
        say: told what is going on.

    Returns:
        ``results.json`` as an object.

    Raises:
        UserError: options, data and encoder do not go together, or the encoder knows test people.
        DataError: data, encoder or features are damaged.
    """
    given, where = options.probe, begin(options)
    shards = open_set(given.data)
    backbone = open_backbone(given.encoder)
    check_fits(backbone, shards)
    if backbone.loaded:
        say(backbone.loaded)
    table = load_label_table(shards.url, "labels", given.label, "probe.label")
    refuse_rare_classes(table, given.label)
    seeds = [options.run.seed + number for number in range(given.seeds)]
    folds = {seed: folds_of(table, given.protocol, given.folds, given.val_folds, seed, "probe") for seed in seeds}
    for fold in (fold for several in folds.values() for fold in several):
        refuse_overlap(
            backbone, np.unique(table.person[fold.test]).tolist(), fold.name,
            "Give an encoder pretrained without them, or one pretrained on a shard set that keeps them in its test "
            "split (split.test) with probe.protocol=holdout",
        )  # fmt: skip
    cut = {seed: _labelled_folds(table, folds[seed], given.fractions, given.val_folds, seed) for seed in seeds}

    inputs = _inputs(options, shards, backbone, table, seeds, say)
    found = []
    for name in (*ROWS, *(TUNED if given.finetune else ())):
        say(f"row {name}: {len(seeds)} seed(s) x {len(given.fractions)} fraction(s) x {len(folds[seeds[0]])} fold(s)")
        for fraction in given.fractions:
            each = [
                _tested(name, table, cut[seed][fraction], inputs, seed, options, backbone, shards) for seed in seeds
            ]
            found.append(_row(name, fraction, seeds, each))
    results = {
        "kind": "probe",
        **_about(options, shards, backbone, table, folds[seeds[0]]),
        "rows": found,
    }
    finish(options, where, results)
    return results


def begin(options: ProbeConfig) -> str:
    """The run's folder, which holds nothing else.

    Raises:
        UserError: another probe or run is there.
    """
    where = storage.join(storage.absolute(options.run.dir), options.run.name)
    config.refuse_another(storage.join(where, CONFIG), options, _MAY_DIFFER)
    return where


def finish(options: ProbeConfig, where: str, results: Mapping[str, Any]) -> None:
    """Write the configuration, then the results."""
    storage.write_bytes(storage.join(where, CONFIG), config.to_yaml(options).encode())
    storage.write_json(storage.join(where, RESULTS), dict(results))


def refuse_rare_classes(table: LabelTable, label: str) -> None:
    """Refuse a class that cannot be trained on, selected on and tested on by different people.

    Raises:
        UserError: a class is found in fewer than three people.
    """
    for number, name in enumerate(table.classes):
        people = len(np.unique(table.person[table.label == number]))
        if people < 3:
            raise UserError(
                f"probe.label={label}: class {name} is found in {people} {'person' if people == 1 else 'people'}, and "
                "a probe needs three at least: to train, to validate and to test. Leave the class out of the labels, "
                "or add recordings"
            )


def _labelled_folds(
    table: LabelTable, folds: Sequence[Fold], fractions: Sequence[float], val_folds: int, seed: int
) -> dict[float, list[Fold]]:  # fmt: skip
    """The folds with the training people cut down to each share."""
    found: dict[float, list[Fold]] = {}
    for fraction in fractions:
        if fraction == 1.0:
            found[fraction] = list(folds)
            continue
        found[fraction] = []
        for fold in folds:
            rows = labelled(table, fold.train, fraction, f"{seed}/{fold.name}")
            inner = inner_splits(table, rows, val_folds, f"{seed}/labelled/{fold.name}/{fraction}")
            if not inner:
                raise UserError(
                    f"probe.fractions={fraction:g}: the people of fold {fold.name} that it leaves cannot train and "
                    f"validate on all of {', '.join(table.classes)}; give a larger share"
                )
            found[fraction].append(replace(fold, inner=inner))
    return found


def _inputs(
    options: ProbeConfig, shards: ShardSet, backbone: Backbone, table: LabelTable, seeds: Sequence[int], say: Say
) -> dict[str, Floats]:  # fmt: skip
    """Features of the labelled windows, ``[row, f]``: of ``validity``, ``handmade``, ``encoder``, ``untrained/SEED``.

    An encoder's come with the validity of each channel, which it was given too: it sees nothing of invalid ones.
    """
    found: dict[str, Floats] = {"handmade": window_features(shards, backbone.signal, say)[table.sample]}
    folder = options.probe.feature_cache or storage.join(options.run.dir, "features")
    of = {"encoder": backbone, **{f"untrained/{seed}": untrained(backbone, seed) for seed in seeds}}
    for name, encoder in of.items():
        where = storage.join(folder, f"{encoder.signal}-{encoder.sha256[:16]}-{shards.fingerprint[:16]}")
        embed(encoder, shards.url, where, say)
        features = open_features(where)
        if [features.keys[i] for i in table.sample] != table.keys:
            raise DataError(f"{where} holds features of other windows than the shard set's; remove it")
        valid = features.valid[table.sample].astype(np.float64)
        found["validity"] = valid
        found[name] = np.concatenate([_pooled(features, table, options.probe.pooling), valid], axis=1)
    return found


def _pooled(features: Features, table: LabelTable, kind: str) -> Floats:
    parts = []
    for start in range(0, len(table.sample), _WINDOWS):
        rows = table.sample[start : start + _WINDOWS]
        parts.append(pool(torch.from_numpy(features.values[rows]), torch.from_numpy(features.valid[rows]), kind))
    return torch.cat(parts).double().numpy()


def _tested(
    name: str, table: LabelTable, folds: Sequence[Fold], inputs: Mapping[str, Floats], seed: int, options: ProbeConfig,
    backbone: Backbone, shards: ShardSet,
) -> dict[str, Any]:  # fmt: skip
    """Scores of one seed, means over its folds, and on whom they rest.

    Not over the windows of all folds together: the more a fold tests of a class the fewer are left to train on, so that
    even knowing nothing would come out below chance.
    """
    classes, chosen = len(table.classes), list[Any]()
    probability: list[npt.NDArray[np.floating]] = []
    if name == "majority":
        probability = list(majority(table, folds).probability)
    elif name in TUNED:
        begins = backbone if name == "finetuned" else untrained(backbone, seed)
        source = open_dataset([(shards.url, 1.0)], backbone.signal, shard_cache())
        for fold in folds:
            one = {backbone.signal: begins}, {backbone.signal: source}
            tested, epoch = finetune(*one, table, fold, options.probe, f"{seed}/{fold.name}")
            probability.append(tested)
            chosen.append({"epoch": epoch})
    else:
        x = inputs[f"untrained/{seed}" if name == "untrained" else name]
        for fold in folds:
            fitted = fit_logistic({name: x}, table.label, classes, fold, _C, "balanced")
            probability.append(fitted.probability)
            chosen.append({"C": fitted.c})
    scores = [score(table.label[fold.test], each) for fold, each in zip(folds, probability, strict=True)]
    train = [fold.train for fold in folds]
    return {
        "seed": seed,
        **{metric: _mean([one[metric] for one in scores]) for metric in METRICS},
        "train_windows": round(float(np.mean([len(rows) for rows in train])), 1),
        "train_people": round(float(np.mean([len(np.unique(table.person[rows])) for rows in train])), 1),
        "chosen": chosen,
    }  # fmt: skip


def _mean(values: Sequence[float | None]) -> float | None:
    """Of those that are defined: a metric is not where a class is missing."""
    known = [value for value in values if value is not None]
    return round(float(np.mean(known)), _DIGITS) if known else None


def _row(name: str, fraction: float, seeds: Sequence[int], each: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and standard deviations under ``sd``; None where a metric is not defined."""
    mean: dict[str, float | None] = {}
    spread: dict[str, float | None] = {}
    for metric in METRICS:
        values = [one[metric] for one in each if one[metric] is not None]
        mean[metric] = _mean(values)
        spread[metric] = round(float(np.std(values, ddof=1)), _DIGITS) if len(values) > 1 else None
    people, windows = (round(float(np.mean([one[f"train_{of}"] for one in each])), 1) for of in ("people", "windows"))
    return {
        "name": name, "fraction": fraction, **mean, "sd": spread, "train_people": people, "train_windows": windows,
        "per_seed": list(each),
    }  # fmt: skip


def _about(
    options: ProbeConfig, shards: ShardSet, backbone: Backbone, table: LabelTable, folds: Sequence[Fold]
) -> dict[str, Any]:  # fmt: skip
    tested = np.concatenate([fold.test for fold in folds])
    given, channels = options.probe, shards.signals[backbone.signal].channels
    notes = []
    if table.simulated:
        notes.append("SIMULATED signals: the figures say that the software works, and nothing about people.")
    if left := shards.nsamples - len(table.keys):
        notes.append(f"{left} of {shards.nsamples} windows do not have the label and are left out.")
    if backbone.people is None:
        notes.append("The encoder has no list of its people: whether test people are among them cannot be checked.")
    if backbone.channels and set(channels) - set(backbone.channels):
        others = ", ".join(channel for channel in channels if channel not in backbone.channels)
        notes.append(f"The encoder was not pretrained on the channels {others}.")
    if backbone.simulated and not table.simulated:
        notes.append("The encoder was pretrained on simulated signals.")
    return {
        "task": "labels", "label": given.label, "classes": list(table.classes), "protocol": given.protocol,
        "signal": backbone.signal, "simulated": table.simulated, "data": shards.fingerprint, "pooling": given.pooling,
        "windows": len(tested), "people": len(np.unique(table.person[tested])),
        "windows_of_class": np.bincount(table.label[tested], minlength=len(table.classes)).tolist(),
        "encoder": {
            "url": storage.without_secrets(backbone.url), "sha256": backbone.sha256, "simulated": backbone.simulated,
            "people": None if backbone.people is None else len(backbone.people), "loaded": backbone.loaded,
        },
        "notes": notes,
    }  # fmt: skip


def table_of(results: Mapping[str, Any]) -> Iterator[str]:
    """The results as a table, line by line."""
    counts = ", ".join(
        f"{n} {name}" for name, n in zip(results["classes"], results["windows_of_class"], strict=True)
    )  # fmt: skip
    seeds = len(results["rows"][0]["per_seed"])
    yield (
        f"{results['label']} from {results['signal'].upper()}: {results['windows']} test windows of "
        f"{results['people']} people ({counts}); {results['protocol']}; mean +- sd over {seeds} seed(s)"
    )
    yield f"{'row':<20}{'labelled':>9}{'people':>8}{'AUC':>18}{'balanced accuracy':>20}{'macro F1':>18}"
    for row in results["rows"]:
        cells = [_cell(row[metric], row["sd"][metric]) for metric in METRICS]
        yield (
            f"{row['name']:<20}{row['fraction']:>9.4g}{row['train_people']:>8.0f}{cells[0]:>18}{cells[1]:>20}"
            f"{cells[2]:>18}"
        )
    yield from results["notes"]


def _cell(mean: float | None, sd: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.3f}" if sd is None else f"{mean:.3f} +- {sd:.3f}"
