"""What an objective's terms on the harmful side say of a run: the same words for classifiers and pipelines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_immunize.training.core.registry import AnyTerm
from hf_immunize.training.core.weight_terms import WeightTerm

_NOTICED = 0.05
_ON_WEIGHTS = "Whom a term on weights alone holds up is for the exam to say."
_OWN = "Whom a term of your own holds up is for the exam to say."
_SIMULATED = "It holds up the attacker that was simulated; {other} is another one."


def lowered(terms: Sequence[AnyTerm], before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether the terms, taken together, have fallen by more than a run that did nothing shows."""
    return sum(_gained(term, before[term.name], after[term.name]) for term in terms) > 0


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
    if isinstance(term, WeightTerm):
        return _SIMULATED if term.sees_rows else _ON_WEIGHTS
    return term.achieves or _OWN


def _gained(term: AnyTerm, before: float, after: float) -> float:
    """How far a term has fallen beyond a twentieth of what it was, which is as much as a run that did nothing shows.

    A twentieth of what a logarithm speaks of is 0.05 of the logarithm, however large that is.
    """
    on_log_scale = not isinstance(term, WeightTerm) and (term.logarithmic or term.is_log)
    least = _NOTICED if on_log_scale else _NOTICED * abs(before)
    return term.progress(before) - term.progress(after) - least
