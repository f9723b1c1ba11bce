"""What a check found, in one shape for tables and scripts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "fails"]


@dataclass(frozen=True)
class Finding:
    """One line of a plan.

    Args:
        part: what was looked at.
        level: ok; note, which a user should read; fails, which would stop a stage later.
        told: what was found, and what to do.
    """

    part: str
    level: Level
    told: str

    def as_json(self) -> dict[str, Any]:
        """Plain data for scripts."""
        return asdict(self)
