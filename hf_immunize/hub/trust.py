"""Who speaks for a certificate: its publisher alone, a key that the reader named, or somebody who repeated it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hf_immunize.errors import RecordError
from hf_immunize.hub.findings import Findings
from hf_immunize.hub.inventory import Inventory
from hf_immunize.hub.levels import Trust
from hf_immunize.hub.names import CERTIFICATE, RECHECKS, SIGNATURE, kind_of
from hf_immunize.hub.signature import SignatureRecord, is_valid, sign_text, signed_text
from hf_immunize.hub.untrusted import parse_record
from hf_immunize.records import Certificate, RecheckRecord, SignedRecheck


def claimed(inventory: Inventory, findings: Findings | None = None) -> list[Trust]:
    """What the signature and the rechecks in a folder say, whoever's keys they are; each checked as a signature.

    Rechecks of another certificate are left out. Problems become findings where ``findings`` is given.
    """
    found: list[Trust] = []
    if CERTIFICATE not in inventory:
        return found
    signer = _signer(inventory)
    if signer is not None:
        found.append(Trust("signed", signer))
    digest = inventory.digest(CERTIFICATE)
    try:
        certified = {cell.attack for cell in parse_record(Certificate, inventory.read(CERTIFICATE)).cells}
    except RecordError:
        return found
    for name in (name for name in inventory.files if kind_of(name) == "recheck"):
        try:
            key, record = read_recheck(inventory.read(name))
        except RecordError as error:
            if findings is not None:
                findings.fail("recheck", name, str(error))
            continue
        if record.certificate_sha256 != digest:
            if findings is not None:
                findings.note("recheck-other", name, "a recheck of another certificate than the one beside it.")
        elif record.holds:
            found.append(Trust("repeated", key, len(set(record.repeated) & certified), len(certified)))
    return found


def _signer(inventory: Inventory) -> str | None:
    """Public key of a signature over the certificate's bytes; None without a valid one."""
    if SIGNATURE not in inventory:
        return None
    try:
        record = parse_record(SignatureRecord, inventory.read(SIGNATURE))
    except RecordError:
        return None
    return record.public_key if is_valid(record, inventory.read(CERTIFICATE)) else None


def read_recheck(data: bytes) -> tuple[str, RecheckRecord]:
    """Key and record of a file in ``rechecks/``.

    Raises:
        RecordError: not a signed recheck, or a signature that does not fit.
    """
    signed = parse_record(SignedRecheck, data)
    if not signed_text(signed.public_key, signed.signature, signed.record.encode()):
        raise RecordError("expected a recheck signed by the key it names, got another signature: delete the file.")
    return signed.public_key, parse_record(RecheckRecord, signed.record.encode())


def sign_recheck(record: RecheckRecord, key_file: str | Path) -> tuple[str, bytes]:
    """Name and content of the file that holds a recheck, signed: to be published beside the certificate.

    Raises:
        ConfigError: as ``signature.sign``.
    """
    text = record.dumps()
    public_key, signature = sign_text(text.encode(), key_file)
    signed = SignedRecheck(algorithm="ed25519", public_key=public_key, signature=signature, record=text)
    return f"{RECHECKS}/{public_key[:16]}-{record.drawn_with}.json", signed.dumps().encode()


def judge_trust(
    signed_by: str | None, publisher: str | None, checkers: Collection[str], inventory: Inventory, findings: Findings
) -> Trust:
    """The level that this reader can give, from keys that the reader named.

    Args:
        signed_by: key of a valid signature over certificate and seal.
        publisher: the key that the reader trusts as the publisher's.
        checkers: keys of those whose rechecks the reader believes. A publisher repeats nobody's word but their own.
    """
    best = Trust("signed", publisher) if publisher is not None and signed_by == publisher else Trust()
    for item in claimed(inventory, findings):
        if item.level != "repeated" or item.key == signed_by:
            continue
        if item.key not in checkers:
            findings.note("recheck-unknown", CERTIFICATE, f"{item}, a key that you did not name with --checker-key.")
        elif item.cells and (best.level != "repeated" or item.cells > best.cells):
            best = item
    _refutations(signed_by, checkers, inventory, findings)
    return best


def _refutations(
    signed_by: str | None, checkers: Collection[str], inventory: Inventory, findings: Findings
) -> None:
    """A recheck that did not come out as certified: a failure from a key that was named, else worth reading."""
    digest = inventory.digest(CERTIFICATE)
    for name in (name for name in inventory.files if kind_of(name) == "recheck"):
        try:
            key, record = read_recheck(inventory.read(name))
        except RecordError:  # told by ``claimed``
            continue
        if record.certificate_sha256 != digest or record.holds:
            continue
        told = f"{key} ran certified attacks again, and {', '.join(record.refuted)} did not come out as certified."
        if key in checkers or key == signed_by:
            findings.fail("recheck", name, f"{told} Do not rely on this certificate.")
        else:
            findings.note("recheck", name, f"{told} You did not name this key: ask whose it is.")
