"""The single judge on a synthetic folder: its certificate then follows from its traces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import record_builders as build

from hf_immunize.certification import Evidence, Rule, judge_traces
from hf_immunize.certification.primary_rows import judge_utility, keep_rows
from hf_immunize.records import AttackTrace, Certificate, Plan, sha256_file


def judge_again(folder: Path, plan: Plan, rule: Rule = Rule(), **evidence) -> Certificate:  # noqa: B008  (frozen)
    """Write the certificate that the traces in ``folder`` give; ``evidence`` replaces fields of the certificate's."""
    paths = sorted(folder.glob("traces/*/*.json"))
    traces: dict[str, list[AttackTrace]] = {}
    for path in paths:
        traces.setdefault(path.parent.name, []).append(AttackTrace.read(path))
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    written = Certificate.read(folder / "certificate.json")
    rows = build.answers(written)
    evidence = {"traces": hashes, "utility": judge_utility(rows), "utility_rows": keep_rows(folder, [rows])} | evidence
    certificate = judge_traces(traces, plan, rule, replace(Evidence.of_certificate(written), **evidence))
    certificate.write(folder / "certificate.json")
    return certificate
