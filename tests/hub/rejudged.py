"""The single judge on a synthetic folder: its certificate then follows from its traces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import record_builders as build

from hf_immunize.certification import Evidence, Rule, judge_traces
from hf_immunize.certification.primary_rows import judge_utility, keep_rows
from hf_immunize.records import AttackTrace, Certificate, Plan, loading_files, sha256_file


def judge_again(folder: Path, plan: Plan, rule: Rule = Rule(), **evidence) -> Certificate:  # noqa: B008  (frozen)
    """Write the certificate that the traces in ``folder`` give; ``evidence`` replaces fields of the certificate's."""
    paths = sorted(folder.glob("traces/*/*.json"))
    traces: dict[str, list[AttackTrace]] = {}
    written = Certificate.read(folder / "certificate.json")
    made = evidence.get("provenance", written.provenance)
    for path in paths:
        trace = AttackTrace.read(path)
        if trace.provenance != made:  # attacked on the day of the certificate
            trace = trace.model_copy(update={"provenance": made})
            trace.write(path)
        traces.setdefault(path.parent.name, []).append(trace)
    hashes = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    rows = build.answers(written)
    evidence = {"traces": hashes, "utility": judge_utility(rows), "utility_rows": keep_rows(folder, [rows]),
                "files": loading_files(folder)} | evidence
    certificate = judge_traces(traces, plan, rule, replace(Evidence.of_certificate(written), **evidence))
    certificate.write(folder / "certificate.json")
    return certificate
