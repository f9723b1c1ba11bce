"""Whether the control of a certificate is the base that is meant: the public model that the subject was made from.

A control that is anything else, a weaker copy for instance, makes every slow-down mean something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.hf_api import RepoFile

from hf_immunize.errors import VerificationError
from hf_immunize.hub.findings import Findings, Verification
from hf_immunize.hub.levels import Trust
from hf_immunize.hub.names import CERTIFICATE
from hf_immunize.hub.remote import asked, careful
from hf_immunize.records import Certificate, sha256_file, weight_files


def check_control(found: Verification, base: str | Path, **hub: Any) -> Verification:
    """The verification with what its control's digests say about ``base``, a folder or ``owner/name`` on the Hub.

    Args:
        hub: ``revision``, ``api``, ``token`` and ``timeout`` for a base on the Hub, of which nothing is downloaded.

    Raises:
        HubError: the Hub did not answer.
    """
    if found.certificate is None:
        return found
    findings = Findings()
    try:
        require_control(found.certificate, base, **hub)
    except VerificationError as error:
        findings.fail("control", CERTIFICATE, str(error))
    else:
        findings.note("control", CERTIFICATE, f"its control has the weights of {_name(base)}.")
    failed = any(item.level == "fail" for item in findings.found)
    return dataclasses.replace(
        found, findings=(*found.findings, *findings.found), trust=Trust() if failed else found.trust
    )


def require_control(certificate: Certificate, base: str | Path, **hub: Any) -> None:
    """Raise VerificationError unless the weights of ``base`` are those of the certificate's control.

    Raises:
        HubError: the Hub did not answer.
    """
    root = Path(base)
    held = _of_folder(root) if root.is_dir() else digests_on_hub(str(base), certificate.control.revision, **hub)
    control = certificate.control.weights
    if not control or any(held.get(name) != digest for name, digest in control.items()):
        wrong = sorted(name for name, digest in control.items() if held.get(name) != digest)
        raise VerificationError(
            f"expected the certificate's control to be {_name(base)}, got other weights "
            f"({', '.join(wrong[:3]) or 'none'}): the control must be the public "
            "model that the subject was made from. Certify against that one."
        )


def digests_on_hub(
    repo_id: str, revision: str | None = None, *, api: HfApi | None = None, token: str | None = None,
    timeout: float | None = 120.0,
) -> dict[str, str]:
    """SHA-256 of every large file of a revision, as the Hub computed it; nothing is downloaded.

    Raises:
        HubError: the Hub did not answer, or not with this repository.
    """
    client = api or HfApi(token=token)
    with careful(timeout, token):
        tree = asked("list the files of the base", token,
                     lambda: list(client.list_repo_tree(repo_id, revision=revision, recursive=True)))
    return {item.path: item.lfs.sha256 for item in tree if isinstance(item, RepoFile) and item.lfs is not None}


def named_base(folder: Path) -> str | None:
    """Hub id of the base that the card in a folder names; None where it names none."""
    from hf_immunize.hub.release import card_options

    return card_options(folder).base_model


def _of_folder(root: Path) -> Mapping[str, str]:
    return {path.relative_to(root).as_posix(): sha256_file(path) for path in weight_files(root)}


def _name(base: str | Path) -> str:
    return Path(base).name if Path(base).is_dir() else str(base)
