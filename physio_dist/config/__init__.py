"""Options of every command: typed dataclasses that check themselves; :mod:`.loader` reads them from YAML and words."""

from physio_dist.config.cache import CacheOptions, EmbedConfig
from physio_dist.config.cluster import ClusterOptions, WorkerRange
from physio_dist.config.loader import Parser, load, option_fields, refuse_another, to_yaml
from physio_dist.config.mask import MaskOptions
from physio_dist.config.options import flatten
from physio_dist.config.pretrain import (
    PRECISIONS,
    PRESETS,
    DataOptions,
    ModelOptions,
    PretrainConfig,
    Resume,
    RunOptions,
    ShardSource,
    TrainOptions,
    ZeroOptions,
)
from physio_dist.config.probe import ProbeConfig, ProbeOptions
from physio_dist.config.search import POOLINGS, SearchOptions
from physio_dist.config.shard import EegOptions, IndexOptions, ShardConfig, SplitOptions, WindowOptions
from physio_dist.config.task import TaskOptions
from physio_dist.config.tune import FoldEncoders, FoldsConfig, TuneConfig, TuneOptions, parse_encoders

__all__ = [
    "POOLINGS",
    "PRECISIONS",
    "PRESETS",
    "CacheOptions",
    "ClusterOptions",
    "DataOptions",
    "EegOptions",
    "EmbedConfig",
    "FoldEncoders",
    "FoldsConfig",
    "IndexOptions",
    "MaskOptions",
    "ModelOptions",
    "Parser",
    "PretrainConfig",
    "ProbeConfig",
    "ProbeOptions",
    "Resume",
    "RunOptions",
    "SearchOptions",
    "ShardConfig",
    "ShardSource",
    "SplitOptions",
    "TaskOptions",
    "TrainOptions",
    "TuneConfig",
    "TuneOptions",
    "WindowOptions",
    "WorkerRange",
    "ZeroOptions",
    "flatten",
    "load",
    "option_fields",
    "parse_encoders",
    "refuse_another",
    "to_yaml",
]  # fmt: skip
