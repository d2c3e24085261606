"""Listings of options from their declarations, for ``--help`` and for the documentation."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from physio_dist.config.options import OneOf, Range, plain_value


@dataclass(frozen=True)
class OptionDoc:
    """One option as it is listed.

    Attributes:
        name: dotted.
        default: as YAML writes it; ``required`` where there is none.
        description: with the values allowed.
    """

    name: str
    default: str
    description: str


def describe_options(schema: type, prefix: str = "") -> Iterator[OptionDoc]:
    """Every option of a schema, in its order."""
    yield from _describe(schema(), prefix)


def _describe(options: Any, prefix: str) -> Iterator[OptionDoc]:
    for item in dataclasses.fields(options):
        value, name = getattr(options, item.name), prefix + item.name
        if "help" not in item.metadata:
            yield from _describe(value, f"{name}.")
            continue
        default = item.metadata["shown"] or json.dumps(plain_value(item, value))
        allowed = [_allowed(check) for check in item.metadata["checks"]]
        yield OptionDoc(
            name, "required" if item.metadata["required"] else default,
            " ".join([item.metadata["help"], *(text for text in allowed if text)]),
        )  # fmt: skip


def _allowed(check: Any) -> str:
    if isinstance(check, OneOf):
        return f"One of {check}."
    if isinstance(check, Range):
        return f"{str(check).capitalize()}." if str(check)[0].isalpha() else f"In {check}."
    return ""


def help_text(schema: type) -> str:
    """The options as the end of a command's ``--help``."""
    lines = ["options (key=value), with their defaults:"]
    for doc in describe_options(schema):
        lines.append(f"  {doc.name} ({doc.default})")
        text = doc.description.replace("`", "")
        lines += textwrap.wrap(text, 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)
