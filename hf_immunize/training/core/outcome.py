"""What an objective's terms on the harmful side say of a run: the same words for classifiers and pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_immunize.training.core.registry import AnyTerm
from hf_immunize.training.core.terms import LOG_KAPPA_H
from hf_immunize.training.core.weight_terms import WeightTerm

_NOTICED, _NOTICED_ATTACK = 0.05, 0.25
"""Share of a term that has to be gone, and of one that a simulated attacker's loss makes: of six such objectives that
took less in 40 steps none held up fine-tuning."""
_OWN = "Whom a term of your own holds up is for the exam to say."
REMEDY = "Train longer (max_steps), raise strength or max_primary_drop, or train more {parts}."


@dataclass(frozen=True)
class Kept:
    """What is left of the primary metric, where it was measured.

    Args:
        told: before and after, in words.
        gone: whether more was lost than anybody would take who named no allowance.
    """

    told: str = ""
    gone: bool = False


def in_scale_free_terms(terms: Sequence[AnyTerm]) -> list[AnyTerm]:
    """The harmful terms, with log κ beside those whose value changes when features are multiplied by a number."""
    judged = [term for term in terms if term.side == "harmful"]
    scaled = any(_of_scale(term) for term in judged)
    return [*judged, LOG_KAPPA_H] if scaled and LOG_KAPPA_H not in judged else judged


def lowered(terms: Sequence[AnyTerm], before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether the terms, taken together, have fallen by more than a run that did nothing shows.

    A term that falls when features are only multiplied by a number does not count where another is there.
    """
    counted = [term for term in terms if not _of_scale(term)] or list(terms)
    return sum(_gained(term, before[term.name], after[term.name]) for term in counted) > 0


def verdict(works: bool, kept: Kept, found: Sequence[str], told: str, parts: str) -> tuple[bool, str]:
    """Whether a run did what it was for, and that in one line.

    Args:
        works: whether it did on the harmful side.
        found: what was measured there, in words.
        told: what success means.
        parts: what more of may be trained.
    """
    immunized = works and not kept.gone
    line = f"{'IMMUNIZED' if immunized else 'NOT IMMUNIZED'}: {'; '.join(filter(None, (*found, kept.told)))}."
    if works and kept.gone:
        return False, f"{line} The primary task was lost with it: set max_primary_drop, or lower strength."
    return immunized, f"{line} {told if immunized else REMEDY.format(parts=parts)}".strip()


def shown(terms: Sequence[AnyTerm], before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Each term before and after."""
    return ", ".join(f"{term.name} {before[term.name]:.3g} -> {after[term.name]:.3g}" for term in terms)


def achieved(terms: Sequence[AnyTerm], other: str = "a probe in closed form") -> str:
    """What lower values of the terms mean, and whom they do not stop; each sentence once.

    Args:
        other: an attacker that no simulated one stands for.
    """
    return " ".join(dict.fromkeys(told for term in terms if (told := _achieved(term)))).format(other=other)


def _achieved(term: AnyTerm) -> str:
    return term.achieves or _OWN


def _of_scale(term: AnyTerm) -> bool:
    return not isinstance(term, WeightTerm) and term.of_scale


def _gained(term: AnyTerm, before: float, after: float) -> float:
    """How far a term has fallen beyond a twentieth of what it was, which is as much as a run that did nothing shows.

    A twentieth of what a logarithm speaks of is 0.05 of the logarithm, however large that is. A simulated attacker has
    to be held up by a quarter.
    """
    share = _NOTICED_ATTACK if isinstance(term, WeightTerm) else _NOTICED
    on_log_scale = not isinstance(term, WeightTerm) and (term.logarithmic or term.is_log)
    least = share if on_log_scale else share * abs(before)
    return term.progress(before) - term.progress(after) - least
