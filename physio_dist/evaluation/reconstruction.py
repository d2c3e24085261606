"""Reconstruction of hidden leads and patches on held-out recordings, compared with simple predictors: zero,
interpolation in time, ridge regression across leads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from physio_dist import storage
from physio_dist.config.probe import ProbeConfig
from physio_dist.data.handle import open_handle
from physio_dist.data.loading.dataset import ShardDataset
from physio_dist.errors import UserError
from physio_dist.evaluation.backbones import Backbone, refuse_overlap
from physio_dist.evaluation.features import check_fits
from physio_dist.evaluation.probe import begin, finish
from physio_dist.models.encoders.criss_cross import PATCH, EncoderConfig, MaskedModel
from physio_dist.models.encoders.patches import to_patches
from physio_dist.objectives.baselines import LeadRidge, fit_lead_ridge, predict_interpolation, predict_zero
from physio_dist.objectives.dual_mask import MaskConfig, sample_masks
from physio_dist.runtime.arrays import BoolArray, Float64Array, Int64Array
from physio_dist.signals.montage import LIMB, canonical, mask_groups

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]

PREDICTORS = ("model", "zero", "interpolation", "ridge")
_DIGITS = 6
_BATCH = 32
_INTRA = 0.5


@dataclass(frozen=True)
class PretrainedRun:
    """Newest checkpoint of a pretraining run.

    Attributes:
        url: of the run.
        step: of the checkpoint.
        encoder: the encoder's configuration.
        signal: ``signal channels rate unit_uv simulated``.
        weights: of ``MaskedModel``, encoder and reconstruction head.
        people: pseudonyms of the people it was trained on; None where not known.
    """

    url: str
    step: int
    encoder: dict[str, Any]
    signal: dict[str, Any]
    weights: dict[str, Tensor]
    people: frozenset[int] | None


def reconstruction(
    options: ProbeConfig, read_run: Callable[[str], PretrainedRun], say: Callable[[str], None]
) -> dict[str, Any]:  # fmt: skip
    """Evaluate, and write ``config.yaml`` and ``results.json`` to ``run.dir/run.name``.

    Args:
        options: with ``probe.task=reconstruction``.
        read_run: opens the newest checkpoint of a run.
        say: receives progress messages.

    Returns:
        Content of ``results.json``.

    Raises:
        UserError: data and run do not go together, or the run was trained on people it is to be tested on.
        DataError: data or checkpoint are damaged.
    """
    probe, run_url = options.probe, begin(options)
    data = open_handle(probe.data, options.data)
    shards = data.index
    trained = [read_run(url) for url in probe.runs]
    source = data.dataset(trained[0].signal["signal"])
    train, test = source.members("train")[0], source.members(probe.split)[0]
    if not len(test) or not len(train):
        raise UserError(
            f"{shards.url} has no windows in its {'train' if len(test) else probe.split} split; convert the recordings "
            "again with shares of people in split.val and split.test"
        )
    models = [_model(run, source, test, probe.split) for run in trained]
    channels = source.info.channels
    kinds = {kind: list(hidden_leads(kind, channels)) for kind in probe.masks}
    say(f"fitting a ridge regression across {len(channels)} leads to {len(train)} windows of the train split")
    ridge = fit_lead_ridge(_whole_windows(source, train), probe.context)
    rows: list[dict[str, Any]] = []
    for kind, hidden in kinds.items():
        say(f"{kind}: {len(test)} windows of the {probe.split} split, {len(hidden)} mask(s), {len(models)} run(s)")
        predictors = {f"model/{i}": model for i, model in enumerate(models)} | _rivals(ridge)
        found = reconstruction_r2(source, test, hidden, predictors, options.run.seed)
        rows += _rows(kind, channels, found, len(models))
    results = {
        "kind": "reconstruction", "task": "reconstruction", "split": probe.split, "data": shards.fingerprint,
        "simulated": shards.simulated, "windows": len(test),
        "people": len(np.unique(source.sample_tables[0].person[test])), "train_windows": len(train),
        "context": probe.context,
        "runs": [{"url": storage.without_secrets(run.url), "step": run.step} for run in trained], "rows": rows,
    }  # fmt: skip
    finish(options, run_url, results)
    return results


def _model(run: PretrainedRun, source: ShardDataset, test: Int64Array, split: str) -> Predict:
    """The run's reconstruction.

    Raises:
        UserError: it does not fit the set, or knows people of the split.
    """
    model = MaskedModel(EncoderConfig(**run.encoder))
    model.load_state_dict(run.weights)
    about = run.signal
    backbone = Backbone(
        model.encoder, about["signal"], "", float(about["rate"]), float(about["unit_uv"]), tuple(about["channels"]),
        run.people, bool(about["simulated"]), run.url,
    )  # fmt: skip
    check_fits(backbone, source.sets[0])
    refuse_overlap(
        backbone, source.sample_tables[0].person[test].tolist(), split,
        "Give a run that was trained on a shard set of the same recordings with the same split.val and split.test",
    )  # fmt: skip
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(device).eval()

    @torch.no_grad()
    def predict(x: Tensor, hidden: Tensor, valid: Tensor) -> Tensor:
        guess: Tensor = model(x.to(device), hidden.to(device), valid.to(device)).float().cpu()
        return guess

    return predict


def _rivals(ridge: LeadRidge) -> dict[str, Predict]:
    return {
        "zero": lambda x, hidden, valid: predict_zero(x),
        "interpolation": predict_interpolation,
        "ridge": lambda x, hidden, valid: ridge.predict(x, ~hidden & valid),
    }


def hidden_leads(kind: str, channels: Sequence[str]) -> Iterator[BoolArray | None]:
    """The masks of a kind: bool ``[channel]``, leads hidden as a whole; None for a mask in time, which is drawn.

    Raises:
        UserError: the channels do not allow it.
    """
    names = [canonical(channel) for channel in channels]
    limb = np.array([name in LIMB for name in names])
    chest = np.array([name is not None and name not in LIMB for name in names])
    if kind == "time":
        yield None
    elif not (chest.any() and limb.any()):
        raise UserError(f"probe.masks={kind} needs limb leads and V leads; the set has {', '.join(channels)}")
    elif kind == "chest":
        yield chest
    elif kind == "chest_lead":
        for lead in np.flatnonzero(chest):
            yield np.arange(len(names)) == lead
    else:
        # Two visible limb leads would make arithmetic of the others.
        yield limb & (np.arange(len(names)) != np.flatnonzero(limb)[0])


def _batches(source: ShardDataset, ids: Int64Array) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows ``[batch, channel, patch, 200]`` in units of 100 uV and their validity ``[batch, channel]``."""
    for low in range(0, len(ids), _BATCH):
        mine = ids[low : low + _BATCH]
        batch = source.read_batch(0, np.zeros_like(mine), mine, mine, len(mine))
        x = to_patches(torch.from_numpy(batch.signal), torch.from_numpy(batch.scale))
        batch.release()
        yield x, torch.from_numpy(batch.valid)


def _whole_windows(source: ShardDataset, ids: Int64Array) -> Iterator[Tensor]:
    found = 0
    for x, valid in _batches(source, ids):
        whole = x[valid.all(dim=1)].flatten(2)
        found += len(whole)
        yield whole
    if not found:
        raise UserError(f"{source.sets[0].url} has no window in its train split in which all leads are valid")


def reconstruction_r2(
    source: ShardDataset, ids: Int64Array, masks: Sequence[BoolArray | None], predictors: Mapping[str, Predict],
    seed: int,
) -> dict[str, dict[str, Float64Array]]:  # fmt: skip
    """R2 of each lead over what was hidden of it and valid, for each predictor.

    Args:
        source: of the windows.
        ids: windows of the first set.
        masks: see :func:`hidden_leads`; what they hide of a lead counts together.
        predictors: name -> function of windows, hidden and valid patches.
        seed: of masks in time.

    Returns:
        For each predictor ``pooled``: float64 ``[channel]``, 1 - squared error / squared deviation from the mean, over
        all windows together, where a few loud ones weigh most; and ``median``: that of the windows. NaN for leads of
        which nothing is hidden.
    """
    channels = source.info.channels
    groups, patches = mask_groups(channels), source.info.samples // PATCH
    sums = {name: np.zeros((len(channels), 4)) for name in predictors}
    each: dict[str, list[Float64Array]] = {name: [] for name in predictors}
    for mask in masks:
        low = 0
        for x, valid in _batches(source, ids):
            seen = valid[:, :, None].expand(x.shape[:3])
            if mask is None:
                place = np.arange(low, low + len(x), dtype=np.int64)
                drawn = sample_masks(MaskConfig(_INTRA, 0.0), groups, patches, seed, "probe", place)
                hidden = torch.from_numpy(drawn.hidden)
            else:
                hidden = torch.from_numpy(mask)[None, :, None].expand(x.shape[:3])
            low += len(x)
            counted = (hidden & seen).unsqueeze(-1)
            target = torch.where(counted, x, 0.0).double()
            n = counted.expand(x.shape).sum(dim=(2, 3))
            for name, predict in predictors.items():
                error = torch.where(counted, predict(x, hidden, seen).double() - target, 0.0)
                parts = (n, target.sum(dim=(2, 3)), target.square().sum(dim=(2, 3)), error.square().sum(dim=(2, 3)))
                table = torch.stack([part.double() for part in parts], dim=-1).numpy()
                sums[name] += table.sum(axis=0)
                each[name].append(_r2(table))
    with np.errstate(invalid="ignore"):
        return {name: {"pooled": _r2(sums[name]), "median": _median(np.concatenate(each[name]))} for name in predictors}


def _r2(table: Float64Array) -> Float64Array:
    """From counts, sums, sums of squares and squared errors along the last axis; NaN where nothing varies."""
    n, total, squares, error = np.moveaxis(table, -1, 0)
    spread = squares - total**2 / np.maximum(n, 1.0)
    found: Float64Array = 1.0 - np.divide(error, spread, out=np.full_like(error, np.nan), where=spread > 0)
    return found


def _median(values: Float64Array) -> Float64Array:
    found = [np.median(known) if len(known := column[~np.isnan(column)]) else np.nan for column in values.T]
    return np.array(found)


def _rows(
    kind: str, channels: Sequence[str], found: Mapping[str, Mapping[str, Float64Array]], runs: int
) -> Iterator[dict[str, Any]]:
    """A row for each predictor; the model's figures are means over runs, with standard deviations."""
    for name in PREDICTORS:
        several = [found[f"model/{i}"] for i in range(runs)] if name == "model" else [found[name]]
        row: dict[str, Any] = {"mask": kind, "predictor": name}
        for what, key in (("pooled", "r2"), ("median", "r2_median")):
            leads = np.stack([one[what] for one in several])
            hidden = ~np.isnan(leads).any(axis=0)
            mean = leads[:, hidden].mean(axis=1)
            row[key] = round(float(mean.mean()), _DIGITS)
            row[f"{key}_sd"] = round(float(mean.std(ddof=1)), _DIGITS) if len(mean) > 1 else None
            row[f"{key}_leads"] = {
                channels[i]: round(float(leads[:, i].mean()), _DIGITS) for i in np.flatnonzero(hidden).tolist()
            }
        yield row


def table_of(results: Mapping[str, Any]) -> Iterator[str]:
    """The results as a table, line by line."""
    yield (
        f"R2 on {results['windows']} windows of {results['people']} people of the {results['split']} split, pooled "
        f"over windows (median of windows); {len(results['runs'])} run(s), ridge fitted to {results['train_windows']} "
        "windows"
    )
    for mask in dict.fromkeys(row["mask"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["mask"] == mask]
        leads = list(rows[0]["r2_leads"])
        yield f"{mask:<15}{'mean':>16}" + "".join(f"{lead:>16}" for lead in leads)
        for row in rows:
            cells = [(row["r2"], row["r2_median"])]
            cells += [(row["r2_leads"][lead], row["r2_median_leads"][lead]) for lead in leads]
            yield f"  {row['predictor']:<13}" + "".join(f"{f'{r2:.3f} ({median:.3f})':>16}" for r2, median in cells)
