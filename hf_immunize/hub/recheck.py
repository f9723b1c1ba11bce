"""Make a few of the certified trials again, on the downloaded weights: the only check on the evidence itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from hf_immunize.errors import ConfigError
from hf_immunize.hub.findings import Findings, Verification
from hf_immunize.hub.levels import Trust
from hf_immunize.hub.load import check_base, fetch
from hf_immunize.hub.names import CERTIFICATE
from hf_immunize.records import Certificate, RecheckRecord, RepeatedTrial


def repeat_attacks(
    folder: Path,
    found: Verification,
    *,
    base: str | Path,
    trials: int,
    seed: int,
    task: str | Path | None = None,
    device: str = "cpu",
    **fetching: Any,
) -> tuple[Verification, RecheckRecord | None]:
    """The verification with what ``trials`` random trials give now, and the record of it, to be signed and published.

    Files that are not what the certificate says are not attacked: the verification is returned as it is, without a
    record.

    Args:
        base: folder or ``owner/name`` of the base, whose weights must be the certificate's control. An adapter is put
            on it.
        seed: which trials are drawn. Who made the certificate must not choose it.
        task: YAML file with the data options that the exam was sat with; by default those in the certificate.
        fetching: see ``fetch``.

    Raises:
        ModelError: an adapter that does not fit its base, or another model that cannot be loaded.
        VerificationError: another base than the certificate's.
        RecordError: other data than the certificate's, or attacks of another release.
        ConfigError: no task options, or data that they do not lead to.
    """
    if found.certificate is None or not found.sound:
        return found, None
    from hf_immunize.certification.trials import repeat_trials

    bench = _bench(folder, found.certificate, base, task, device, fetching)
    record = repeat_trials(folder, bench, trials, seed)
    again = Findings()
    for item in record.trials:
        _tell(item, again)
    for name in record.overturned:
        again.fail("recheck", CERTIFICATE, f"with these runs {name} is {record.verdicts[name]}, not as certified. Do "
                   "not rely on this certificate.")
    findings = (*found.findings, *again.found)
    if not record.holds:
        return dataclasses.replace(found, findings=findings, trust=Trust()), record
    trust = Trust("repeated", None, len(record.repeated), record.cells)
    return dataclasses.replace(found, findings=findings, trust=trust), record


def search_attacks(
    folder: Path, found: Verification, *, base: str | Path, budget: int, seed: int, task: str | Path | None = None,
    device: str = "cpu", **fetching: Any,
) -> Verification:
    """The verification with the strongest of ``budget`` attacks with settings and seeds of one's own.

    It informs: a certificate speaks of the attacks that it lists. Arguments and errors as in ``repeat_attacks``.
    """
    if found.certificate is None or not found.sound:
        return found
    from hf_immunize.certification.search import search_afresh

    bench = _bench(folder, found.certificate, base, task, device, fetching)
    made = search_afresh(folder, bench, budget, seed)
    again = Findings()
    again.note("reattack", CERTIFICATE, f"the strongest of {len(made)} attacks with other settings and seeds: "
               f"{made[0].told}.")
    return dataclasses.replace(found, findings=(*found.findings, *again.found))


def _bench(
    folder: Path, certificate: Certificate, base: str | Path, task: str | Path | None, device: str,
    fetching: dict[str, Any],
) -> Any:
    """The exam set up again, after the base was compared with the certificate's control."""
    root = Path(base)
    if not root.is_dir():
        root = fetch(str(base), **fetching)
    check_base(root, certificate)
    from hf_immunize.certification.bench import open_bench, read_options

    options = _published_options(certificate) if task is None else read_options(task)
    return open_bench(folder, root, options, device)


def _published_options(certificate: Certificate) -> dict[str, Any]:
    """The task options that travel in the certificate."""
    if not certificate.task:
        raise ConfigError(
            "expected the data options of the exam, got none in the certificate: give the task file with --task."
        )
    return dict(certificate.task)


def _tell(item: RepeatedTrial, again: Findings) -> None:
    """One trial as a finding."""
    what = f"made again, {item.attack} {item.trial} on the {item.role}: {item.told}"
    if item.agrees:
        again.note("recheck", CERTIFICATE, f"{what}: it holds.")
    else:
        again.fail("recheck", CERTIFICATE, f"{what}: it does not hold here. Do not rely on this certificate.")
