"""From a YAML file and ``key=value`` words to typed options, and back.

Options come in three layers, later ones winning: a schema's defaults, a YAML file, and the words of the command line.
The merge is OmegaConf's; the messages are ours. What options there are is told in ``config.py``.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn, TypeVar, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from physio_dist import storage
from physio_dist.errors import PhysioError, UserError, closest, nearest

T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A command line on which every mistake is a :class:`UserError`, and so told in one line with the status."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` tells more")


def load(schema: type[T], file: str | None, overrides: Sequence[str], check: Callable[[T], None]) -> T:
    """Defaults <- YAML file <- ``key=value`` words, as an instance of ``schema``.

    Raises:
        UserError: an unreadable file, an unknown option (with the nearest known one), a value of the wrong
            type, or a value that ``check`` refuses.
    """
    merged: Any = OmegaConf.structured(schema)
    types = option_types(schema)
    if file is not None:
        merged = _merge(merged, _read_yaml(file, types), types, where=file)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"option {word!r} is not of the form key=value")
        merged = _merge(merged, _layer(key, text, types), types, where="command line")
    try:
        if missing := sorted(str(name) for name in OmegaConf.missing_keys(merged)):
            raise UserError(f"option {missing[0]} is needed and has no default: give {missing[0]}=...")
        options: T = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:  # ${...} that leads nowhere
        raise UserError(f"option {error.full_key or ''}: {_first_line(error)}") from None
    check(options)
    return options


def _layer(key: str, text: str, types: dict[str, Any]) -> Any:
    """One ``key=value`` of the command line as a layer of options."""
    if key not in types:
        raise UserError(f"unknown option {key!r} (command line): {nearest(key, types)}")
    if "str" in str(types[key]) and get_origin(types[key]) is not list:
        # Taken as it is written: YAML would make numbers of 007 and 1e-3, and a truth of `on`.
        value: Any = None if text in ("", "null") and "None" in str(types[key]) else text
        layer = OmegaConf.create({})
        OmegaConf.update(layer, key, value)
        return layer
    try:
        return OmegaConf.from_dotlist([f"{key}={text}"])
    except Exception as error:  # the YAML parser's errors have no common base with OmegaConf's
        raise UserError(f"option {key}={text} is not valid YAML: {_first_line(error)}") from None


def option_types(schema: type, prefix: str = "") -> dict[str, Any]:
    """Every option of a schema as a dotted name, with its type."""
    types: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[item.name]):
            types.update(option_types(hints[item.name], f"{prefix}{item.name}."))
        else:
            types[prefix + item.name] = hints[item.name]
    return types


def to_yaml(options: Any) -> str:
    """The resolved options as YAML, in schema order."""
    return OmegaConf.to_yaml(OmegaConf.structured(options))


def flatten(options: Any) -> dict[str, Any]:
    """Resolved options as ``{dotted name: value}``; lists and free-form values stay whole."""
    flat: dict[str, Any] = {}

    def walk(value: dict[str, Any], prefix: str) -> None:
        for key, inner in value.items():
            if isinstance(inner, dict):
                walk(inner, f"{prefix}{key}.")
            else:
                flat[f"{prefix}{key}"] = inner

    walk(dataclasses.asdict(options) if dataclasses.is_dataclass(options) else options, "")  # type: ignore[arg-type]
    return flat


def refuse_another(
    url: str, options: Any, may_differ: Collection[str], grow: str | None = None,
    adapt: Callable[[dict[str, Any]], None] = lambda _: None,
) -> None:  # fmt: skip
    """Compare options with the configuration that a run was started with, if it was.

    Args:
        url: of the file that :func:`to_yaml` was written to.
        options: those of now.
        may_differ: names that say where and how fast, and not what.
        grow: name of a number that may be larger now.
        adapt: brings either side, flattened, to the form in which they are compared.

    Raises:
        UserError: an option differs that must not; all of them are named.
    """
    try:
        there = OmegaConf.to_container(OmegaConf.create(storage.read_bytes(url).decode()))
    except storage.NotFoundError:
        return
    old, new = flatten(there), flatten(options)
    # What an earlier version did not know was then as it is by default now. An option may also be a mapping there.
    for name, value in flatten(type(options)()).items():
        if value != "???" and name not in old and not any(known.startswith(f"{name}.") for known in old):
            old[name] = value
    adapt(old)
    adapt(new)
    differing = [name for name in sorted((set(old) | set(new)) - set(may_differ)) if old.get(name) != new.get(name)]
    if grow in differing and new[grow] > old[grow]:
        differing.remove(grow)
    if differing:
        told = "; ".join(f"{name}: {old.get(name)} there, {new.get(name)} now" for name in differing)
        raise UserError(
            f"{url.rpartition('/')[0]} was started with another configuration ({told}). Give the same options to go "
            "on, or choose another run.name"
        )


def _read_yaml(file: str, types: dict[str, Any]) -> DictConfig:
    try:
        layer = OmegaConf.load(io.StringIO(storage.read_bytes(file).decode()))
    except storage.NotFoundError:
        raise UserError(f"configuration file {file} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not a text file: {error.reason}") from None
    except PhysioError:
        raise
    except Exception as error:  # yaml.YAMLError, whose package is OmegaConf's dependency and not ours
        raise UserError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(layer, DictConfig):
        raise UserError(f"{file} must hold options by name, not a list")
    for section in {name.split(".")[0] for name in types if "." in name} & {str(key) for key in layer}:
        if layer[section] is None:  # all of its lines are commented out
            del layer[section]
        elif not isinstance(layer[section], DictConfig):
            raise UserError(f"{file}: {section} must hold options by name, not {layer[section]!r}")
    return layer


def _merge(base: Any, layer: Any, types: dict[str, Any], where: str) -> Any:
    try:
        return OmegaConf.merge(base, layer)
    except ConfigKeyError as error:
        key = str(error.full_key)
        inside = [name for name in types if name.startswith(f"{key.split('.')[0]}.")]
        known = inside or {name.split(".")[0] for name in types}
        raise UserError(f"unknown option {key!r} ({where}): {nearest(key, known)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"option {error.full_key or ''} ({where}): {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def plain_name(name: str) -> None:
    """Refuse a ``run.name`` that is no plain folder name."""
    if not name or "/" in name or name.startswith("."):
        raise UserError(f"run.name={name!r}: it must be a plain folder name")


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value that is none of ``allowed``."""
    if value not in allowed:
        hint = closest(value, allowed)
        raise UserError(f"{name}={value}: it must be one of {', '.join(allowed)}{'; ' if hint else ''}{hint}")


def between(name: str, value: float, low: float, high: float) -> None:
    """Refuse a value outside of ``[low, high]``, NaN among them."""
    if not low <= value <= high:
        raise UserError(f"{name}={value}: it must lie between {low:g} and {high:g}")
