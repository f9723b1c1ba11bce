"""Whether both sides of a cell sat the same exam: trials, seeds, settings, data, and the trials that went on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_immunize.certification.adapting import widened
from hf_immunize.certification.curtailing import is_curtailed, majority
from hf_immunize.certification.proposing import proposed
from hf_immunize.errors import IncompleteExamError
from hf_immunize.exam.keeps import finalists
from hf_immunize.records import AttackTrace

_OF_SEARCH = ("proposed", "bars")


def check_same_exam(name: str, subject: Sequence[AttackTrace], other: Sequence[AttackTrace], role: str) -> None:
    """Raise IncompleteExamError unless both sides were given the same trials, seeds, settings and data.

    Where trials were compared on some seeds first, each side may have another one run on the rest. Where ranges follow
    the runs, the subject has all trials of the base, and may have more beyond its own range; each side's
    search proposes trials of its own, as many on each.
    """
    mine = {(trace.trial, trace.seed): trace for trace in subject}
    theirs = {(trace.trial, trace.seed): trace for trace in other}
    tuning = _tuning_seeds(subject)
    given = max(map(widened, other), default=0)
    first, second = (
        {key for key, run in found.items()
         if (tuning is None or key[1] in tuning) and widened(run) <= given and not proposed(run)}
        for found in (mine, theirs)
    )
    searched = {side: len({run.trial for run in found.values() if proposed(run)})
                for side, found in (("subject", mine), (role, theirs))}
    if searched["subject"] != searched[role] and any(run.curve for run in subject) and any(run.curve for run in other):
        raise IncompleteExamError(
            f"expected as many proposed trials of {name} on subject and {role}, got {searched['subject']} and "
            f"{searched[role]}: run hf-immunize attack again with the same options; it makes only what is missing."
        )
    for side, runs in (("subject", sorted(second - first)), (role, sorted(first - second))):
        if runs:
            raise IncompleteExamError(
                f"expected the same runs of {name} on subject and {role}, got {len(runs)} missing on the {side}, first "
                f"{runs[0][0]} with seed {runs[0][1]}: run recipes/attack.py again (hf-immunize attack) with the same "
                "options; it makes only what is missing."
            )
    whole = {seed for found in (mine, theirs) for _, seed in found}
    for side, found in (("subject", mine), (role, theirs)):
        due = set(majority(whole)) if side == "subject" and is_curtailed(subject, other) else whole
        _check_seeds(name, side, set(found), due, tuning)
        if tuning is not None and tuning != whole:
            _check_finalists(name, side, found, due, tuning)
    for key in sorted(set(mine) & set(theirs)):
        for what in ("config", "data", "budget", "unit", "family"):
            here, there = getattr(mine[key], what), getattr(theirs[key], what)
            if what == "config":  # each side's search is its own, and may propose the same
                here, there = ({name: value for name, value in held.items() if name not in _OF_SEARCH}
                               for held in (here, there))
            if what == "data":
                here, there = ([split.sha256 for split in splits] for splits in (here, there))
            if here != there:
                raise IncompleteExamError(
                    f"expected {name} {key[0]} with seed {key[1]} to be the same exam on subject and {role}, got "
                    f"another {what}: run hf-immunize attack --overwrite on the {role} with the subject's options."
                )


def _tuning_seeds(traces: Sequence[AttackTrace]) -> set[int] | None:
    """The seeds on which this exam compared its trials; None: on all of them."""
    found = traces[0].config.get("tuning_seeds") if traces else None
    return {int(str(seed)) for seed in found} if isinstance(found, list) else None


def _check_seeds(name: str, side: str, runs: set[tuple[str, int]], whole: set[int], tuning: set[int] | None) -> None:
    """Every trial with every seed; or with the tuning seeds, and at least one of them with all."""
    complete = 0
    for trial in sorted({trial for trial, _ in runs}):
        seeds = {seed for found, seed in runs if found == trial}
        complete += seeds == whole
        if seeds != whole and seeds != tuning:
            raise IncompleteExamError(
                f"expected every seed in every trial of {name}, got {trial} without seeds {sorted(whole - seeds)} on "
                f"the {side}: run hf-immunize attack again with the same options."
            )
    if complete == 0:
        raise IncompleteExamError(
            f"expected a trial of {name} with all of the seeds {sorted(whole)} on the {side}, got none: run "
            "hf-immunize attack again with the same options."
        )


def _check_finalists(
    name: str, side: str, runs: Mapping[tuple[str, int], AttackTrace], whole: set[int], tuning: set[int]
) -> None:
    """The trials that had to go on after the comparison, and no others, are those with all seeds."""
    due = set(finalists([trace for (_, seed), trace in runs.items() if seed in tuning]))
    complete = {trial for trial, _ in runs if {seed for found, seed in runs if found == trial} == whole}
    if complete != due:
        raise IncompleteExamError(
            f"expected {name} on the {side} with all of the seeds {sorted(whole)} in the trials that did best on "
            f"{sorted(tuning)}, {sorted(due)}, got {sorted(complete)}: run hf-immunize attack again with the same "
            "options."
        )
