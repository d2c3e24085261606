"""Listings of options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from physio_dist import config
from physio_dist.config.listing import describe_options, help_text
from physio_dist.config.reference import page

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "options.md"
SCHEMAS = [
    config.PretrainConfig, config.TuneConfig, config.FoldsConfig, config.ProbeConfig, config.ShardConfig,
    config.IndexOptions, config.EmbedConfig,
]  # fmt: skip


def test_options_page_is_what_the_declarations_generate() -> None:
    assert PAGE.read_text() == page(), "run `python -m physio_dist.config.reference > docs/reference/options.md`"


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_option_has_a_description_and_is_listed(schema: type) -> None:
    listed = {doc.name for doc in describe_options(schema)}
    fields = config.option_fields(schema)
    assert listed == set(fields)
    for name, item in fields.items():
        assert isinstance(item, dataclasses.Field) and item.metadata.get("help"), name


def test_help_text_shows_default_description_and_allowed_values() -> None:
    text = help_text(config.PretrainConfig)
    assert '  train.precision ("bf16")\n' in text and "One of fp32, bf16, fp16." in text
    assert "  data.index (required)\n" in text
    assert "`" not in text
