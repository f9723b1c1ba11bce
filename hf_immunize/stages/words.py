"""From the words of a command line to the options of a stage; from an error to one line."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_immunize.errors import ConfigError, ImmunizeError
from hf_immunize.options import given_options, parse_options
from hf_immunize.tasks import FAMILIES, Family, find_family

_FAMILY = "--family"
_TASK = ("primary_dataset", "harmful_dataset", "dataset", "retain_images", "harmful_images")
FIRST = {
    "immunize": ("base_path", "output_dir", *_TASK, "objective", "strength", "max_primary_drop", "trainable_modules",
                 "max_steps", "learning_rate"),
    "attack": ("model_path", "role", *_TASK, "protocol", "attacks", "seeds", "settings", "base_path", "device"),
    "certify": ("model_path", "base_path", *_TASK, "protocol", "threshold", "recheck", "device"),
    "pretrain": ("model_name_or_path", "output_dir", *_TASK, "trainable_modules", "from_scratch", "max_steps",
                 "learning_rate", "per_device_train_batch_size"),
}  # fmt: skip
"""Options of each stage that ``--help`` shows first: about ten, whatever the family of the task."""


def read_words(
    kinds: Callable[[Family], Sequence[type]], argv: Sequence[str] | None, about: str | None,
    family: str | None = None, prog: str | None = None,
) -> tuple[Any, ...]:
    """The task's options, then instances of the other dataclasses that a stage asks for.

    Args:
        kinds: these dataclasses, for a family of tasks.
        argv: words after the command; those of the process by default.
        about: docstring of the stage.
        family: the family of the task, where the command says it already.

    Raises:
        ConfigError: options of several families, and whatever ``parse_options`` refuses.
    """
    found, words = choose_family(argv, family)
    told = (about or "").split("\n\n")[0]
    if family is None:
        others = ", ".join(f"{_FAMILY} {name}" for name in FAMILIES if name != found.name)
        told += f" Shown for a task of {found.name}, found by its options; see also {others}."
    verb = (prog or Path(sys.argv[0]).stem).split()[-1]
    return parse_options((found.arguments(), *kinds(found)), words, told, prog, FIRST.get(verb, ()))


def choose_family(argv: Sequence[str] | None, family: str | None = None) -> tuple[Family, list[str]]:
    """The family that ``--family`` or the other options name, and the words without ``--family``."""
    words, rest = [], iter(sys.argv[1:] if argv is None else argv)
    for word in rest:
        if word == _FAMILY:
            family = next(rest, "")
        elif word.startswith(f"{_FAMILY}="):
            family = word.partition("=")[2]
        else:
            words.append(word)
    return find_family(() if family is not None else given_options(words), family), words


def refuse_foreign(options: Any, family: Family) -> None:
    """Raise ConfigError for an option that the other kind of model alone has.

    A dataclass of options says in ``ONLY`` which of its fields are for a ``classifier`` or a ``pipeline`` alone.
    """
    for field in dataclasses.fields(options):
        kind = options.ONLY.get(field.name, family.kind)
        if kind != family.kind and getattr(options, field.name) != field.default:
            raise ConfigError(
                f"expected no {field.name} for a {family.kind}, got {getattr(options, field.name)!r}: it is an option "
                f"of a {kind} alone."
            )


def run_script(main: Callable[[], Any]) -> None:
    """Run a recipe; leave with one line for an error that this package raises on purpose."""
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
