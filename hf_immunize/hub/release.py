"""What goes out: the files of one revision, chosen, rendered and checked in memory before anything is sent."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from hf_immunize.errors import ImmunizeError, PolicyUnmetError, PublishRefusedError, RecordError
from hf_immunize.hub.card import CardOptions, render_card
from hf_immunize.hub.card_check import options_of, split_card
from hf_immunize.hub.demands import code_in, custom_components, is_configuration
from hf_immunize.hub.findings import Findings, Verification
from hf_immunize.hub.inventory import LARGEST_FILE, Inventory, scan
from hf_immunize.hub.levels import Trust
from hf_immunize.hub.library import PIPELINE_FILE
from hf_immunize.hub.names import CARD, CERTIFICATE, REPORT, SEAL, SIGNATURE, kind_of
from hf_immunize.hub.policy import PUBLISHING, Policy
from hf_immunize.hub.seal import write_seal
from hf_immunize.hub.signature import SignatureRecord, find_key, is_valid, public_key_of, sign
from hf_immunize.hub.trust import claimed
from hf_immunize.hub.untrusted import parse_record
from hf_immunize.hub.verify import examine
from hf_immunize.records import Certificate
from hf_immunize.report import curve_pictures, report_html

_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
_SHORTEST_TOKEN = 12  # a shorter one may be an ordinary word
_NO_CERTIFICATE = (
    f"expected {CERTIFICATE} in {{folder}}, got none: no model is published without a certificate for exactly its "
    "weights. Attack it and certify it first; there is no option that skips this."
)
CHANGED = (
    "expected {name} to stay as it was verified, got a change while publishing: stop what writes to the folder, then "
    "try again."
)
_WRITTEN_HERE = (CARD, SEAL, REPORT)
_PICTURE = re.compile(r"plots/\d+-[a-z0-9-]+\.svg")


@dataclass(frozen=True)
class Release:
    """The complete content of a revision."""

    weights: dict[str, Path]
    small: dict[str, bytes]
    digests: dict[str, str]
    """SHA-256 of every file that goes out."""
    left_out: tuple[str, ...]
    """Files of the folder that stay behind."""
    verification: Verification

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        small = {name: len(data) for name, data in self.small.items()}
        return dict(sorted((small | {name: path.stat().st_size for name, path in self.weights.items()}).items()))


def prepare(
    folder: str | Path,
    *,
    policy: Policy | None = None,
    allow_failed: bool = False,
    card: CardOptions | None = None,
    repo_id: str | None = None,
    signing_key: str | Path | None = None,
    sign_by_default: bool = True,
    token: str | None = None,
) -> Release:
    """The gate. Nothing is written and nothing is sent.

    Args:
        allow_failed: let a model out that does not meet the policy (``PUBLISHING`` by default). Files that are not
            what the certificate says are never let out, nor is an expired certificate.
        signing_key: private key that signs; by default that of ``signature.find_key``, where there is one.
        sign_by_default: whether to look for that key.
        token: refused in any file, beside everything else that looks like one.

    Raises:
        PublishRefusedError: no certificate, other files than certified, an unmet policy, or a secret in a file.
    """
    if signing_key is None and sign_by_default:
        signing_key = find_key()
    findings = Findings()
    everything = scan(folder, findings)
    if CERTIFICATE not in everything:
        raise PublishRefusedError(_NO_CERTIFICATE.format(folder=folder))
    chosen, policy = _choose(everything), policy or PUBLISHING
    if signing_key is not None:  # the signature is made below, over the bytes that go out
        chosen = chosen.only(set(chosen.files) - {SIGNATURE})
        policy = dataclasses.replace(policy, signed=False)
    verification = examine(chosen, findings, policy=policy, published=False)
    _gate(verification, str(folder), allow_failed)
    rendered = _rendered(everything, card, repo_id, _speakers(chosen, signing_key))
    small, weights = _contents(chosen, verification)
    _refuse_remote_code(small, everything)
    _refuse_non_finite(weights)
    small |= rendered
    digests = {name: chosen.digest(name) for name in chosen.files} | _digests_of(small)
    digests |= _digests_of(_signed(small, digests, signing_key))
    small[SEAL] = write_seal(digests)
    _refuse_secrets(small, token)
    left_out = sorted(name for name in set(everything.files) - set(chosen.files) if not _is_written_here(name))
    return Release(weights, small, digests | _digests_of({SEAL: small[SEAL]}), tuple(left_out), verification)


def _refuse_non_finite(weights: dict[str, Path]) -> None:
    """Raise PublishRefusedError for weights that are no numbers: no exam of them means anything."""
    from hf_immunize.models import non_finite_in_file  # torch is needed here alone

    for name, path in weights.items():
        if found := non_finite_in_file(path):
            raise PublishRefusedError(
                f"expected finite weights in {name}, got NaN or infinity in {len(found)} tensors ({found[0]}, …): the "
                "model is ruined. Train it again, and attack and certify what comes out."
            )


def _speakers(chosen: Inventory, key: str | Path | None) -> list[Trust]:
    """Who signs what goes out, and who repeated it."""
    said = claimed(chosen)
    return said if key is None else [Trust("signed", public_key_of(key)), *said]


def _rendered(
    folder: Inventory, card: CardOptions | None, repo_id: str | None, speakers: list[Trust]
) -> dict[str, bytes]:
    """Card, pictures and page, drawn at this moment from the records: none of them can be of another exam."""
    drawn = {REPORT: report_html([folder.root]).encode()} | curve_pictures(folder.root)
    return drawn | {CARD: _card(folder, card, repo_id, speakers).encode()}


def _signed(small: dict[str, bytes], digests: dict[str, str], key: str | Path | None) -> dict[str, bytes]:
    """The signature, made here or found in the folder, over the certificate and over what goes out with it."""
    sealed = write_seal({name: digest for name, digest in digests.items() if name != SIGNATURE})
    if key is not None:
        small[SIGNATURE] = sign(small[CERTIFICATE], sealed, key)
    elif SIGNATURE in small:
        found = parse_record(SignatureRecord, small[SIGNATURE])
        if not is_valid(found, small[CERTIFICATE], sealed):
            raise PublishRefusedError(
                f"expected {SIGNATURE} to sign the files that go out now, got a signature over others: sign again with "
                "--sign-key, or delete it."
            )
    return {SIGNATURE: small[SIGNATURE]} if SIGNATURE in small else {}


def _contents(chosen: Inventory, verified: Verification) -> tuple[dict[str, bytes], dict[str, Path]]:
    """What goes up from memory, the same bytes that were verified, and the weights, which go up from disk."""
    weights = {name: path for name, path in chosen.files.items() if kind_of(name) == "weights"}
    small = {name: chosen.read(name, LARGEST_FILE) for name in chosen.files if name not in weights}
    for name in small:
        if verified.digests.get(name, chosen.digest(name)) != chosen.digest(name):
            raise PublishRefusedError(CHANGED.format(name=name))
    return small, weights


def _choose(everything: Inventory) -> Inventory:
    """The certified weights and traces, what loading reads, the records, the page and its pictures: nothing else."""
    try:
        certificate = Certificate.read(everything.files[CERTIFICATE])
    except RecordError:  # told as a finding by the examination
        return everything.only([CERTIFICATE])
    listed = {*certificate.subject.weights, *certificate.traces, *certificate.utility_rows, *certificate.files}

    def goes(name: str) -> bool:
        kind = kind_of(name)
        if kind in ("weights", "trace"):
            return name in listed
        return not _is_written_here(name) and (kind in ("loading", "record", "recheck") or _is_page(name))

    return everything.only(name for name in everything.files if goes(name))


def _is_written_here(name: str) -> bool:
    return name in _WRITTEN_HERE or _PICTURE.fullmatch(name) is not None


def _is_page(name: str) -> bool:
    return kind_of(name) == "page" and not name.lower().endswith((".html", ".md"))


def _gate(verification: Verification, folder: str, allow_failed: bool) -> None:
    bad = [finding for finding in verification.findings if finding.level != "note"]
    fatal = [finding for finding in bad if finding.level == "fail"]
    if fatal or (bad and not allow_failed):
        advice = (
            "Restore the files or certify again; no option skips this."
            if fatal
            else "Improve it, or publish it as one that failed with --allow-failed: its card opens with what failed."
        )
        kind = PublishRefusedError if fatal else PolicyUnmetError
        raise kind(
            f"expected a model in {folder} that is what its certificate says and meets the policy, got:\n"
            + "\n".join(f"  {finding}" for finding in (fatal or bad)) + f"\n{advice}"
        )


def card_options(folder: str | Path) -> CardOptions:
    """What the card in a folder says beyond the records; nothing where there is no card of this package's making."""
    inventory = scan(folder, Findings())
    try:
        return options_of(*split_card(inventory.read(CARD).decode("utf-8"))) if CARD in inventory else CardOptions()
    except (ImmunizeError, ValueError):  # a card of somebody else's making is replaced
        return CardOptions()


def _card(
    folder: Inventory, card: CardOptions | None, repo_id: str | None, speakers: list[Trust] | None = None
) -> str:
    options = card or card_options(folder.root)
    if repo_id is not None and "/" in repo_id:
        options = dataclasses.replace(options, repo_id=repo_id)
    return render_card(folder.root, options, speakers)


def _digests_of(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}


def _refuse_remote_code(small: dict[str, bytes], folder: Inventory) -> None:
    """A model whose configuration runs code from the repository: no check here covers what that code does."""
    found = [what for name, data in small.items() if is_configuration(name) for what in code_in(name, data)]
    found += custom_components(small.get(PIPELINE_FILE, b"{}"), folder.files)
    if found:
        raise PublishRefusedError(
            f"expected a model that loads without remote code, got {found[0]}: its certificate would not cover the "
            "code that runs. Save the model with a class of transformers or diffusers."
        )


def _refuse_secrets(small: dict[str, bytes], token: str | None) -> None:
    for name, data in small.items():
        if _TOKEN.search(data) or (token and len(token) >= _SHORTEST_TOKEN and token.encode() in data):
            raise PublishRefusedError(
                f"expected no access token in any published file, got one in {name}: take it out, revoke it, and make "
                "the file again."
            )
