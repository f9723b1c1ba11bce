"""What somebody saw who ran a few certified attack runs again, and their signature under it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from hf_immunize.records.base import Part, Record
from hf_immunize.records.provenance import Provenance


class RepeatedRun(Part):
    """One certified run, made again from the certificate's own settings."""

    trace: str
    """The certified trace, by its path relative to the certificate."""
    attack: str
    role: Literal["subject", "control", "scratch"]
    distance: float | None
    """Largest difference of the test score at any evaluation; null where the two cannot be laid on each other."""
    bound: float
    """The difference that is still no disagreement, at the evaluation where it was exceeded most or reached nearest."""
    agrees: bool
    told: str
    """The comparison in words."""


class RecheckRecord(Record):
    """A draw of certified runs that were made again, and whether each came out as the certificate says."""

    certificate_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the ``certificate.json`` that was checked."""
    drawn_with: int
    """The checker's seed: with the certificate it gives the drawn runs."""
    drawn_from: int
    """Certified runs that could have been drawn."""
    cells: int
    """Attacks of the certificate, whatever their verdict."""
    runs: list[RepeatedRun]
    verdicts: dict[str, str]
    """What is said of each drawn attack when the new runs take the place of the certified ones."""
    changed: list[str]
    """Drawn attacks whose verdict another one took the place of, although every run agreed or not."""
    provenance: Provenance

    @property
    def holds(self) -> bool:
        """Whether every run came out as certified, and every verdict with them."""
        return all(run.agrees for run in self.runs) and not self.changed

    @property
    def repeated(self) -> list[str]:
        """Attacks with at least one drawn run, each of which agreed."""
        bad = {run.attack for run in self.runs if not run.agrees} | set(self.changed)
        return sorted({run.attack for run in self.runs} - bad)


class SignedRecheck(Record):
    """``rechecks/*.json``: the text of a ``RecheckRecord`` with an Ed25519 signature over its UTF-8 bytes."""

    algorithm: str = Field(pattern=r"^ed25519$")
    public_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")
    record: str
    """The exact text that was signed."""
