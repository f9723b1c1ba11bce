"""Command lines and YAML files of the recipes, read into dataclasses: each option is said once, in its field's help."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import typing
from argparse import ArgumentDefaultsHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

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


_FIRST = "Options that matter most; the others follow in sections"


class _Parser(HfArgumentParser):
    """One section of ``--help`` for each dataclass, under the first line of its docstring."""

    def _add_dataclass_arguments(self, dtype: Any) -> None:
        title = (dtype.__doc__ or dtype.__name__).strip().splitlines()[0].rstrip(".")
        made: Any = type(dtype.__name__, (dtype,), {"_argument_group_name": title})
        super()._add_dataclass_arguments(made)

    def put_first(self, names: Sequence[str]) -> None:
        """Show these options, as far as there are such, in a section before all others."""
        known = {action.dest: action for action in self._actions}
        chosen = [known[name] for name in names if name in known]
        if not chosen:
            return
        group = self.add_argument_group(_FIRST)
        for held in self._action_groups:
            held._group_actions = [action for action in held._group_actions if action not in chosen]
        group._group_actions = chosen
        self._action_groups.insert(0, self._action_groups.pop())

    where: str | None = None
    """What is read in the place of a command line; errors are raised then."""

    def error(self, message: str) -> NoReturn:
        """Leave as argparse does, with the nearest known flags for unknown ones. Raises ConfigError for a file."""
        if self.where is not None:
            told = message.replace("the following arguments are required: ", "these options as well: "
                                                                             "").replace("--", "")
            raise ConfigError(f"expected {told} in {self.where}.")
        if message.startswith("unrecognized arguments"):
            words = [word.partition("=")[0].lstrip("-") for word in message.split() if word.startswith("--")]
            known = [action.dest for action in self._actions]
            close = [f"--{name}" for word in words for name in difflib.get_close_matches(word, known, 1)]
            message += f". Did you mean {', '.join(close)}?" if close else ""
        super().error(message)


def parse_options(
    dataclass_types: Sequence[type],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    prog: str | None = None,
    first: Sequence[str] = (),
) -> tuple[Any, ...]:
    """Instances of ``dataclass_types`` from ``--config FILE.yaml`` (may be repeated) and flags; what comes later wins.

    Keys of a YAML file are option names. Numbers written like ``1e-4``, which YAML reads as text, are converted to the
    option's type. ``--help`` lists every option, those named in ``first`` before all sections. A field's ``aliases``
    (metadata) are flags and keys like its name.

    Raises:
        ConfigError: a file that cannot be read, a key that is no option, or a value of the wrong type.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    files, flags = _take_config_files(words)
    parser = _parser_of(dataclass_types, description, prog)
    parser.put_first(first)
    values: dict[str, Any] = {}
    for file in files:
        values |= _checked(dataclass_types, read_yaml(file), str(file))
    return _instances(dataclass_types, parser, values, flags)


def make_options(dataclass_types: Sequence[type], values: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    """Instances of ``dataclass_types`` from the keys and values of a file that was read already.

    Args:
        where: what holds these values, for errors.

    Raises:
        ConfigError: a key that is no option, a value of the wrong type, or a required option that is not there.
    """
    parser = _parser_of(dataclass_types, None, None)
    parser.where = where
    return _instances(dataclass_types, parser, _checked(dataclass_types, values, where), [])


def _parser_of(kinds: Sequence[type], description: str | None, prog: str | None) -> _Parser:
    parser = _Parser(
        list[Any](kinds), description=description, prog=prog, formatter_class=ArgumentDefaultsHelpFormatter,
        usage="%(prog)s [--config FILE.yaml ...] [--OPTION VALUE ...]",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE.yaml", help="Options from YAML; flags override it. Repeatable.")
    return parser


def _checked(kinds: Sequence[type], loaded: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values by the names of fields, of the fields' types. Raises ConfigError as ``parse_options``."""
    fields = {field.name: field for kind in kinds for field in dataclasses.fields(kind) if field.init}
    types = {name: typing.get_type_hints(kind)[name] for kind in kinds for name in typing.get_type_hints(kind)
             if name in fields}
    called = {alias.lstrip("-"): name for name, field in fields.items() for alias in field.metadata.get("aliases", ())}
    values = {called.get(name, name): value for name, value in loaded.items()}
    if unknown := sorted(str(name) for name in values if name not in fields):
        raise ConfigError(
            f"expected options of this stage in {where}, got unknown {unknown}: see --help."
            f"{nearest(unknown, [*fields, *called])}"
        )
    return {name: _coerce(value, types[name], name, where) for name, value in values.items()}


def _instances(
    kinds: Sequence[type], parser: _Parser, values: Mapping[str, Any], flags: Sequence[str]
) -> tuple[Any, ...]:
    for action in parser._actions:
        if action.dest in values:
            action.required = False
    parser.set_defaults(**values)
    chosen = vars(parser.parse_args(flags))
    chosen.pop("config", None)
    return tuple(kind(**{field.name: chosen[field.name] for field in dataclasses.fields(kind) if field.init})
                 for kind in kinds)


def given_options(words: Sequence[str]) -> set[str]:
    """Names of the options in these flags and their ``--config`` files. Raises ConfigError for an unreadable file."""
    files, flags = _take_config_files(list(words))
    named = {word[2:].partition("=")[0].replace("-", "_") for word in flags if word.startswith("--")}
    return named.union(*(map(str, read_yaml(file)) for file in files))


def nearest(unknown: Iterable[str], known: Iterable[str]) -> str:
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


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml comes without types
    """YAML in which no key is said twice, and 010 and 1:30 are words: names of classes, not 8 and 90."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:int"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """The mapping of a node. Raises ConfigError for a key that is there twice: YAML would drop the first."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if again := next((key for place, key in enumerate(keys) if key in keys[:place]), None):
            line = node.start_mark.line + 1
            raise ConfigError(f"expected each key once, got {again!r} twice in what begins in line {line}: remove one.")
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"), list("-+0123456789")
)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        ConfigError: a file that is not there or no text, no YAML, no keys with values, or a key that is there twice.
    """
    try:
        loaded = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        told = str(error) if isinstance(error, ConfigError | yaml.YAMLError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"expected a readable YAML file, got {file}: {told}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"expected option: value pairs in {file}, got {type(loaded).__name__}.")
    return loaded


def _coerce(value: Any, kind: Any, name: str, where: str) -> Any:
    """A value of YAML as the option's type; text is left to the parser. Raises ConfigError for one of another type.

    YAML reads 1e-4 as text: text for a numeric option becomes a number. A list for an option of text becomes one text
    with commas between, except for names of classes, in which there may be commas.
    """
    wanted = {kind, *typing.get_args(kind)}
    kinds = {typing.get_origin(one) or one for one in wanted}
    if Any in wanted or dict in kinds:
        return value
    if isinstance(value, str) and str not in wanted and wanted & {int, float}:
        try:
            return (float if float in wanted else int)(value)
        except ValueError as error:
            raise _wrong(value, "a number", name, where) from error
    if isinstance(value, bool):
        if wanted & {int, float} and bool not in wanted:
            raise _wrong(value, "a number", name, where)
        return value if bool in wanted else {True: "yes", False: "no"}[value]  # eval_strategy: no
    if isinstance(value, int) and float in wanted and int not in wanted:
        return float(value)
    if isinstance(value, float) and int in wanted and float not in wanted and bool not in wanted:
        if value != int(value):
            raise _wrong(value, "a whole number", name, where)
        return int(value)
    if str in wanted and isinstance(value, int | float) and int not in wanted:
        return str(value)
    if isinstance(value, list) and list not in kinds and kinds & {str, int, float, bool}:
        if str in wanted and not any(isinstance(part, list | dict) for part in value):
            return value if name.endswith("labels") else ",".join(map(str, value))
        raise _wrong(value, "one value", name, where)
    if isinstance(value, dict):
        raise _wrong(value, "a list" if list in kinds else "one value", name, where)
    if list in kinds and str not in wanted and not isinstance(value, list | None):
        return [value]
    if value is None and type(None) not in wanted and kinds & {str, int, float, bool, list}:
        raise _wrong("nothing", "a value", name, where)
    return value


def _wrong(value: Any, wanted: str, name: str, where: str) -> ConfigError:
    return ConfigError(f"expected {wanted} for {name} in {where}, got {value!r}: repair the file, or remove the line.")
