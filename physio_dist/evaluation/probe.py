"""Linear probe of a frozen encoder, with the baselines that its scores are compared with.

Each seed is a whole repetition: another grouping of people, another sample of labelled people, another untrained
encoder. C is selected on validation people, who come out of the labelled share; nothing of the test people enters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from physio_dist import config, storage
from physio_dist.config.probe import ProbeConfig, ProbeOptions
from physio_dist.data.handle import ShardSetHandle, open_handle
from physio_dist.errors import UserError
from physio_dist.evaluation.backbones import Backbone, open_backbone, refuse_overlap, untrained
from physio_dist.evaluation.features import Features, cached_features, check_fits
from physio_dist.evaluation.finetune import finetune
from physio_dist.evaluation.handcrafted import window_features
from physio_dist.evaluation.label_table import LabelTable, load_label_table
from physio_dist.evaluation.logistic import fit_logistic
from physio_dist.evaluation.results import majority
from physio_dist.evaluation.splits import Fold, folds_of, inner_splits, labelled
from physio_dist.models.fusion.pooling import pool
from physio_dist.runtime.arrays import Float64Array, FloatArray
from physio_dist.stats.scores import score

Say = Callable[[str], None]

ROWS = ("majority", "validity", "handmade", "untrained", "encoder")
FINETUNED = ("finetuned_untrained", "finetuned")
METRICS = ("auc", "balanced_accuracy", "macro_f1")
CONFIG, RESULTS = "config.yaml", "results.json"

_C = (1e-4, 1e-3, 1e-2, 0.1, 1.0)
_DIGITS = 6
_WINDOWS = 256
_MAY_DIFFER = frozenset(["run.dir", "data.cache_dir", "data.cache_gb", "probe.feature_cache"])


def probe(options: ProbeConfig, say: Say) -> dict[str, Any]:
    """Probe, and write ``config.yaml`` and ``results.json`` to ``run.dir/run.name``.

    Args:
        options: with ``probe.task=labels``.
        say: receives progress messages.

    Returns:
        Content of ``results.json``.

    Raises:
        UserError: options, data and encoder do not go together, or the encoder was pretrained on test people.
        DataError: data, encoder or features are damaged.
    """
    probe, run_url = options.probe, begin(options)
    data = open_handle(probe.data, options.data)
    backbone = open_backbone(probe.encoder)
    check_fits(backbone, data.index)
    if backbone.loaded:
        say(backbone.loaded)
    table = load_label_table(data, "labels", probe.label, "probe.label")
    refuse_rare_classes(table, probe.label)
    seeds = [options.run.seed + number for number in range(probe.seeds)]
    folds = {seed: folds_of(table, probe.protocol, probe.folds, probe.val_folds, seed, "probe") for seed in seeds}
    for fold in (fold for of_seed in folds.values() for fold in of_seed):
        refuse_overlap(
            backbone, np.unique(table.person[fold.test]).tolist(), fold.name,
            "Give an encoder pretrained without them, or one pretrained on a shard set that keeps them in its test "
            "split (split.test) with probe.protocol=holdout",
        )  # fmt: skip
    reduced = {seed: _labelled_folds(table, folds[seed], probe, seed) for seed in seeds}
    runner = _Probe(probe, data, backbone, table, _inputs(options, data, backbone, table, seeds, say))
    rows = []
    for name in (*ROWS, *(FINETUNED if probe.finetune else ())):
        say(f"row {name}: {len(seeds)} seed(s) x {len(probe.fractions)} fraction(s) x {len(folds[seeds[0]])} fold(s)")
        for fraction in probe.fractions:
            per_seed = [runner.test(name, reduced[seed][fraction], seed) for seed in seeds]
            rows.append(_row(name, fraction, per_seed))
    results = {"kind": "probe", **_about(probe, data, backbone, table, folds[seeds[0]]), "rows": rows}
    finish(options, run_url, results)
    return results


def begin(options: ProbeConfig) -> str:
    """Check the run's folder, and return its URL.

    Raises:
        UserError: another probe or run is there.
    """
    url = storage.join(storage.absolute(options.run.dir), options.run.name)
    config.refuse_another(storage.join(url, CONFIG), options, _MAY_DIFFER)
    return url


def finish(options: ProbeConfig, url: str, results: Mapping[str, Any]) -> None:
    """Write the configuration, then the results."""
    storage.write_bytes(storage.join(url, CONFIG), config.to_yaml(options).encode())
    storage.write_json(storage.join(url, RESULTS), dict(results))


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
    table: LabelTable, folds: Sequence[Fold], probe: ProbeOptions, seed: int
) -> dict[float, list[Fold]]:  # fmt: skip
    """The folds with the training people reduced to each fraction."""
    reduced: dict[float, list[Fold]] = {}
    for fraction in probe.fractions:
        if fraction == 1.0:
            reduced[fraction] = list(folds)
            continue
        reduced[fraction] = []
        for fold in folds:
            rows = labelled(table, fold.train, fraction, f"{seed}/{fold.name}")
            inner = inner_splits(table, rows, probe.val_folds, f"{seed}/labelled/{fold.name}/{fraction}")
            if not inner:
                raise UserError(
                    f"probe.fractions={fraction:g}: the people of fold {fold.name} that it leaves cannot train and "
                    f"validate on all of {', '.join(table.classes)}; give a larger share"
                )
            reduced[fraction].append(replace(fold, inner=inner))
    return reduced


@dataclass(frozen=True)
class _Inputs:
    """Features of the labelled windows, float64 ``[row, f]``.

    Those of encoders end with the validity of each channel, which encoders get too: they ignore invalid channels.
    """

    validity: Float64Array
    handcrafted: Float64Array
    encoder: Float64Array
    untrained: dict[int, Float64Array]

    def of(self, row: str, seed: int) -> Float64Array:
        """Inputs of a row of results."""
        if row == "untrained":
            return self.untrained[seed]
        return {"validity": self.validity, "handmade": self.handcrafted, "encoder": self.encoder}[row]


def _inputs(
    options: ProbeConfig, data: ShardSetHandle, backbone: Backbone, table: LabelTable, seeds: Sequence[int], say: Say
) -> _Inputs:  # fmt: skip
    handcrafted = window_features(data, backbone.signal, say)[table.sample]
    folder = options.probe.feature_cache or storage.join(options.run.dir, "features")

    def features_of(encoder: Backbone) -> Float64Array:
        _, features = cached_features(encoder, data, folder, table, say)
        valid = features.valid[table.sample].astype(np.float64)
        return np.concatenate([_pooled(features, table, options.probe.pooling), valid], axis=1)

    encoder = features_of(backbone)
    validity = data.sample_table.valid[backbone.signal][table.sample].astype(np.float64)
    return _Inputs(validity, handcrafted, encoder, {seed: features_of(untrained(backbone, seed)) for seed in seeds})


def _pooled(features: Features, table: LabelTable, kind: str) -> Float64Array:
    parts = []
    for start in range(0, len(table.sample), _WINDOWS):
        rows = table.sample[start : start + _WINDOWS]
        parts.append(pool(torch.from_numpy(features.values[rows]), torch.from_numpy(features.valid[rows]), kind))
    return torch.cat(parts).double().numpy()


@dataclass(frozen=True)
class _Probe:
    """Trains and tests the rows of a probe."""

    options: ProbeOptions
    data: ShardSetHandle
    backbone: Backbone
    table: LabelTable
    inputs: _Inputs

    def test(self, row: str, folds: Sequence[Fold], seed: int) -> dict[str, Any]:
        """Scores of one row and seed, means over its folds, and the people they rest on.

        Scores are not pooled over the windows of all folds: the more a fold tests of a class the fewer are left to
        train on, so that even a classifier without information would score below chance.
        """
        table = self.table
        selected: list[dict[str, Any]] = []
        if row == "majority":
            probability: list[FloatArray] = list(majority(table, folds).probability)
        elif row in FINETUNED:
            probability, selected = self._finetuned(row, folds, seed)
        else:
            probability, selected = self._linear(self.inputs.of(row, seed), folds)
        scores = [score(table.label[fold.test], each) for fold, each in zip(folds, probability, strict=True)]
        train = [fold.train for fold in folds]
        return {
            "seed": seed,
            **{metric: _mean([of_fold[metric] for of_fold in scores]) for metric in METRICS},
            "train_windows": round(float(np.mean([len(rows) for rows in train])), 1),
            "train_people": round(float(np.mean([len(np.unique(table.person[rows])) for rows in train])), 1),
            "chosen": selected,
        }  # fmt: skip

    def _linear(self, x: Float64Array, folds: Sequence[Fold]) -> tuple[list[FloatArray], list[dict[str, Any]]]:
        label, classes = self.table.label, len(self.table.classes)
        fits = [fit_logistic({"x": x}, label, classes, fold, _C, "balanced") for fold in folds]
        return [fit.probability for fit in fits], [{"C": fit.c} for fit in fits]

    def _finetuned(
        self, row: str, folds: Sequence[Fold], seed: int
    ) -> tuple[list[FloatArray], list[dict[str, Any]]]:  # fmt: skip
        signal = self.backbone.signal
        start = self.backbone if row == "finetuned" else untrained(self.backbone, seed)
        dataset = self.data.dataset(signal)
        results = [
            finetune({signal: start}, {signal: dataset}, self.table, fold, self.options, f"{seed}/{fold.name}")
            for fold in folds
        ]
        return [probability for probability, _ in results], [{"epoch": epoch} for _, epoch in results]


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean of the defined values: a metric is not defined where a class is missing."""
    defined = [value for value in values if value is not None]
    return round(float(np.mean(defined)), _DIGITS) if defined else None


def _row(name: str, fraction: float, per_seed: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of ``results.json``: means over seeds, and standard deviations under ``sd``; None where not defined."""
    mean: dict[str, float | None] = {}
    spread: dict[str, float | None] = {}
    for metric in METRICS:
        values = [of_seed[metric] for of_seed in per_seed if of_seed[metric] is not None]
        mean[metric] = _mean(values)
        spread[metric] = round(float(np.std(values, ddof=1)), _DIGITS) if len(values) > 1 else None
    people, windows = (
        round(float(np.mean([of_seed[key] for of_seed in per_seed])), 1) for key in ("train_people", "train_windows")
    )
    return {
        "name": name, "fraction": fraction, **mean, "sd": spread, "train_people": people, "train_windows": windows,
        "per_seed": list(per_seed),
    }  # fmt: skip


def _about(
    probe: ProbeOptions, data: ShardSetHandle, backbone: Backbone, table: LabelTable, folds: Sequence[Fold]
) -> dict[str, Any]:  # fmt: skip
    tested, shards = np.concatenate([fold.test for fold in folds]), data.index
    channels = shards.signals[backbone.signal].channels
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
        "task": "labels", "label": probe.label, "classes": list(table.classes), "protocol": probe.protocol,
        "signal": backbone.signal, "simulated": table.simulated, "data": shards.fingerprint, "pooling": probe.pooling,
        "windows": len(tested), "people": len(np.unique(table.person[tested])),
        "windows_of_class": np.bincount(table.label[tested], minlength=len(table.classes)).tolist(),
        "encoder": {
            "url": storage.without_secrets(backbone.url), "sha256": backbone.sha256, "simulated": backbone.simulated,
            "people": None if backbone.people is None else len(backbone.people), "loaded": backbone.loaded,
        },
        "notes": notes,
    }  # fmt: skip


def table_of(results: Mapping[str, Any]) -> Iterator[str]:
    """Lines of the printed table of results."""
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
