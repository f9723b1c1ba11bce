"""What a verification found, file by file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from hf_immunize.errors import VerificationError
from hf_immunize.hub.levels import Trust
from hf_immunize.hub.names import CERTIFICATE
from hf_immunize.records import Certificate
from hf_immunize.report.text import clean

_LONGEST = 1000


@dataclass(frozen=True)
class Finding:
    """One thing about one file. A ``note`` is worth reading; only ``fail`` and ``policy`` refuse."""

    level: Literal["fail", "policy", "note"]
    code: str
    """Short stable name of the check."""
    file: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}: {self.message}"


@dataclass
class Findings:
    """Findings as they come up. Text from the files is stripped of control characters and cut."""

    found: list[Finding] = field(default_factory=list)

    def fail(self, code: str, file: str, message: str) -> None:
        """Something is not what the certificate says."""
        self._add("fail", code, file, message)

    def note(self, code: str, file: str, message: str) -> None:
        """Something a reader should know."""
        self._add("note", code, file, message)

    def unmet(self, file: str, message: str) -> None:
        """The files are sound, but the policy asks for more."""
        self._add("policy", "policy", file, message)

    def failed(self, code: str, file: str) -> bool:
        """Whether this check failed for this file."""
        return any((item.level, item.code, item.file) == ("fail", code, file) for item in self.found)

    def _add(self, level: Any, code: str, file: str, message: str) -> None:
        self.found.append(Finding(level, code, _short(file, 200), _short(message, _LONGEST)))


def _short(text: str, longest: int) -> str:
    line = clean(text)
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


@dataclass(frozen=True)
class Verification:
    """The outcome over one folder."""

    folder: str
    findings: tuple[Finding, ...]
    certificate: Certificate | None
    digests: dict[str, str]
    """SHA-256 of every file that was read, by relative name."""
    signed_by: str | None
    """Public key of a valid signature over this certificate, whoever's key it is; null without one."""
    trust: Trust = Trust()
    """Who speaks for it, by the keys that the reader named."""

    @property
    def sound(self) -> bool:
        """The files are what the certificate says."""
        return not any(finding.level == "fail" for finding in self.findings)

    @property
    def ok(self) -> bool:
        """The files are what the certificate says, and the policy accepts what it says."""
        return not any(finding.level in ("fail", "policy") for finding in self.findings)

    def without_control(self) -> Verification:
        """The same with a note that nobody compared the certificate's control with the base that it stands for."""
        if self.certificate is None:
            return self
        named = Findings()
        named.note("control", CERTIFICATE, f"its control, called {self.certificate.control.name}, was compared with no "
                   "model: --base FOLDER_OR_ID, the public model that this one was made from, does that.")
        return replace(self, findings=(*self.findings, *named.found))

    def require(self) -> Verification:
        """Self, or VerificationError that lists every failure."""
        if not self.ok:
            bad = [f"  {finding}" for finding in self.findings if finding.level != "note"]
            head = "files that are not what their certificate says" if not self.sound else "an unmet policy"
            raise VerificationError(
                f"expected a verified model in {self.folder}, got {head}; do not use it before this is explained:\n"
                + "\n".join(bad)
            )
        return self

    def as_json(self) -> dict[str, Any]:
        """Plain data for scripts."""
        certificate = self.certificate
        return {
            "folder": self.folder,
            "ok": self.ok,
            "sound": self.sound,
            "overall": None if certificate is None else certificate.overall,
            "families": {} if certificate is None else {item.family: item.verdict for item in certificate.families},
            "expires": None if certificate is None else certificate.expires,
            "trust": self.trust.as_json(),
            "signed_by": self.signed_by,
            "findings": [asdict(finding) for finding in self.findings],
            "sha256": dict(sorted(self.digests.items())),
        }
