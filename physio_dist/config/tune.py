"""Options of ``tune.py``, their defaults and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from physio_dist.config.cluster import LONGEST_S
from physio_dist.config.loader import between, one_of, plain_name
from physio_dist.config.pretrain import RunOptions
from physio_dist.config.search import SearchOptions, check_search
from physio_dist.config.task import TaskOptions, check_task
from physio_dist.errors import UserError


@dataclass
class TuneOptions(TaskOptions):
    # Shard set with both signals and labels.
    data: str = "???"
    # An export's folder, with {fold} for the fold's name, or {fold: folder}; for EEG also a CBraMod checkpoint by URL.
    ecg_encoder: Any = "???"
    eeg_encoder: Any = "???"
    # Configurations that are tried; each for every kind of input.
    trials: int = 32
    # latin_hypercube draws all of them beforehand; optuna proposes by what was found, for each row and fold apart.
    search: str = "latin_hypercube"
    # asha stops what falls behind; fifo lets every trial finish.
    scheduler: str = "asha"
    max_epochs: int = 40
    # Configurations that each fold selects, best first, and whose heads' probabilities are averaged at the test.
    ensemble_size: int = 1
    # CPUs of a trial.
    cpus: float = 1.0
    # Seconds to wait for nodes that an autoscaler may bring, where there is no room for a trial at first.
    placement_timeout_s: float = 0.0
    # Folder of Ray Tune's own state; empty for run.dir/run.name/ray.
    ray_storage: str = ""
    # Folder in which frozen features are kept for this sweep and later ones; empty for run.dir/features.
    feature_cache: str = ""
    # Evaluations with labels permuted by recording within people, as a control for leakage.
    permutations: int = 0
    # Fit the temperature of each head's probabilities on its validation people.
    calibrate: bool = False
    # Rows with one modality replaced by noise, as a control: they should gain nothing over the other alone.
    noise_control: bool = False
    # A row more: both encoders and a linear head over them trained end to end, what freezing costs.
    finetune: bool = False
    finetune_epochs: int = 5
    # Of the encoders; the head's is ten times that.
    finetune_lr: float = 1e-4


@dataclass
class TuneConfig:
    """The options of ``tune.py``."""

    run: RunOptions = field(default_factory=lambda: RunOptions(name="sweep"))
    tune: TuneOptions = field(default_factory=TuneOptions)
    search: SearchOptions = field(default_factory=SearchOptions)


def check_tune(options: TuneConfig) -> None:
    """Refuse values no sweep could use, before anything is read or started."""
    tune = options.tune
    plain_name(options.run.name)
    check_task(tune)
    one_of("tune.scheduler", tune.scheduler, ("asha", "fifo"))
    one_of("tune.search", tune.search, ("latin_hypercube", "optuna"))
    if not tune.data:
        raise UserError("tune.data is empty: give the URL of a shard set with ECG and EEG")
    least_of = {
        "folds": 2, "val_folds": 2, "trials": 1, "max_epochs": 1, "ensemble_size": 1, "permutations": 0,
        "finetune_epochs": 1,
    }  # fmt: skip
    for name, least in least_of.items():
        if getattr(tune, name) < least:
            raise UserError(f"tune.{name}={getattr(tune, name)}: it must be at least {least}")
    if tune.ensemble_size > tune.trials:
        raise UserError(
            f"tune.ensemble_size={tune.ensemble_size}: only tune.trials={tune.trials} configurations are tried"
        )
    if not 0 < tune.finetune_lr < math.inf:
        raise UserError(f"tune.finetune_lr={tune.finetune_lr}: it must be a positive number")
    if not 0 < tune.cpus < math.inf:
        raise UserError(f"tune.cpus={tune.cpus}: it must be positive")
    between("tune.placement_timeout_s", tune.placement_timeout_s, 0.0, LONGEST_S)
    for name, value in (("ecg_encoder", tune.ecg_encoder), ("eeg_encoder", tune.eeg_encoder)):
        folders = list(value.values()) if isinstance(value, dict) else [value]
        if not folders or not all(isinstance(folder, str) and folder for folder in folders):
            raise UserError(f"tune.{name} must be a folder or {{fold: folder}}, not {value!r}")
    check_search(options.search)
