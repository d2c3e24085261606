"""Declaration of options: a default, a description and the values allowed, beside each field of a dataclass.

The loader checks what is declared here, ``--help`` lists it, and :mod:`physio_dist.config.reference` writes the options
page of the documentation from it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, get_type_hints

from physio_dist.errors import UserError, closest

T = TypeVar("T")


@dataclass(frozen=True)
class ChangeUrl:
    """Change of the URLs in one option.

    Attributes:
        change: makes another URL of ``(URL, name)``.
        name: of the option.
    """

    change: Callable[[str, str], str]
    name: str

    def __call__(self, url: str, key: str = "") -> str:
        """The changed URL; ``key`` is its name below the option's, such as ``.ecg``."""
        return self.change(url, self.name + key)


class Check(Protocol):
    """A constraint on one option; ``str()`` of it stands in the options reference."""

    def __call__(self, name: str, value: Any) -> None:
        """Refuse a value.

        Raises:
            UserError: names the option.
        """


@dataclass(frozen=True)
class OneOf:
    """Accept listed words only; of a list of words, each."""

    words: Sequence[str]

    def __call__(self, name: str, value: str | list[str]) -> None:
        for word in value if isinstance(value, list) else [value]:
            one_of(name, word, self.words)

    def __str__(self) -> str:
        return ", ".join(f"`{word}`" for word in self.words)


@dataclass(frozen=True)
class Range:
    """Accept numbers of an interval, never NaN; of a list of numbers, each.

    Attributes:
        low: smallest number.
        high: largest number.
        open_low: whether ``low`` itself is refused.
        open_high: whether ``high`` itself is refused.
        message: of the error, after the option and its value.
    """

    low: float
    high: float
    message: str
    open_low: bool = False
    open_high: bool = False

    def __call__(self, name: str, value: float | list[float] | None) -> None:
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not self._holds(number):
                raise UserError(f"{name}={number}: {self.message}")

    def _holds(self, number: float) -> bool:
        above = self.low < number if self.open_low else self.low <= number
        return above and (number < self.high if self.open_high else number <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {self.low:g}"
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


def at_least(low: float) -> Range:
    """Accept numbers from ``low`` on."""
    return Range(low, math.inf, f"it must be at least {low:g}")


def inside(low: float, high: float) -> Range:
    """Accept numbers in ``[low, high]``."""
    return Range(low, high, f"it must lie between {low:g} and {high:g}")


POSITIVE = Range(0.0, math.inf, "it must be a positive number", open_low=True, open_high=True)
NOT_NEGATIVE = Range(0.0, math.inf, "it must not be negative, nor without end", open_high=True)


def option(
    default: Any,
    description: str,
    *checks: Check,
    required: bool = False,
    parse: Callable[[str, Any], Any] | None = None,
    plain: Callable[[Any], Any] | None = None,
    urls: Callable[[Any, ChangeUrl], Any] | None = None,
    shown: str = "",
) -> Any:
    """Field of an options dataclass.

    Args:
        default: the value, a list or a mapping copied for each instance; or a function that returns it.
        description: one or two sentences for ``--help`` and the options reference.
        checks: constraints of the value alone; those between options belong into the dataclass's ``validate``.
        required: whether the loader asks for a value; ``default`` is for instances made in Python.
        parse: makes the field's type of ``(name, value)``, where it is not one of YAML's own; ``value`` is annotated
            with its type in YAML.
        plain: makes what ``parse`` takes of the field's value, for YAML and comparison.
        urls: replaces the URLs in a value by those that a function makes of them (:func:`map_urls`).
        shown: stands for a default that depends on the machine.
    """
    raw = get_type_hints(parse)["value"] if parse is not None else None
    metadata = {
        "help": description, "checks": checks, "required": required, "parse": parse, "plain": plain, "raw": raw,
        "urls": urls, "shown": shown,
    }  # fmt: skip
    factory = default if callable(default) else lambda: copy.copy(default)
    return dataclasses.field(default_factory=factory, metadata=metadata)


def run_checks(options: Any, prefix: str) -> None:
    """Check every declared constraint of a dataclass's own fields.

    Raises:
        UserError: names the first option refused.
    """
    for item in dataclasses.fields(options):
        for check in item.metadata.get("checks", ()):
            check(prefix + item.name, getattr(options, item.name))


def one_url(value: str, change: ChangeUrl) -> str:
    """``urls`` of an option that is one URL, or empty."""
    return change(value) if value else value


def map_urls(options: T, change: Callable[[str, str], str], prefix: str = "") -> T:
    """A copy of the options with every URL replaced by ``change(URL, name of the option)``."""
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(options):  # type: ignore[arg-type]
        value, name = getattr(options, item.name), prefix + item.name
        if item.metadata.get("urls") is not None:
            changed[item.name] = item.metadata["urls"](value, ChangeUrl(change, name))
        elif "help" not in item.metadata and dataclasses.is_dataclass(value):
            changed[item.name] = map_urls(value, change, f"{name}.")
    return dataclasses.replace(options, **changed)  # type: ignore[type-var]


def to_plain(options: Any) -> dict[str, Any]:
    """Options as nested mappings of what YAML can hold, in schema order."""
    return {item.name: plain_value(item, getattr(options, item.name)) for item in dataclasses.fields(options)}


def plain_value(item: dataclasses.Field[Any], value: Any) -> Any:
    """One field's value as YAML holds it."""
    if item.metadata.get("plain") is not None:
        return item.metadata["plain"](value)
    return to_plain(value) if dataclasses.is_dataclass(value) else value


def flatten(options: Any) -> dict[str, Any]:
    """Options, or nested mappings of them, as ``{dotted name: value}``; lists stay as they are."""
    flat: dict[str, Any] = {}

    def walk(value: Mapping[Any, Any], prefix: str) -> None:
        for key, inner in value.items():
            if isinstance(inner, Mapping):
                walk(inner, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = inner

    walk(options if isinstance(options, Mapping) else to_plain(options), "")
    return flat


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of ``allowed``."""
    if value not in allowed:
        hint = closest(value, allowed)
        raise UserError(f"{name}={value}: it must be one of {', '.join(allowed)}{'; ' if hint else ''}{hint}")


def folder_name(name: str, value: str) -> None:
    """Refuse a ``run.name`` that is no plain folder name."""
    if not value or "/" in value or value.startswith("."):
        raise UserError(f"{name}={value!r}: it must be a plain folder name")
