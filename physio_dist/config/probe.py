"""The options of ``physio-dist probe``, their defaults and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from physio_dist.config.loader import between, one_of, plain_name
from physio_dist.config.pretrain import RunOptions
from physio_dist.config.search import POOLINGS
from physio_dist.errors import UserError

TASKS = ("labels", "reconstruction")
PROTOCOLS = ("grouped_kfold", "holdout")
MASKS = ("chest", "chest_lead", "limb", "time")


@dataclass
class ProbeOptions:
    # labels: a linear probe of a label; reconstruction: hidden leads and patches against simple predictors.
    task: str = "labels"
    # A shard set.
    data: str = "???"
    # Of labels. An export's folder, or a CBraMod checkpoint (.pth or .safetensors) by URL.
    encoder: str = ""
    label: str = ""
    # grouped_kfold, or holdout (the shard set's test split).
    protocol: str = "grouped_kfold"
    folds: int = 5
    # Groups of training people that take turns as validation people, on whom C is chosen.
    val_folds: int = 3
    # Repetitions: of the split, of who is labelled, of the untrained encoder's weights.
    seeds: int = 3
    # Shares of the training people whose labels are used.
    fractions: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    # Over patches, with channels averaged or kept apart.
    pooling: str = "channels_mean_std"
    # Folder in which frozen features are kept for this probe and later ones; empty for run.dir/features.
    feature_cache: str = ""
    # Also train encoder and head end to end, from the pretrained and from the untrained weights.
    finetune: bool = False
    epochs: int = 10
    lr: float = 1e-4
    batch: int = 32
    # Of reconstruction. A run of pretraining, or a list of runs that differ in their seed.
    runs: Any = ""
    # What is reconstructed; the ridge regression is fitted on the train split.
    split: str = "test"
    # chest: all V leads from the others; chest_lead: each V lead from all others; limb: five limb leads from one and
    # the V leads; time: half of the patches of each group of leads.
    masks: list[str] = field(default_factory=lambda: list(MASKS))
    # Samples before and after that the ridge regression across whole leads sees as well.
    context: int = 0


@dataclass
class ProbeConfig:
    """The options of ``physio-dist probe``."""

    run: RunOptions = field(default_factory=lambda: RunOptions(name="probe"))
    probe: ProbeOptions = field(default_factory=ProbeOptions)


def check_probe(options: ProbeConfig) -> None:
    """Refuse values no probe could use, before anything is read."""
    probe = options.probe
    plain_name(options.run.name)
    one_of("probe.task", probe.task, TASKS)
    one_of("probe.protocol", probe.protocol, PROTOCOLS)
    one_of("probe.pooling", probe.pooling, POOLINGS)
    one_of("probe.split", probe.split, ("val", "test"))
    if not probe.data:
        raise UserError("probe.data is empty: give the URL of a shard set")
    for name, least in (("folds", 2), ("val_folds", 2), ("seeds", 1), ("epochs", 1), ("batch", 1), ("context", 0)):
        if getattr(probe, name) < least:
            raise UserError(f"probe.{name}={getattr(probe, name)}: it must be at least {least}")
    if not 0 < probe.lr < math.inf:
        raise UserError(f"probe.lr={probe.lr}: it must be a positive number")
    if probe.task == "labels":
        if not probe.encoder or not probe.label:
            raise UserError(
                "probe.task=labels needs probe.encoder, the folder that `physio-dist export RUN OUT` wrote, and "
                "probe.label, the name of a label of the shard set"
            )
        if not probe.fractions:
            raise UserError("probe.fractions is empty: give shares of the training people, such as [0.1, 1.0]")
        for share in probe.fractions:
            between("probe.fractions", share, 1e-6, 1.0)
    else:
        runs_of(probe)
        if not probe.masks:
            raise UserError(f"probe.masks is empty: give some of {', '.join(MASKS)}")
        for mask in probe.masks:
            one_of("probe.masks", mask, MASKS)


def runs_of(probe: ProbeOptions) -> list[str]:
    """``probe.runs`` as a list of URLs.

    Raises:
        UserError: neither a URL nor a list of them.
    """
    runs = probe.runs if isinstance(probe.runs, list) else [probe.runs]
    if not runs or not all(isinstance(run, str) and run for run in runs):
        raise UserError("probe.task=reconstruction needs probe.runs: the folder run.dir/run.name of a run, or a list")
    return [str(run).rstrip("/") for run in runs]
