"""What a shell offers after a verb whose options are read by its stage: their flags, from a list that ships.

The list spares the seconds that importing a stage takes. ``python -m hf_immunize.commands.completion`` writes it anew;
a test holds it to what ``--help`` says.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from functools import cache
from importlib import import_module
from pathlib import Path

from hf_immunize.commands.verbs import STAGES
from hf_immunize.errors import ConfigError

FILE = Path(__file__).with_name("flags.json")
_LINE = re.compile(r"^ {2}(-\w, |-\w \w+, )?--", flags=re.M)
_FLAG = re.compile(r"(?<!\S)(--[a-zA-Z][\w-]*)")
FAMILIES = ("classes", "concepts", "prompts")
WITH_FAMILIES = ("attack", "certify", "immunize", "pretrain")
"""Verbs whose options follow the family of the task."""


@cache
def known_flags() -> dict[str, list[str]]:
    """Flags by verb."""
    found: dict[str, list[str]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def flags_in(help_text: str) -> set[str]:
    """The flags that the lines of a ``--help`` begin with; those that texts mention are left out, and of two
    spellings the one with dashes: keys of option files have none."""
    found: set[str] = set()
    for line in help_text.splitlines():
        if _LINE.match(line):
            found |= set(_FLAG.findall(line.strip().partition("   ")[0]))
    return {flag for flag in found if f"--{flag[2:].replace('-', '_')}" not in found - {flag}}


def offered(verb: str, incomplete: str) -> list[str]:
    """Flags that begin as a word does; names of presets where the verb takes them."""
    if incomplete.startswith("-"):
        return [flag for flag in known_flags().get(verb, ()) if flag.startswith(incomplete)]
    if verb == "recipes":
        from hf_immunize.stages.recipes import find_presets

        return [name for name in find_presets() if name.startswith(incomplete)]
    return []


def help_of(verb: str, words: tuple[str, ...] = ()) -> str:
    """What a verb prints for ``--help``."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.suppress(SystemExit, ConfigError):
        import_module(f"hf_immunize.stages.{verb}").main([*words, "--help"], prog=f"hf-immunize {verb}")
    return told.getvalue()


def all_flags(verb: str) -> list[str]:
    """The flags of a verb, over the families of tasks where they matter."""
    asked: list[tuple[str, ...]] = [("--family", name) for name in FAMILIES] if verb in WITH_FAMILIES else [()]
    found = {"--family"} if verb in WITH_FAMILIES else set()
    return sorted(found.union(*(flags_in(help_of(verb, words)) for words in asked)))


if __name__ == "__main__":
    from hf_immunize.records import atomic_write

    atomic_write(FILE, json.dumps({verb: all_flags(verb) for verb in STAGES}, indent=1) + "\n")
