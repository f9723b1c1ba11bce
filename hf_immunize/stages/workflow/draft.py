"""Writing a run file for people: every value with what it means beside it, and a mark where a person has to decide."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

MARK = "CHECK"
"""What stands before a line that nobody could decide from model and data."""
_WIDTH = 44


class Draft:
    """The text of a run file, line by line."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self.checks = 0

    def say(self, *lines: str, indent: int = 0) -> None:
        """Comment lines."""
        self._lines += [f"{'  ' * indent}# {line}".rstrip() for line in lines]

    def section(self, name: str, *about: str, indent: int = 0) -> None:
        """A key with options below it."""
        if not indent:
            self._lines.append("")
        self.say(*about, indent=indent)
        self._lines.append(f"{'  ' * indent}{name}:")

    def section_value(self, name: str, value: Any, *about: str) -> None:
        """A key of the file itself, with what it means above it."""
        self._lines.append("")
        self.say(*about)
        self.option(name, value, indent=0)

    def option(self, name: str, value: Any, about: str = "", *, check: str = "", indent: int = 1) -> None:
        """A key with its value, what it means, and what a person has to look at."""
        if check:
            self.checks += 1
            self._lines.append(f"{'  ' * indent}# {MARK}: {check}")
        line = f"{'  ' * indent}{name}: {_text(value)}"
        self._lines.append(f"{line:<{_WIDTH}}  # {about}" if about else line)

    def offer(self, name: str, value: Any, about: str, *, indent: int = 1) -> None:
        """A key that is switched off: its line may be used by taking the mark away."""
        line = f"{'  ' * indent}# {name}: {_text(value)}"
        self._lines.append(f"{line:<{_WIDTH}}  # {about}")

    def text(self) -> str:
        """The whole file."""
        return "\n".join(self._lines).strip() + "\n"


def _text(value: Any) -> str:
    """A value as YAML reads it again, without quotes where it needs none."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[\w/.@+,=-][\w/.@+,= -]*", value) and not value.startswith(("-", ",", "@"))
        if plain and value == value.strip() and yaml.safe_load(value) == value and "," not in value:
            return value
        return json.dumps(value, ensure_ascii=False)
    return str(value)
