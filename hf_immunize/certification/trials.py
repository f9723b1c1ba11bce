"""Make randomly drawn trials of a certified exam again, whatever their cell says, and compare curves and verdicts."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_immunize.attacks import Run
from hf_immunize.attacks.core.stored import trace_of
from hf_immunize.certification.adapting import widened
from hf_immunize.certification.bench import Bench
from hf_immunize.certification.curves import Comparison, compare_trial
from hf_immunize.certification.judge import Evidence, find_rule, judge_traces
from hf_immunize.certification.proposing import proposed
from hf_immunize.errors import ConfigError, ImmunizeError, RecordError
from hf_immunize.records import AttackTrace, Certificate, Provenance, RecheckRecord, RepeatedTrial, sha256_file

Trial = tuple[str, str, str]
"""Role, attack, and name of the trial."""


def certified_trials(folder: str | Path, certificate: Certificate) -> dict[Trial, list[AttackTrace]]:
    """Every trial behind the certificate, each run checked against its hash.

    Raises:
        RecordError: a trace that is missing or not the one that was certified, or none at all.
    """
    found: dict[Trial, list[AttackTrace]] = {}
    for name, digest in sorted(certificate.traces.items()):
        path = Path(folder) / name
        if not path.is_file() or sha256_file(path) != digest:
            raise RecordError(f"expected {path} as it was certified, got another or no file: certify anew.")
        trace = AttackTrace.read(path)
        found.setdefault((trace.role, trace.attack, trace.trial), []).append(trace)
    if not found:
        raise RecordError(f"expected a certificate with traces in {folder}, got none: attack first.")
    return found


def draw_trials(trials: Mapping[Trial, Sequence[AttackTrace]], count: int, seed: int) -> list[Trial]:
    """``count`` of them with equal chances: winners and losers, of model and base, also where an attack did not apply.

    Raises:
        ConfigError: fewer than one asked for.
    """
    if count < 1:
        raise ConfigError(f"expected at least one trial to make again, got {count}.")
    known = sorted(trials)
    return random.Random(seed).sample(known, min(count, len(known)))


def repeat_trials(folder: str | Path, bench: Bench, count: int, seed: int) -> RecheckRecord:
    """Draw trials of ``folder/certificate.json``, make them again, and say what came out.

    Args:
        seed: the checker's; who made the certificate must not choose it.

    Raises:
        ConfigError: no trial asked for.
        RecordError: other weights, rows or traces than the certificate's.
    """
    folder = Path(folder)
    certificate = Certificate.read(folder / "certificate.json")
    trials = certified_trials(folder, certificate)
    rows = min(part.rows for part in certificate.harmful_data[-2:])
    scored = rows if certificate.harmful_metric == "accuracy" else None
    repeated, again = [], dict[Trial, list[AttackTrace]]()
    # another public model is not at the bench
    at_hand = {trial: runs for trial, runs in trials.items() if trial[0] != "alternative"}
    for drawn in draw_trials(at_hand, count, seed):
        stored = trials[drawn]
        again[drawn] = run_again(bench, stored, _company(trials, drawn))
        repeated.append(_told(drawn, stored, compare_trial(stored, again[drawn], scored)))
    verdicts = judged_with(certificate, trials, again)
    before = {cell.attack: cell.verdict for cell in certificate.cells}
    return RecheckRecord(
        certificate_sha256=sha256_file(folder / "certificate.json"), drawn_with=seed, drawn_from=len(at_hand),
        cells=len(certificate.cells), trials=repeated, verdicts=verdicts,
        overturned=[name for name, new in verdicts.items() if {before[name], new} == {"RESISTS", "FAILS"}],
        provenance=Provenance.here(bench.device),
    )


def judged_with(
    certificate: Certificate, trials: Mapping[Trial, Sequence[AttackTrace]],
    again: Mapping[Trial, Sequence[AttackTrace]],
) -> dict[str, str]:
    """Verdicts on the drawn attacks when the new curves take the place of the certified ones.

    Nothing where the certificate has no rule and plan in data, or where the new curves make another exam of it: other
    trials would have gone on to all seeds.
    """
    rule = find_rule(certificate)
    if rule is None or certificate.plan is None:
        return {}
    by_role: dict[str, list[AttackTrace]] = {}
    for key, runs in trials.items():
        new = {run.seed: run for run in again.get(key, ())}
        by_role.setdefault(key[0], []).extend(_in_place_of(run, new.get(run.seed)) for run in runs)
    try:
        judged = judge_traces(by_role, certificate.plan, rule, Evidence.of_certificate(certificate))
    except (ImmunizeError, ValueError):
        return {}
    drawn = {attack for _, attack, _ in again}
    return {cell.attack: cell.verdict for cell in judged.cells if cell.attack in drawn}


def _in_place_of(stored: AttackTrace, new: AttackTrace | None) -> AttackTrace:
    if new is None:
        return stored
    return stored.model_copy(update={"curve": new.curve, "outcome": new.outcome, "note": new.note})


def _told(drawn: Trial, stored: Sequence[AttackTrace], found: Comparison) -> RepeatedTrial:
    role, attack, trial = drawn
    return RepeatedTrial(
        role=role, attack=attack, trial=trial, seeds=sorted(run.seed for run in stored), agrees=found.agrees,
        evaluations=found.evaluations, distance=found.distance, bound=found.bound, told=found.told,
    )


def _company(trials: Mapping[Trial, Sequence[AttackTrace]], drawn: Trial) -> list[AttackTrace]:
    """All certified runs of the same attack on the same side that were made together: of one budget and range."""
    first = trials[drawn][0]
    return [trace for key, runs in trials.items() if key[:2] == drawn[:2] for trace in runs
            if (trace.budget, widened(trace)) == (first.budget, widened(first))]


def run_again(bench: Bench, stored: Sequence[AttackTrace], company: Sequence[AttackTrace]) -> list[AttackTrace]:
    """New runs of a trial with its seeds; where it has one seed, also with the next, to see what a seed changes.

    Attacks whose runs are columns of one program are made in the company that they were made in.
    """
    first = stored[0]
    attack, context = bench.attack(first.attack), bench.context(first)
    here = Provenance.here(bench.device)
    wanted = [_run_of(trace, attack.config) for trace in stored]
    together = [_run_of(trace, attack.config) for trace in company] if attack.batched else wanted
    made = [(run, result) for run, result in attack.run(context, together) if run in wanted]
    if len(stored) == 1:
        other = replace(wanted[0], seed=max(trace.seed for trace in company) + 1)
        made += list(attack.run(context, [other]))
    return [trace_of(context, first.attack, attack, run, result, here) for run, result in made]


def _run_of(trace: AttackTrace, config: type[Any]) -> Run:
    """The run that a trace tells of."""
    fields = {name: value for name, value in trace.config.items() if name in config.__dataclass_fields__}
    tuning = trace.config.get("tuning_seeds")
    seeds = tuple(int(str(seed)) for seed in tuning) if isinstance(tuning, list) else ()
    told: Any = trace.config.get("bars")
    bars = tuple((int(step), float(score)) for step, score in told) if isinstance(told, list) else ()
    return Run(config(**fields), trace.trial, trace.seed, seeds, widened(trace), proposed(trace), bars)
