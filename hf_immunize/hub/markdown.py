"""Untrusted text in Markdown: names and sentences that cannot become structure, whatever they contain."""

from __future__ import annotations

import re
from collections.abc import Iterable

from hf_immunize.report.text import NONE, clean

_STRUCTURE = re.compile(r"[\\`*_{}\[\]<>#!|~$&^=@]")
_LEADING = re.compile(r"^(\d{1,9})([.)])(?=\s|$)|^([-+:])")
_JOINER = "&#8288;"  # word joiner: invisible, and no address is recognised across it
_ADDRESS = re.compile(r"(://|(?i:www)(?=\.)|@)")


class Safe(str):
    """Text that is already Markdown."""


def prose(text: str) -> Safe:
    """A sentence as plain text on one line: no markup, no HTML, no link; a dash for nothing."""
    if isinstance(text, Safe):
        return text
    line = " ".join(clean(text).split())
    pieces = enumerate(_ADDRESS.split(line))
    joined = "".join(_entities(piece) if index % 2 == 0 else _broken(piece) for index, piece in pieces)
    return Safe(_LEADING.sub(_lead, joined) or NONE)


def listed(texts: Iterable[str]) -> Safe:
    """Several pieces of prose, separated by commas."""
    return Safe(", ".join(prose(text) for text in texts))


def _entities(text: str) -> str:
    return _STRUCTURE.sub(lambda found: f"&#{ord(found.group())};", text)


def _broken(piece: str) -> str:
    """An address's signal with a joiner inside, so that renderers that link bare addresses see none."""
    if piece == "://":
        return f":{_JOINER}//"
    return f"{_JOINER}&#64;" if piece == "@" else f"{piece}{_JOINER}"


def _lead(found: re.Match[str]) -> str:
    """A list marker at the start, its sign written as an entity."""
    number, closing, sign = found.groups()
    return f"{number}&#{ord(closing)};" if number else f"&#{ord(sign)};"


def code(text: str) -> Safe:
    """A name as a code span, which holds no markup; backticks and cell separators are replaced by look-alikes."""
    line = " ".join(clean(text).split()).replace("`", "ˋ").replace("|", "¦").replace("\\", "＼")
    return Safe(f"`{line}`" if line else "`(unnamed)`")
