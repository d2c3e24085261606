"""Typed options from a YAML file and ``key=value`` words.

Options come in three layers, later ones winning: a schema's defaults, a YAML file, and the words of the command line.
OmegaConf merges them; then each value is parsed and checked once, as its field declares
(:func:`physio_dist.config.options.option`), and the schema's ``validate`` checks options against each other.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import io
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NoReturn, Protocol, TypeVar, get_origin, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from physio_dist import storage
from physio_dist.config.listing import help_text
from physio_dist.config.options import flatten, plain_value, to_plain
from physio_dist.errors import PhysioError, UserError, nearest


class Options(Protocol):
    """A command's options: a dataclass that checks itself."""

    def validate(self) -> None:
        """Refuse values that do not go together.

        Raises:
            UserError: names the option.
        """


T = TypeVar("T", bound=Options)


class Parser(argparse.ArgumentParser):
    """A command line on which every mistake is a :class:`UserError`: one line, and the exit status of user errors.

    Args:
        schema: options that the command takes as ``key=value``, listed at the end of ``--help``.
        settings: those of :class:`argparse.ArgumentParser`.
    """

    def __init__(self, schema: type[Options] | None = None, **settings: Any) -> None:
        if schema is not None:
            settings |= {"epilog": help_text(schema), "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` tells more")


def load_command_line(parser: Parser, schema: type[T], arguments: Sequence[str] | None) -> T:
    """Options of a program that takes ``--config FILE [key=value ...]``.

    Raises:
        UserError: as :func:`load`, or another command line.
    """
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file with options")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that override the file's")
    args = parser.parse_intermixed_args(arguments)
    return load(schema, args.config, args.overrides)


def load(schema: type[T], file: str | None, overrides: Sequence[str]) -> T:
    """Defaults <- YAML file <- ``key=value`` words, as an instance of ``schema``.

    Raises:
        UserError: an unreadable file, an unknown option (with the nearest known one), a value of the wrong type, or one
            that its field's checks or ``validate`` refuse.
    """
    types = option_types(schema)
    merged: Any = OmegaConf.structured(_raw_schema(schema()))
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
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:  # ${...} that leads nowhere
        raise UserError(f"option {error.full_key or ''}: {_first_line(error)}") from None
    options: T = _parse(schema, values)
    options.validate()
    return options


def _raw_schema(options: Any) -> Any:
    """Options as OmegaConf merges them: fields that are parsed later hold anything, required ones are missing."""
    hints = get_type_hints(type(options))
    columns: list[tuple[str, Any, Any]] = []
    for item in dataclasses.fields(options):
        value, hint = getattr(options, item.name), hints[item.name]
        if item.metadata.get("parse"):
            value, hint = plain_value(item, value), item.metadata["raw"]
        elif dataclasses.is_dataclass(value):
            value = _raw_schema(value)
            hint = type(value)
        if item.metadata.get("required"):
            value = MISSING
        columns.append((item.name, hint, dataclasses.field(default_factory=functools.partial(copy.copy, value))))
    return dataclasses.make_dataclass(type(options).__name__, columns)()


def _parse(schema: type, values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of ``schema`` from merged values, each checked by its field."""
    hints = get_type_hints(schema)
    parsed: dict[str, Any] = {}
    for item in dataclasses.fields(schema):
        name, value = prefix + item.name, values[item.name]
        if item.metadata.get("parse"):
            value = item.metadata["parse"](name, value)
        elif dataclasses.is_dataclass(hints[item.name]):
            value = _parse(hints[item.name], value, f"{name}.")  # type: ignore[arg-type]
        for check in item.metadata.get("checks", ()):
            check(name, value)
        parsed[item.name] = value
    return schema(**parsed)


def _layer(key: str, text: str, types: dict[str, Any]) -> Any:
    """One ``key=value`` of the command line as a layer of options."""
    # An option that holds anything before it is parsed may be a mapping, whose entries have names below its own.
    if key not in types and types.get(key.rpartition(".")[0]) is not Any:
        raise UserError(f"unknown option {key!r} (command line): {nearest(key, types)}")
    if "str" in str(types.get(key)) and get_origin(types[key]) is not list:
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
    """Type of every option before it is parsed, by dotted name."""
    types: dict[str, Any] = {}
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        hint = hints[item.name]
        if item.metadata.get("parse"):
            types[prefix + item.name] = item.metadata["raw"]
        elif dataclasses.is_dataclass(hint):
            types.update(option_types(hint, f"{prefix}{item.name}."))  # type: ignore[arg-type]
        else:
            types[prefix + item.name] = hint
    return types


def to_yaml(options: Any) -> str:
    """Resolved options as YAML, in schema order."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(options)))


class OptionsDifferError(UserError):
    """A run was started with another configuration.

    Attributes:
        options: names of the options that differ.
    """

    def __init__(self, message: str, options: Collection[str]) -> None:
        super().__init__(message)
        self.options = frozenset(options)


def refuse_another(
    url: str, options: Options, may_differ: Collection[str], grow: str | None = None,
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
        OptionsDifferError: an option differs that must not; all of them are named.
    """
    try:
        written = OmegaConf.to_container(OmegaConf.create(storage.read_bytes(url).decode()))
    except storage.NotFoundError:
        return
    old, new = flatten(written), flatten(options)
    # An option that an earlier version lacked had today's default then. An option may also be a mapping there.
    required = {name for name, item in option_fields(type(options)).items() if item.metadata.get("required")}
    for name, value in flatten(type(options)()).items():
        if name not in required and name not in old and not any(key.startswith(f"{name}.") for key in old):
            old[name] = value
    adapt(old)
    adapt(new)
    differing = [name for name in sorted((set(old) | set(new)) - set(may_differ)) if old.get(name) != new.get(name)]
    if grow in differing and new[grow] > old[grow]:
        differing.remove(grow)
    if differing:
        changes = "; ".join(f"{name}: {old.get(name)} there, {new.get(name)} now" for name in differing)
        raise OptionsDifferError(
            f"{url.rpartition('/')[0]} was started with another configuration ({changes}). Give the same options to go "
            "on, or choose another run.name",
            differing,
        )


def option_fields(schema: type, prefix: str = "") -> dict[str, dataclasses.Field[Any]]:
    """Field of every option, by dotted name."""
    found: dict[str, dataclasses.Field[Any]] = {}
    hints = get_type_hints(schema)
    for item in dataclasses.fields(schema):
        if dataclasses.is_dataclass(hints[item.name]) and not item.metadata.get("parse"):
            found.update(option_fields(hints[item.name], f"{prefix}{item.name}."))  # type: ignore[arg-type]
        else:
            found[prefix + item.name] = item
    return found


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
        candidates = inside or {name.split(".")[0] for name in types}
        raise UserError(f"unknown option {key!r} ({where}): {nearest(key, candidates)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"option {error.full_key or ''} ({where}): {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
