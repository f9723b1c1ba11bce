"""Command lines and YAML files of the recipes, read into dataclasses: each option is said once, in its field's help."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from hf_immunize.errors import ConfigError


def option(default: Any, told: str, *aliases: str) -> Any:
    """A field of options with its default and the text of ``--help``; aliases are other flags and keys for it."""
    metadata = {"help": told, "aliases": list(aliases)} if aliases else {"help": told}
    return dataclasses.field(default=default, metadata=metadata)


def required(told: str) -> Any:
    """A field of options that has to be given."""
    return dataclasses.field(metadata={"help": told})


class _Parser(HfArgumentParser):
    """One section of ``--help`` for each dataclass, under the first line of its docstring."""

    def _add_dataclass_arguments(self, dtype: type) -> None:
        title = (dtype.__doc__ or dtype.__name__).strip().splitlines()[0].rstrip(".")
        super()._add_dataclass_arguments(type(dtype.__name__, (dtype,), {"_argument_group_name": title}))


def parse_options(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
) -> tuple:
    """Instances of ``dataclass_types`` from ``--config FILE.yaml`` (may be repeated) and flags; what comes later wins.

    Keys of a YAML file are option names. Numbers written like ``1e-4``, which YAML reads as text, are converted to the
    option's type. ``--help`` lists every option. A field's ``aliases`` (metadata) are flags and keys like its name.

    Raises:
        ConfigError: a file that cannot be read, a key that is no option, or a value of the wrong type.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    files, flags = _take_config_files(words)
    parser = _Parser(
        tuple(dataclass_types), description=description, prog=prog, formatter_class=ArgumentDefaultsHelpFormatter,
        usage="%(prog)s [--config FILE.yaml ...] [--OPTION VALUE ...]",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE.yaml", help="Options from YAML; flags override it. Repeatable.")
    known = [field for kind in dataclass_types for field in dataclasses.fields(kind) if field.init]
    types = {
        field.name: typing.get_type_hints(kind)[field.name]
        for kind in dataclass_types
        for field in dataclasses.fields(kind)
        if field.init
    }
    called = {name.lstrip("-"): field.name for field in known for name in field.metadata.get("aliases", ())}
    values: dict[str, Any] = {}
    for file in files:
        loaded = {called.get(name, name): value for name, value in _read_yaml(file).items()}
        unknown = sorted(map(str, set(loaded) - set(types)))
        if unknown:
            nearest = _nearest(unknown, types)
            raise ConfigError(f"expected options of this recipe in {file}, got unknown {unknown}: see --help.{nearest}")
        values |= {name: _coerce(value, types[name], f"{name} in {file}") for name, value in loaded.items()}
    for action in parser._actions:
        if action.dest in values:
            action.required = False
    parser.set_defaults(**values)
    chosen = vars(parser.parse_args(flags))
    chosen.pop("config", None)
    return tuple(kind(**{field.name: chosen[field.name] for field in dataclasses.fields(kind) if field.init})
                 for kind in dataclass_types)


def given_options(words: Sequence[str]) -> set[str]:
    """Names of the options in these flags and their ``--config`` files. Raises ConfigError for an unreadable file."""
    files, flags = _take_config_files(list(words))
    named = {word[2:].partition("=")[0].replace("-", "_") for word in flags if word.startswith("--")}
    return named.union(*(map(str, _read_yaml(file)) for file in files))


def _nearest(unknown: Sequence[str], known: Iterable[str]) -> str:
    """The known options that these are most like, as a sentence; nothing where none is."""
    found = [close for name in unknown for close in difflib.get_close_matches(name, list(known), 1)]
    return f" Did you mean {', '.join(dict.fromkeys(found))}?" if found else ""


def _take_config_files(words: list[str]) -> tuple[list[str], list[str]]:
    files, flags, rest = [], [], iter(words)
    for word in rest:
        if word == "--config":
            file = next(rest, None)
            if file is None:
                raise ConfigError("expected a file after --config, got nothing.")
            files.append(file)
        elif word.startswith("--config="):
            files.append(word.removeprefix("--config="))
        else:
            flags.append(word)
    return files, flags


def _read_yaml(file: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"expected a readable YAML file, got {file}: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"expected option: value pairs in {file}, got {type(loaded).__name__}.")
    return loaded


def _coerce(value: Any, kind: Any, where: str) -> Any:
    """YAML reads 1e-4 as text: give text a numeric option's type; leave everything else to the parser."""
    wanted = {kind, *typing.get_args(kind)}
    if isinstance(value, str) and str not in wanted and wanted & {int, float}:
        try:
            return (float if float in wanted else int)(value)
        except ValueError as error:
            raise ConfigError(f"expected a number for {where}, got {value!r}.") from error
    if isinstance(value, int) and not isinstance(value, bool) and float in wanted and int not in wanted:
        return float(value)
    if str in wanted and isinstance(value, int | float) and not isinstance(value, bool) and int not in wanted:
        return str(value)
    return value
