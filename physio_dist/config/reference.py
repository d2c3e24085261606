"""The options page of the documentation.

``python -m physio_dist.config.reference > docs/reference/options.md`` writes it.
"""

from __future__ import annotations

from physio_dist.config.cache import EmbedConfig
from physio_dist.config.listing import describe_options
from physio_dist.config.pretrain import PretrainConfig
from physio_dist.config.probe import ProbeConfig
from physio_dist.config.shard import IndexOptions, ShardConfig
from physio_dist.config.tune import FoldsConfig, TuneConfig


def markdown_table(schema: type) -> str:
    """The options as a Markdown table."""
    rows = ["| option | default | description |", "|---|---|---|"]
    for doc in describe_options(schema):
        description = doc.description.replace("|", "\\|")
        default = doc.default if doc.default == "required" else f"`{doc.default}`"
        rows.append(f"| `{doc.name}` | {default} | {description} |")
    return "\n".join(rows)


_SECTIONS: list[tuple[str, str, type]] = [
    (
        "Pretraining",
        "`deepspeed physio_dist/pretrain.py`, `python -m physio_dist.launch`, and `physio-dist plan`, which checks "
        "them and estimates the run.",
        PretrainConfig,
    ),
    ("Fusion sweeps", "`python -m physio_dist.tune`.", TuneConfig),
    ("Folds of a sweep", "`physio-dist folds`, with the file of the sweep.", FoldsConfig),
    ("Probes", "`physio-dist probe`.", ProbeConfig),
    ("Frozen features", "`physio-dist embed`.", EmbedConfig),
    ("Conversion", "`physio-dist shard`.", ShardConfig),
    ("Index of existing shards", "`physio-dist index`.", IndexOptions),
]


def page() -> str:
    """The options page of the documentation, in Markdown."""
    parts = [
        "# Options",
        "Options are given in the YAML file of `--config` and as `key=value` words, which override the file. "
        "`--help` of a command prints the same list. `python -m physio_dist.config.reference` generates this page.",
    ]
    for title, commands, schema in _SECTIONS:
        parts += [f"## {title}", commands, markdown_table(schema)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")
