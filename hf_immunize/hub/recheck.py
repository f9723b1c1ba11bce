"""Run a few of the certified attacks again, on the downloaded weights: the only check on the evidence itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hf_immunize.errors import ModelError
from hf_immunize.hub.findings import Findings, Verification
from hf_immunize.hub.library import library_of
from hf_immunize.hub.load import check_base, fetch
from hf_immunize.hub.names import CERTIFICATE
from hf_immunize.records import Interval
from hf_immunize.report import text


def repeat_attacks(
    folder: Path,
    found: Verification,
    *,
    base: str | Path,
    task: str | Path,
    cells: int,
    seed: int = 0,
    device: str = "cpu",
    **fetching: Any,
) -> Verification:
    """The verification, and for each of ``cells`` random cells whether what comes out now lies in its stored interval.

    Files that are not what the certificate says are not attacked: the verification is returned as it is.

    Args:
        base: folder or ``owner/name`` of the base, whose weights must be the certificate's control.
        task: YAML file with the data options that the exam was sat with.
        fetching: see ``fetch``.

    Raises:
        ModelError: an adapter or a pipeline, which the attacks here do not load.
        VerificationError: another base than the certificate's.
        RecordError: other data than the certificate's, or a rule of another release.
    """
    certificate = found.certificate
    if certificate is None or not found.sound:
        return found
    if library_of(certificate, {path.name for path in folder.iterdir()}).name != "transformers":
        raise ModelError(
            "expected an image classifier to attack again, got an adapter or a pipeline: recheck a pipeline "
            "with hf-immunize certify --recheck."
        )
    root = Path(base)
    if not root.is_dir():
        root = fetch(str(base), **fetching)
    check_base(root, certificate)
    from hf_immunize.certification import read_task, sit_again

    again = Findings()
    for line in sit_again(folder, root, read_task(task), cells, seed, device):
        _tell(line, again)
    return dataclasses.replace(found, findings=(*found.findings, *again.found))


def _tell(line: Any, again: Findings) -> None:
    """One measure of one cell (a ``certification.Recheck``) as a finding."""
    new = "no figure" if line.found is None else f"{line.found:.3g}"
    told = f"attacked again with {line.attack}: {line.measure} {new}, certified {_interval(line.stored)}"
    if line.agrees:
        again.note("recheck", CERTIFICATE, f"{told}: it holds.")
    else:
        again.fail("recheck", CERTIFICATE, f"{told}: it does not hold here. Do not rely on this certificate.")


def _interval(stored: Interval) -> str:
    bounds = ("open" if bound is None else f"{bound:.3g}" for bound in (stored.low, stored.high))
    return f"{text.NONE if stored.estimate is None else f'{stored.estimate:.3g}'} ({' to '.join(bounds)})"
