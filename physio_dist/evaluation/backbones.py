"""Frozen encoders: an export of ours, or a CBraMod checkpoint by URL."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from physio_dist import storage
from physio_dist.errors import DataError, UserError
from physio_dist.models import cbramod
from physio_dist.models.encoders.criss_cross import UNIT_UV, CrissCrossEncoder
from physio_dist.models.export import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    encoder_url,
    load_export,
    read_export_config,
    save_encoder,
)
from physio_dist.runs.run_dir import PEOPLE_FILE
from physio_dist.runtime.seeding import seed_torch


@dataclass(frozen=True)
class Backbone:
    """An encoder that is not trained any more, and what is known of its making.

    Attributes:
        module: in eval mode, fp32, on the CPU.
        signal: ``ecg`` or ``eeg``.
        sha256: of the file of its weights.
        rate: Hz of the signals it takes.
        unit_uv: their unit in microvolts.
        channels: those of its training; () where not known.
        people: pseudonyms of those it was pretrained on; None where not known.
        simulated: whether any of them were a simulator's.
        url: where it was found.
        sources: names of the corpora of its training; () where not known.
        loaded: what of the file was used, in a line.
    """

    module: CrissCrossEncoder
    signal: str
    sha256: str
    rate: float
    unit_uv: float
    channels: tuple[str, ...]
    people: frozenset[int] | None
    simulated: bool
    url: str
    sources: tuple[str, ...] = ()
    loaded: str = ""


def open_backbone(url: str, signal: str | None = None) -> Backbone:
    """Load an encoder.

    Args:
        url: folder of an export; or a CBraMod checkpoint (``.pth``, ``.safetensors``); ``cbramod`` is short for the
            published one, whose size and hash are verified. Checkpoints from the web are kept in the user's cache
            (``physio-dist/weights``) under their URL.
        signal: ``ecg`` or ``eeg``; None takes what the encoder is for.

    Raises:
        UserError: there is nothing of the kind, or it is for the other signal.
        DataError: the weights are damaged, or the published checkpoint is not what was published.
    """
    url = encoder_url(url)
    opened = _checkpoint(url) if cbramod.is_checkpoint(url) else _export(url)
    if signal not in (None, opened.signal):
        what = "CBraMod checkpoints are for" if opened.people is None and not opened.channels else "this encoder is for"
        raise UserError(
            f"{url}: {what} {opened.signal} signals, and {signal} was asked for; give an encoder that was pretrained "
            f"on {signal} (data.signal={signal})"
        )
    return opened


def _export(url: str) -> Backbone:
    where = storage.join(url, CONFIG_FILE)
    try:
        about = read_export_config(url)
    except UserError as error:
        raise UserError(f"{error}; {_instead(url)}") from None
    try:
        signal, rate, unit_uv = about["signal"], float(about["rate"]), float(about["unit_uv"])
        channels, simulated = tuple(map(str, about["channels"])), bool(about["simulated"])
        sources = tuple(map(str, about.get("sources", ())))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: signal, rate, unit_uv, channels or simulated: {error!r}; export it again") from None
    if signal not in ("ecg", "eeg") or not 0 < rate < math.inf or not 0 < unit_uv < math.inf:
        raise UserError(f"{where}: signal {signal!r} at {rate:g} Hz in units of {unit_uv:g} uV is none of ours")
    module = load_export(url)
    sha256, people = about["encoder_sha256"], people_of(url)
    return Backbone(module, signal, sha256, rate, unit_uv, channels, people, simulated, url, sources)


def _instead(url: str) -> str:
    """Advice for a folder that is no export."""
    if "checkpoints" in storage.names(url):
        return f"this is a run: `physio-dist export {url} OUT` makes an export of it"
    return "give the folder that `physio-dist export RUN OUT` wrote, or a CBraMod checkpoint (.pth, .safetensors)"


def people_of(url: str) -> frozenset[int] | None:
    """Pseudonyms of those an export or a run was trained on; None where it has no list.

    Raises:
        DataError: the list is damaged.
    """
    where = storage.join(url, PEOPLE_FILE)
    try:
        listed = storage.read_json(where)
    except storage.NotFoundError:
        return None
    if not isinstance(listed, list) or not all(re.fullmatch("[0-9a-f]{16}", str(one)) for one in listed):
        raise DataError(f"{where} is not a list of pseudonyms of 16 hexadecimal digits; export the run again")
    return frozenset(int(one, 16) for one in listed)


def _checkpoint(url: str) -> Backbone:
    loaded = cbramod.load_checkpoint(url)
    return Backbone(
        loaded.encoder, "eeg", loaded.sha256, cbramod.SAMPLING_RATE, UNIT_UV, (), None, simulated=False, url=url,
        loaded=loaded.report.summary_line(),
    )  # fmt: skip


def exported_hash(url: str) -> str | None:
    """The hash of an export's weights as it tells it; None for a checkpoint, which would have to be fetched."""
    if cbramod.is_checkpoint(encoder_url(url)):
        return None
    return str(read_export_config(url).get("encoder_sha256"))


def files_of(backbone: Backbone) -> dict[str, bytes]:
    """An export folder with an opened encoder, name -> bytes: a copy of the export it was opened from, or made of the
    checkpoint.

    Raises:
        StorageError: the export cannot be read any more.
    """
    if cbramod.is_checkpoint(backbone.url):
        about = {
            "signal": backbone.signal, "rate": backbone.rate, "unit_uv": backbone.unit_uv,
            "channels": list(backbone.channels), "simulated": backbone.simulated, "checkpoint_sha256": backbone.sha256,
        }  # fmt: skip
        return save_encoder(backbone.module, about)
    wanted = {WEIGHTS_FILE, CONFIG_FILE, PEOPLE_FILE, "README.md"}
    there = sorted(wanted & set(storage.names(backbone.url)) | {WEIGHTS_FILE, CONFIG_FILE})
    return {name: storage.read_bytes(storage.join(backbone.url, name)) for name in there}


def untrained(backbone: Backbone, seed: int) -> Backbone:
    """An encoder of the same shape that has learnt nothing; the same for the same seed and signal.

    What the shape alone, without pretraining, is good for is the baseline of every frozen encoder.
    """
    with torch.random.fork_rng(devices=[]):
        seed_torch("untrained", backbone.signal, seed)
        module = CrissCrossEncoder(backbone.module.config).eval()
    # The same weights may be those of encoders that differ in what has none, such as dropout.
    about = json.dumps(module.config.to_dict(), sort_keys=True).encode()
    sha256 = hashlib.sha256(save_encoder(module, {})[WEIGHTS_FILE] + about).hexdigest()
    return replace(
        backbone, module=module, sha256=sha256, channels=(), people=frozenset(), simulated=False, sources=(),
        url=f"untrained encoder, seed {seed}",
    )  # fmt: skip


def refuse_overlap(
    backbone: Backbone, test_people: Iterable[int], fold_name: str, advice: str | None = None
) -> None:  # fmt: skip
    """Refuse to test an encoder on people it was pretrained on; nothing where these are not known.

    ``advice`` takes the place of what a sweep is told to do.

    Raises:
        UserError: how many people of which fold, and what to do.
    """
    if backbone.people is None:
        return
    tested = {int(person) for person in test_people}
    if known := len(tested & backbone.people):
        advice = advice or (
            f"Give an encoder pretrained without them, tune.encoders.{backbone.signal}='{{{fold_name}: FOLDER}}' for "
            "this fold (`physio-dist folds` makes a resplit of the shard set to pretrain it on); or pretrain on a "
            "shard set that keeps them in its test split (split.test) and sweep with tune.protocol=holdout"
        )
        raise UserError(
            f"{backbone.url} was pretrained on {known} of the {len(tested)} test people of fold {fold_name}: its "
            f"results on them would say nothing about new people. {advice}"
        )
