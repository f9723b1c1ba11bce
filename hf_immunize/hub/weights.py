"""Weights against the certificate: the examined ones, all of them, and no others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from hf_immunize.errors import RecordError
from hf_immunize.hub.findings import Findings
from hf_immunize.hub.inventory import Inventory
from hf_immunize.hub.names import CERTIFICATE, kind_of, problem_with
from hf_immunize.hub.untrusted import parse_json
from hf_immunize.records import Certificate

_INDEX = ".safetensors.index.json"


def check_weights(
    certificate: Certificate, inventory: Inventory, findings: Findings, sealed: Mapping[str, str]
) -> None:
    """Hash every weight file once and say what is wrong with each.

    Args:
        sealed: digests that the seal names; they tell a swapped certificate from swapped weights.
    """
    wanted = certificate.subject.weights
    if not wanted:
        findings.fail("certificate", CERTIFICATE, "it names no weight file: nothing was examined.")
    safe = {}
    for name, digest in wanted.items():
        problem = problem_with(name)
        if problem is not None or kind_of(name) != "weights":
            findings.fail("path", CERTIFICATE, f"it names weights that may not be read: {name!r} "
                          f"({problem or 'not a safetensors file'}). Do not use this certificate.")
        else:
            safe[name] = digest
    actual = {name: inventory.digest(name) for name in inventory.files if kind_of(name) == "weights"}
    for name in sorted(set(actual) - set(wanted)):
        findings.fail("weights-extra", name, "weights that were never examined: delete them, or certify them.")
    intact = all(sealed.get(name) == digest for name, digest in actual.items()) and bool(sealed)
    known = {*safe.values(), *certificate.control.weights.values()}
    if actual and intact and not known & set(actual.values()):
        findings.fail("certificate-of-another", CERTIFICATE, "the certificate of another model: it is about "
                      f"{certificate.subject.name!r}, and none of its weights are in this folder.")
        return
    for name, digest in safe.items():
        _check_file(name, digest, actual, certificate, findings)
    _check_indices(inventory, set(safe), findings)


def _check_file(
    name: str, digest: str, actual: Mapping[str, str], certificate: Certificate, findings: Findings
) -> None:
    control = certificate.control.weights
    if name not in actual:
        findings.fail("weights-missing", name, "expected these examined weights, got no such file: download them.")
    elif actual[name] == digest:
        return
    elif actual[name] in control.values():
        findings.fail("weights-of-base", name, f"these are the weights of the un-immunized base "
                      f"({certificate.control.name!r}), not those that were examined. Do not use them as immunized.")
    else:
        findings.fail("weights", name, f"not the weights that were examined: SHA-256 {actual[name]} instead of "
                      f"{digest}. The file was changed, or the certificate is of another model.")


def _check_indices(inventory: Inventory, examined: set[str], findings: Findings) -> None:
    """An index of shards may only lead to examined files of its own folder."""
    for name in inventory.files:
        if not name.endswith(_INDEX):
            continue
        try:
            loaded: Any = parse_json(inventory.read(name))
            shards = set(loaded["weight_map"].values())
        except (RecordError, KeyError, TypeError, AttributeError):
            findings.fail("index", name, "expected an index of safetensors shards, got something else: restore it.")
            continue
        for shard in sorted(map(str, shards)):
            target = (PurePosixPath(name).parent / shard).as_posix()
            if problem_with(shard) is not None or target not in examined:
                findings.fail("index", name, f"it leads to {shard!r}, which is not among the examined weights.")
