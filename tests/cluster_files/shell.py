"""The commands in the files of cluster/: found, and held against the programs they are for."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from deepspeed.launcher import runner
from ray.scripts.scripts import cli as ray_cli

from physio_dist import cli, config

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "cluster"
# Made by a command or by hand, never shipped.
MADE = {"cluster/laptop.env", "cluster/hostfile"}
_CONFIGS = {
    "physio_dist.launch": config.PretrainConfig,
    "physio_dist.tune": config.TuneConfig,
}
_OPERATORS = re.compile(r"[();<>|&]+")


def header(file: Path) -> list[str]:
    """The comment a file opens with, a line an entry, without the ``#``."""
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#!")]
    end = next((n for n, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line.removeprefix("#").removeprefix(" ") for line in lines[:end]]


def usage(file: Path) -> list[str]:
    """The commands that a file's opening comment tells to use it with."""
    text = "\n".join(header(file)).replace("\\\n", " ")
    return [line.split("$", 1)[1].strip() for line in text.splitlines() if line.strip().startswith("$ ")]


def texts(file: Path) -> Iterator[str]:
    """Everything in a file that a shell may be asked to run."""
    yield from usage(file)
    if file.suffix in (".yaml", ".yml"):
        for document in yaml.safe_load_all(file.read_text()):
            yield from _strings(document)
    elif file.suffix == ".sh":
        body = "\n".join(line for line in file.read_text().splitlines() if not line.startswith("#"))
        yield body.replace("\\\n", " ")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(item)


def commands(text: str) -> Iterator[list[str]]:
    """The simple commands in a piece of shell, those in quotes and substitutions too."""
    lines = [re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines()]
    lexer = shlex.shlex("\n;".join(lines), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    for word in [*lexer, ";"]:
        if _OPERATORS.fullmatch(word):
            if words:
                yield words
            words = []
            continue
        words.append(word)
        if re.search(r"\s", word):
            yield from commands(word)


def checked(words: list[str]) -> list[str]:
    """The programs of ours and of Ray's that a command starts, after a look at their options.

    Raises:
        AssertionError, PhysioError, SystemExit: an option, a file or a subcommand does not exist.
    """
    words = [word.replace("$PHYSIO_DIST/", "") for word in words]
    for word in words:
        if re.match(r"(cluster|configs|tools|physio_dist)/", word) and word not in MADE:
            assert (ROOT / word).exists(), f"there is no {word}"
    for n, word in enumerate(words):
        rest = words[n + 1 :]
        name = word.rpartition("/")[2]
        if name == "ray" and rest and re.fullmatch(r"[a-z-]+", rest[0]):
            return _of_ray(rest)
        if name == "start_ray":
            return _of_ray(["start", *_split(rest)[1]])
        if name == "python" and rest[:1] == ["-m"]:
            _of_driver(rest[1], rest[2:])
            return [rest[1]]
        if word == "physio-dist" and rest:
            cli._parse(rest, cli._verbs())
            return [f"physio-dist {rest[0]}"]
        if name == "deepspeed":
            given = runner.parse_args(rest)
            assert given.user_script == "physio_dist/pretrain.py"
            _of_driver("physio_dist.launch", given.user_args)
            return ["deepspeed"]
        if name == "sbatch":
            _of_driver("physio_dist.launch", ["--config", "configs/pretrain/ecg_base.yaml", *rest[1:]])
            return ["sbatch"]
    return []


def _of_ray(words: list[str]) -> list[str]:
    command, path = ray_cli, ["ray"]
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"`{' '.join(path)}` knows no {words[0]}"
        command, path = command.commands[words[0]], [*path, words[0]]
        words = words[1:]
    own, after = _split(words)
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    for word in own:
        if word.startswith("-"):
            assert word.split("=")[0] in known, f"`{' '.join(path)}` has no {word}"
    return [" ".join(path), *(checked(after) if after else [])]


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def _of_driver(module: str, words: list[str]) -> None:
    schema = _CONFIGS[module]
    values = {"$config": "configs/pretrain/ecg_base.yaml", "$ranks": "8"}
    words = [functools.reduce(lambda text, name: text.replace(name, values[name]), values, word) for word in words]
    assert words[0] == "--config" and (ROOT / words[1]).exists(), words
    # A script's own words, which are looked at where the script is started.
    overrides = [word.replace("$@", "data.index=s3://bucket/set") for word in words[2:]]
    assert all("=" in word and "$" not in word for word in overrides), overrides
    config.load(schema, str(ROOT / words[1]), overrides)
