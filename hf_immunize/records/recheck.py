"""What somebody saw who made a few certified attacks again, and their signature under it."""

from __future__ import annotations

from pydantic import Field

from hf_immunize.records.base import Part, Record
from hf_immunize.records.provenance import Provenance


class RepeatedTrial(Part):
    """One certified trial of an attack on one side, made again with each of its seeds from its own settings."""

    role: str
    attack: str
    trial: str
    seeds: list[int]
    evaluations: int
    """Evaluations that were compared, of all seeds."""
    distance: float | None
    """Largest difference of the test score at any evaluation; null where the curves cannot be laid on each other."""
    bound: float | None
    """The difference that is still no disagreement there, from how far new runs with other seeds lie apart."""
    agrees: bool
    told: str
    """The comparison in words."""


class RecheckRecord(Record):
    """A draw of certified trials that were made again, and whether each came out as the certificate says."""

    certificate_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Digest of the ``certificate.json`` that was checked."""
    drawn_with: int
    """The checker's seed: with the certificate it gives the drawn trials."""
    drawn_from: int
    """Certified trials that could have been drawn."""
    cells: int
    """Attacks of the certificate, whatever their verdict."""
    trials: list[RepeatedTrial]
    verdicts: dict[str, str]
    """What is said of each drawn attack when the new runs take the place of the certified ones."""
    overturned: list[str]
    """Attacks whose certified RESISTS becomes FAILS by that, or the other way round."""
    provenance: Provenance

    @property
    def holds(self) -> bool:
        """Whether every trial came out as certified, and no verdict was overturned."""
        return all(item.agrees for item in self.trials) and not self.overturned

    @property
    def refuted(self) -> list[str]:
        """Attacks with a trial that did not agree, or whose verdict was overturned."""
        return sorted({item.attack for item in self.trials if not item.agrees} | set(self.overturned))

    @property
    def repeated(self) -> list[str]:
        """Attacks with at least one drawn trial, each of which agreed."""
        return sorted({item.attack for item in self.trials} - set(self.refuted))


class SignedRecheck(Record):
    """``rechecks/*.json``: the text of a ``RecheckRecord`` with an Ed25519 signature over its UTF-8 bytes."""

    algorithm: str = Field(pattern=r"^ed25519$")
    public_key: str = Field(pattern=r"^[0-9a-f]{64}$")
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")
    record: str
    """The exact text that was signed."""
