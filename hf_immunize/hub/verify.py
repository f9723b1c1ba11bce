"""Is this folder what its certificate says? Answered file by file, from the files alone, without loading anything."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

from hf_immunize.errors import ConfigError, RecordError
from hf_immunize.exam.presets import known_attack
from hf_immunize.hub.applicability import inapplicable_attacks
from hf_immunize.hub.card_check import check_card, examined_on
from hf_immunize.hub.demands import code_in, elsewhere_in, is_configuration
from hf_immunize.hub.evidence import check_evidence
from hf_immunize.hub.findings import Finding, Findings, Verification
from hf_immunize.hub.inventory import Inventory, find_pickles, scan
from hf_immunize.hub.levels import Trust
from hf_immunize.hub.names import CERTIFICATE, SEAL, SIGNATURE, is_harmless, kind_of, problem_with
from hf_immunize.hub.policy import Circumstances, Policy, judge
from hf_immunize.hub.rejudge import check_verdicts
from hf_immunize.hub.seal import read_seal, write_seal
from hf_immunize.hub.signature import SignatureRecord, is_valid, trusted
from hf_immunize.hub.trust import judge_trust
from hf_immunize.hub.untrusted import AnyRecord, parse_record
from hf_immunize.hub.weights import check_weights
from hf_immunize.records import Certificate

__all__ = ["Finding", "Verification", "examine", "verify_folder"]

_LONGEST_VALID = 366


def verify_folder(
    folder: str | Path,
    *,
    policy: Policy | None = None,
    trusted_key: str | Path | None = None,
    checker_keys: Collection[str | Path] = (),
    today: datetime.date | None = None,
    rejudge: bool = False,
) -> Verification:
    """Check a model's folder against the certificate in it. Each file is read once; none is executed or unpickled.

    Args:
        folder: a local folder, or a snapshot in the Hub client's cache.
        policy: what the certificate has to say; without one, only that the files are what it says.
        trusted_key: public key (hexadecimal, or a file) whose signature is required.
        checker_keys: public keys of those whose signed rechecks count.
        today: the date that expiry is judged by; the current one (UTC) by default.
        rejudge: also recompute every verdict from the traces.

    Raises:
        RecordError: there is no such folder.
        ConfigError: the trusted key or the policy cannot be used.
    """
    key = None if trusted_key is None else trusted(trusted_key)
    findings = Findings()
    inventory = scan(folder, findings)
    return examine(
        inventory, findings, policy=policy, key=key, checkers={trusted(item) for item in checker_keys}, today=today,
        rejudge=rejudge, published=True,
    )


def examine(
    inventory: Inventory,
    findings: Findings,
    *,
    policy: Policy | None = None,
    key: str | None = None,
    checkers: Collection[str] = (),
    today: datetime.date | None = None,
    rejudge: bool = False,
    published: bool,
) -> Verification:
    """As ``verify_folder``, over files already listed. Before publishing, seal and card are not looked at."""
    find_pickles(inventory, findings)
    sealed = _check_seal(inventory, findings) if published else {}
    certificate = _read(Certificate, CERTIFICATE, inventory, findings, "certificate")
    signed_by, trust = None, Trust()
    if certificate is not None:
        if published:
            _check_age(certificate, sealed, inventory, findings)
        check_weights(certificate, inventory, findings, sealed)
        wanted = rejudge or (policy is not None and policy.rejudged)
        check_evidence(certificate, inventory, findings, keep=wanted)
        _check_plugins(certificate, findings)
        _check_loading(certificate, inventory, findings)
        _check_expiry(certificate, today or datetime.datetime.now(datetime.UTC).date(), findings)
        signed_by = _check_signature(key, sealed if published else None, inventory, findings)
        trust = judge_trust(signed_by, key, checkers, inventory, findings)
        if published:
            check_card(certificate, inventory, findings)
        if wanted and not any(item.level == "fail" for item in findings.found):
            check_verdicts(certificate, inventory, findings)
        if policy is not None:
            around = Circumstances(signed_by is not None, trust, inapplicable_attacks(inventory))
            judge(policy, certificate, around, findings)
    if any(item.level == "fail" for item in findings.found):
        trust = Trust()  # nobody speaks for files that are not what the certificate says
    name = inventory.root.resolve().name
    return Verification(name, tuple(findings.found), certificate, dict(inventory.digests), signed_by, trust)


def _read(
    kind: type[AnyRecord], name: str, inventory: Inventory, findings: Findings, code: str
) -> AnyRecord | None:
    """One record; every way in which it cannot be read becomes a finding."""
    try:
        return parse_record(kind, inventory.read(name))
    except RecordError as error:
        findings.fail(code, name, str(error))
        return None


def _check_seal(inventory: Inventory, findings: Findings) -> dict[str, str]:
    """Every file against SHA256SUMS. The certificate's own mismatch is told by ``_check_age``."""
    if SEAL not in inventory:
        findings.note("seal", SEAL, "the folder is not sealed: only weights and traces are pinned by the certificate.")
        return {}
    try:
        sealed = read_seal(inventory.read(SEAL))
    except RecordError as error:
        findings.fail("seal", SEAL, str(error))
        return {}
    for name, digest in sealed.items():
        if name not in inventory:
            findings.fail("seal-missing", name, f"expected this file, which {SEAL} lists, got none: download it again.")
        elif name != CERTIFICATE and inventory.digest(name) != digest:
            findings.fail("seal", name, f"changed since it was published: SHA-256 {inventory.digest(name)} instead of "
                          f"{digest}. Download it again.")
    for name in inventory.files:
        if name not in sealed and not is_harmless(name) and kind_of(name) != "recheck":
            findings.fail("seal-extra", name, "it was not part of what was published and may change what is loaded: "
                          "delete it.")
    return sealed


def _check_age(certificate: Certificate, sealed: Mapping[str, str], inventory: Inventory, findings: Findings) -> None:
    """A certificate that is not the one that was published: an older one, or a changed one."""
    created, told = certificate.provenance.created[:10], examined_on(inventory)
    if told is not None and created < told:
        findings.fail(
            "certificate-older", CERTIFICATE,
            f"an older certificate in place of the published one: its exam is of {created}, the card tells of {told}. "
            "Download the revision again.",
        )
    elif sealed and inventory.digest(CERTIFICATE) != sealed[CERTIFICATE]:
        findings.fail(
            "certificate-changed", CERTIFICATE,
            f"not the certificate that was published: SHA-256 {inventory.digest(CERTIFICATE)} instead of "
            f"{sealed[CERTIFICATE]}. Download it again.",
        )


def _check_plugins(certificate: Certificate, findings: Findings) -> None:
    """Attacks that are no part of this package: what rests on code that is not here cannot be believed."""
    if certificate.plan is None:
        return
    for item in certificate.plan.attacks:
        if item.plugin is None and known_attack(item.attack) is None:
            findings.fail("plugin", CERTIFICATE, f"its attack {item.attack!r} is none of this release, and no "
                          "plug-in is told to be behind it: nobody can say what was done.")
    if not any(item.plugin for item in certificate.plan.attacks):
        return
    from hf_immunize.certification.plugins import plan_problems

    try:
        problems = plan_problems(certificate.plan)
    except ConfigError as error:
        problems = [str(error)]
    for problem in problems:
        findings.fail("plugin", CERTIFICATE, f"{problem}.")


def _check_loading(certificate: Certificate, inventory: Inventory, findings: Findings) -> None:
    """Configuration and processor: the weights' meaning depends on them."""
    for name, digest in certificate.files.items():
        if problem := problem_with(name):
            findings.fail("path", CERTIFICATE, f"it names a file that may not be read: {name!r} ({problem}).")
        elif name not in inventory:
            findings.fail("file-missing", name, "expected this file, which the exam loaded, got none: restore it.")
        elif inventory.digest(name) != digest:
            findings.fail("file", name, "not the file that the exam loaded: the same weights act differently with it. "
                          "Restore it.")
    loose = [name for name in inventory.files if kind_of(name) == "loading" and name not in certificate.files]
    if loose and certificate.files:
        findings.fail("file-extra", loose[0], "the exam did not load this file, but a user would: delete it.")
    elif loose:
        findings.note("file", loose[0], f"the certificate does not cover {', '.join(loose)}: only {SEAL} does.")
    _check_demands(inventory, findings)


def _check_demands(inventory: Inventory, findings: Findings) -> None:
    """Code that loading could run, and other files that it could read."""
    code = [name for name in inventory.files if kind_of(name) == "code"]
    named = []
    for name in inventory.files:
        if kind_of(name) == "loading" and is_configuration(name):
            try:
                data = inventory.read(name)
            except RecordError as error:
                findings.fail("file", name, str(error))
                continue
            named += code_in(name, data)
            for what in elsewhere_in(data):
                findings.fail("elsewhere", name, f"it makes the loader go elsewhere: {what}. Do not load this model.")
    if code or named:
        told = "; ".join([*named, *([f"{len(code)} file(s) of code"] if code else [])])
        findings.note("code", (code or [CERTIFICATE])[0], f"{told}; code is run only if you ask for it with "
                      "trust_remote_code, and no check here covers what it does.")


def _check_expiry(certificate: Certificate, today: datetime.date, findings: Findings) -> None:
    try:
        last = datetime.date.fromisoformat(certificate.expires[:10])
        created = datetime.date.fromisoformat(certificate.provenance.created[:10])
    except ValueError:
        findings.fail("certificate", CERTIFICATE, "expected ISO dates of exam and expiry, got others: certify again.")
        return
    if last < today:
        findings.fail("expired", CERTIFICATE, f"expired on {last}: attackers improve; ask for a new exam.")
    if (last - created).days > _LONGEST_VALID:
        findings.fail("expiry", CERTIFICATE, f"valid from {created} until {last}, longer than {_LONGEST_VALID} days: "
                      "no exam speaks for attackers of that day. Certify again.")
    if created > today + datetime.timedelta(days=1):
        findings.fail("future", CERTIFICATE, f"its exam is dated {created}, which has not come: check both clocks.")


def _check_signature(
    key: str | None, sealed: Mapping[str, str] | None, inventory: Inventory, findings: Findings
) -> str | None:
    """The public key of a valid signature over this certificate and, once published, over its seal."""
    if SIGNATURE not in inventory:
        if key is not None:
            findings.fail("signature", SIGNATURE, "expected a signature by the trusted key, got no signature at all.")
        return None
    record = _read(SignatureRecord, SIGNATURE, inventory, findings, "signature")
    if record is None:
        return None
    certificate = inventory.read(CERTIFICATE)
    if record.certificate_sha256 != hashlib.sha256(certificate).hexdigest():
        findings.fail("signature-other", SIGNATURE, "it signs another certificate than the one beside it.")
        return None
    if not is_valid(record, certificate):
        findings.fail("signature-invalid", SIGNATURE, "the signature does not fit the certificate and its key.")
        return None
    if key is not None and record.public_key != key:
        findings.fail("signature-key", SIGNATURE, f"signed by another key: {record.public_key} instead of the trusted "
                      f"{key}.")
        return None
    covered = None if sealed is None else write_seal({name: sealed[name] for name in sealed if name != SIGNATURE})
    if covered is not None and not is_valid(record, certificate, covered):
        findings.fail("signature-seal", SEAL, f"not the list of files that {SIGNATURE} signs: one was changed, added "
                      "or taken away after it was signed, and sealed again. Download the revision again.")
        return None
    if key is None:
        findings.note("signature", SIGNATURE, f"valid, by key {record.public_key}; whose that is, you have to know.")
    return record.public_key
