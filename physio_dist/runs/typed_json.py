"""Dataclasses as JSON documents: :func:`to_json` for whoever writes a file, :func:`from_json` for whoever reads it.

JSON has no NaN, so a number that is not defined is NaN in Python and null in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from physio_dist.errors import UserError

T = TypeVar("T")
# Metadata of a dataclass field that a file leaves out where its value is None or NaN.
OPTIONAL = {"optional": True}
_NAMES = {dict: "object", list: "list", tuple: "list", str: "text", bool: "true or false", int: "whole number"}


def to_json(value: Any) -> Any:
    """Dataclasses, and lists, tuples and dictionaries of them, as plain JSON data; numbers not finite become null."""
    if is_dataclass(value):
        items = ((item, to_json(getattr(value, item.name))) for item in fields(value))
        return {item.name: data for item, data in items if data is not None or not item.metadata.get("optional")}
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def from_json(kind: type[T], document: Any, where: str) -> T:
    """An object of the dataclass ``kind`` from what :func:`to_json` made of it.

    Keys that the dataclass does not have are ignored, those that are absent take its defaults. Control characters are
    taken out of texts, because these go into drawings and pages.

    Args:
        kind: a dataclass of JSON types, lists, tuples, dictionaries with text keys, and such dataclasses.
        document: parsed JSON.
        where: file (and line) for messages.

    Raises:
        UserError: a value is absent or of another type; the message names ``where`` and the field.
    """
    return cast(T, _parse(kind, document, where, ""))


def parse_json(raw: bytes, where: str) -> Any:
    """The JSON document of a file; ``UserError`` where it is damaged."""
    try:
        return json.loads(raw)
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}; restore the file, or make it again") from error


def parse_lines(raw: bytes | None, where: str, parse: Callable[[Any, str], T]) -> tuple[list[T], bool]:
    """The objects of a JSON-lines file (None: no file), and whether its last line is still being written.

    Args:
        raw: bytes of the file.
        where: name of the file for messages.
        parse: what makes an object of a document and of the words that name its line; raises ``UserError``.

    Raises:
        UserError: a line is damaged that is not the last, or that ends with a newline.
    """
    lines = [] if raw is None else raw.decode("utf-8", "replace").split("\n")
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{where}, line {number}"
        try:
            entries.append(parse(parse_json(line.encode(), name), name))
        except UserError as error:
            if number == len(lines):
                return entries, True
            raise UserError(f"{error}; repair or remove this line") from error
    return entries, False


def printable(value: object) -> str:
    """Text without control characters and lone surrogates."""
    return "".join(c for c in str(value) if c.isprintable())


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _parse(hint: Any, value: Any, where: str, path: str) -> Any:
    arguments, base = get_args(hint), get_origin(hint) or hint
    if NoneType in arguments:
        rest = next(argument for argument in arguments if argument is not NoneType)
        return None if value is None else _parse(rest, value, where, path)
    if is_dataclass(hint):
        return _parse_object(hint, value, where, path)
    if base is float:
        return _parse_float(value, where, path)
    if base in _NAMES and not _is_a(value, list if base is tuple else base):
        raise _error(value, _NAMES[base], where, path)
    if base is dict:
        return {printable(key): _parse(arguments[1], item, where, f"{path}[{key!r}]") for key, item in value.items()}
    if base is list:
        return [_parse(arguments[0], item, where, f"{path}[{number}]") for number, item in enumerate(value)]
    if base is tuple:
        if len(value) != len(arguments):
            raise _error(value, f"list of {len(arguments)}", where, path)
        return tuple(_parse(kind, item, where, path) for kind, item in zip(arguments, value, strict=True))
    return printable(value) if base is str else value


def _is_a(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _parse_object(kind: Any, value: Any, where: str, path: str) -> Any:
    if not isinstance(value, dict):
        raise _error(value, "object", where, path)
    known = {item.name: item for item in fields(kind)}
    needed = [name for name, item in known.items() if item.default is MISSING and item.default_factory is MISSING]
    if absent := [name for name in needed if name not in value]:
        raise UserError(f"{where}: {path or 'the document'} has no {absent[0]!r}")
    hints, dot = _hints(kind), "." * bool(path)
    return kind(**{n: _parse(hints[n], value[n], where, f"{path}{dot}{n}") for n in known if n in value})


def _parse_float(value: Any, where: str, path: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _error(value, "number or null", where, path)
    return float(value) if math.isfinite(value) else math.nan


def _error(value: Any, kind: str, where: str, path: str) -> UserError:
    text = repr(value)
    return UserError(f"{where}: {path or 'the document'} is {text[:60]}{'…' * (len(text) > 60)}, not a JSON {kind}")
