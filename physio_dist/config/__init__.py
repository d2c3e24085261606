"""Options of every command: a schema and its checks in a module each; ``loader`` merges them with a file and words."""

from physio_dist.config.cluster import ClusterOptions, check_cluster
from physio_dist.config.loader import (
    Parser,
    between,
    flatten,
    load,
    one_of,
    option_types,
    plain_name,
    refuse_another,
    to_yaml,
)
from physio_dist.config.pretrain import (
    PRECISIONS,
    PRESETS,
    DataOptions,
    MaskOptions,
    ModelOptions,
    PretrainConfig,
    RunOptions,
    TrainOptions,
    ZeroOptions,
    check_pretrain,
    mixture,
)
from physio_dist.config.probe import ProbeConfig, ProbeOptions, check_probe, runs_of
from physio_dist.config.search import POOLINGS, SearchOptions, check_search
from physio_dist.config.shard import EegOptions, ShardConfig, SplitOptions, WindowOptions, check_shard
from physio_dist.config.task import TaskOptions, check_task
from physio_dist.config.tune import TuneConfig, TuneOptions, check_tune

__all__ = [
    "POOLINGS",
    "PRECISIONS",
    "PRESETS",
    "ClusterOptions",
    "DataOptions",
    "EegOptions",
    "MaskOptions",
    "ModelOptions",
    "Parser",
    "PretrainConfig",
    "ProbeConfig",
    "ProbeOptions",
    "RunOptions",
    "SearchOptions",
    "ShardConfig",
    "SplitOptions",
    "TaskOptions",
    "TrainOptions",
    "TuneConfig",
    "TuneOptions",
    "WindowOptions",
    "ZeroOptions",
    "between",
    "check_cluster",
    "check_pretrain",
    "check_probe",
    "check_search",
    "check_shard",
    "check_task",
    "check_tune",
    "flatten",
    "load",
    "mixture",
    "one_of",
    "option_types",
    "plain_name",
    "refuse_another",
    "runs_of",
    "to_yaml",
]  # fmt: skip
