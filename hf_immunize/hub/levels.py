"""Three levels of who speaks for a certificate: nobody but itself, a key, or somebody who repeated its attacks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["self-reported", "signed", "repeated"]
LEVELS: tuple[Level, ...] = ("self-reported", "signed", "repeated")
"""Weakest first."""


@dataclass(frozen=True)
class Trust:
    """One of three levels, and by whom."""

    level: Level = "self-reported"
    key: str | None = None
    """Public key of who signed or repeated; null for nobody, and for a repetition on the reader's own machine."""
    cells: int = 0
    """Attacks of which a drawn run was made again and agreed."""
    of: int = 0
    """Attacks of the certificate."""

    def __str__(self) -> str:
        if self.level == "self-reported":
            return "self-reported"
        if self.level == "signed":
            return f"signed by {self.key}"
        return f"repeated by {self.key or 'this machine'} ({self.cells} cells of {self.of})"

    def reaches(self, minimum: str) -> bool:
        """Whether this level is at least another one."""
        return LEVELS.index(self.level) >= LEVELS.index(minimum)

    def as_json(self) -> dict[str, Any]:
        """Plain data for scripts."""
        return asdict(self) | {"told": str(self)}


_KEYS = "whose keys these are, you have to know."
_LINE = re.compile(r"^\*\*Who says so:\*\* (.*)$", re.M)
_SIGNED = re.compile(r"signed by `([0-9a-f]{64})`")
_REPEATED = re.compile(r"repeated by `([0-9a-f]{64})` \((\d+) cells of (\d+)\)")


def speakers_line(speakers: Sequence[Trust]) -> str:
    """Who signed and who repeated, in Markdown; a card cannot know which keys its reader trusts."""
    told = [str(item).replace(str(item.key), f"`{item.key}`") for item in speakers]
    if not told:
        return "self-reported; no signature stands beside this certificate."
    return f"{'; '.join(told)}; {_KEYS}"


def speakers_in(body: str) -> list[Trust]:
    """What such a line in a card claims; nothing where there is none."""
    line = _LINE.search(body)
    told = line[1] if line else ""
    signed = [Trust("signed", match[1]) for match in _SIGNED.finditer(told)]
    return signed + [
        Trust("repeated", match[1], int(match[2]), int(match[3])) for match in _REPEATED.finditer(told)
    ]
