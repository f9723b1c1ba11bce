"""The reference of the command line, made from the options themselves: ``python docs/tools/cli_page.py`` prints it.

Nothing is repeated here: verbs come from the command, options and their help from the parsers that read them, and the
site makes the page each time it is built.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from typing import Any
from unittest.mock import patch

import click
import transformers
import typer

from hf_immunize.cli import app
from hf_immunize.commands.app import CODES
from hf_immunize.commands.verbs import STAGES
from hf_immunize.errors import ConfigError
from hf_immunize.tasks import FAMILIES

BY_FAMILY = ("pretrain", "immunize", "attack", "certify")
"""Verbs whose options depend on what the task is made of."""

HEADING = f"""# Command line

Made from the options of this version. Options of every stage may stand in a YAML file, under the same names: `--config
FILE.yaml`, repeatable; a flag goes before a file. `-` and `_` mean the same in a flag.

{CODES}

`--debug`, before the verb, shows tracebacks. `hf-immunize --install-completion` makes the shell complete verbs.
"""


def page() -> str:
    """The whole page in Markdown."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parts = [HEADING, _overview(commands)]
    for name in commands:
        parts.extend(_stage(name) if name in STAGES else _command(name, commands[name]))
    return "\n".join(parts) + "\n"


def _overview(commands: dict[str, click.Command]) -> str:
    told = {name: STAGES.get(name) or (command.help or "").split("\n\n")[0] for name, command in commands.items()}
    rows = [f"| [`{name}`](#hf-immunize-{name}) | {_cell(text)} |" for name, text in told.items()]
    return "\n".join(["| verb | what it does |", "|---|---|", *rows, ""])


def _stage(name: str) -> Iterator[str]:
    """A verb with its own parser, once for each family where that makes a difference."""
    yield f"## hf-immunize {name}\n"
    seen: set[str] = set()
    for family in FAMILIES if name in BY_FAMILY else (None,):
        try:
            parser = find_parser(name, family)
        except ConfigError as error:  # no such verb for this family, and the error says why
            yield f"### {name}: a task of {family}\n\nRefused: {_text(str(error))}\n"
            continue
        if not seen:
            told = (parser.description or "").split(" Shown for a task of ")[0]
            yield f"{_text(told)}\n\n```\n{_usage(parser)}\n```\n"
        if family is not None:
            yield f"### {name}: a task of {family}\n"
        yield from _groups(parser, seen)


def find_parser(verb: str, family: str | None = None) -> argparse.ArgumentParser:
    """The parser that reads the words of a verb, as it stands when ``--help`` is asked for.

    Raises:
        ConfigError: a verb that this family of tasks does not have.
    """
    found: list[argparse.ArgumentParser] = []
    words = ["--help"] if family is None else ["--family", family, "--help"]
    with patch.object(argparse.ArgumentParser, "print_help", lambda self, file=None: found.append(self)):
        try:
            import_module(f"hf_immunize.stages.{verb}").main(words, prog=f"hf-immunize {verb}")
        except SystemExit:
            pass
    return found[0]


def _usage(parser: argparse.ArgumentParser) -> str:
    return " ".join(parser.format_usage().removeprefix("usage: ").split())


def _groups(parser: argparse.ArgumentParser, seen: set[str]) -> Iterator[str]:
    """One table for each section; a section that was there for another family is named and not repeated."""
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if not isinstance(action, argparse._HelpAction)]
        title = group.title or ""
        if not actions:
            continue
        key = title + "".join(action.dest for action in actions)
        if key in seen:
            yield f"*{_text(title)}*: as above.\n" if title != "options" else ""
            continue
        seen.add(key)
        yield from _table("" if title in ("options", "positional arguments") else title, actions)


def _table(title: str, actions: list[argparse.Action]) -> Iterator[str]:
    """The options of a section; those that are the stock Trainer's, word by word, are named below it."""
    stock = {name for name, field in transformers.TrainingArguments.__dataclass_fields__.items()}
    helped = {action.dest: action.help for action in _stock_parser()._actions} if len(actions) > 60 else {}
    own = [one for one in actions if one.dest not in stock or one.help != helped.get(one.dest)]
    if title:
        yield f"**{_text(title)}**\n"
    yield "| option | what it is | default |\n|---|---|---|"
    for action in own:
        if not action.option_strings or not action.option_strings[0].startswith("--no_"):
            yield f"| {_flags(action)} | {_cell(action.help or '')} | {_default(action)} |"
    yield ""
    names = dict.fromkeys(action.dest for action in actions if action not in own)
    if names:
        yield ("And the options of [`transformers.TrainingArguments`]"
               "(https://huggingface.co/docs/transformers/main_classes/trainer), which mean what they mean there: "
               + ", ".join(f"`{name}`" for name in names) + ".\n")


def _stock_parser() -> argparse.ArgumentParser:
    return transformers.HfArgumentParser(transformers.TrainingArguments)


def _flags(action: argparse.Action) -> str:
    words = [word for word in action.option_strings if "-" not in word.removeprefix("--")] or action.option_strings
    return ", ".join(f"`{word}`" for word in words) or f"`{action.metavar or action.dest}`"


def _default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.default is None or action.default is argparse.SUPPRESS or isinstance(action.default, dict):
        return ""
    return f"`{action.default}`" if str(action.default) else "empty"


def _command(name: str, command: click.Command) -> Iterator[str]:
    """A verb of the group itself."""
    yield f"## hf-immunize {name}\n\n{_text((command.help or '').strip())}\n"
    context = click.Context(command, info_name=f"hf-immunize {name}")
    yield f"```\n{' '.join(command.get_usage(context).removeprefix('Usage: ').split())}\n```\n"
    yield "| option | what it is | default |\n|---|---|---|"
    for part in command.params:
        names = [part.name or ""] if part.param_type_name == "argument" else part.opts
        told: Any = getattr(part, "help", "") or ""
        default = "" if part.default in (None, False, ()) or callable(part.default) else f"`{part.default}`"
        shown = "required" if part.required else default
        yield f"| {', '.join(f'`{word}`' for word in names)} | {_cell(told)} | {shown} |"
    yield ""


def _cell(text: str) -> str:
    return _text(text).replace("|", "\\|")


def _text(text: str) -> str:
    """Help as one line of Markdown: no character of it is taken for markup."""
    plain = " ".join(text.replace("%(default)s", "").replace("%%", "%").split()).replace("``", "`")
    return plain.replace("<", "&lt;").replace("*", "\\*") if "`" not in plain else plain


if __name__ == "__main__":
    print(page())
