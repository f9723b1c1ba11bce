"""The objectives by name: terms on features or on weights, built in or a user's own."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable, Mapping

from hf_immunize.errors import ConfigError, DataError
from hf_immunize.plugins import load_plugins, origin
from hf_immunize.training.core.attack_terms import SIMULATED_TERM
from hf_immunize.training.core.erasure import ESD, META_UNLEARNING
from hf_immunize.training.core.field_terms import REP_NOISE, TRAP
from hf_immunize.training.core.headed import SOPHON_ICE, SOPHON_KLU, TAR_ENTROPY
from hf_immunize.training.core.moreau import RESALIGN_MOREAU
from hf_immunize.training.core.terms import (
    ADVERSARY,
    GROUP_KAPPA,
    IMMA,
    LOG_KAPPA_H,
    LOG_KAPPA_P,
    R_ILL,
    R_WELL,
    Term,
)
from hf_immunize.training.core.weight_terms import WeightTerm

AnyTerm = Term | WeightTerm

OBJECTIVES: dict[str, tuple[AnyTerm, ...]] = {
    "condition_number": (R_ILL, R_WELL),
    "ill_only": (R_ILL,),
    "opt_kappa": (LOG_KAPPA_H, LOG_KAPPA_P),
    "group_kappa": (GROUP_KAPPA,),
    "closed_form_adversary": (ADVERSARY,),
    "imma": (IMMA,),
    "simulated_attack": (SIMULATED_TERM,),
    "sophon_ice": (SOPHON_ICE,),
    "sophon_klu": (SOPHON_KLU,),
    "tar_entropy": (TAR_ENTROPY,),
    "rep_noise": (REP_NOISE,),
    "trap": (TRAP,),
    "resalign_moreau": (RESALIGN_MOREAU,),
}

OF_DENOISERS: dict[str, tuple[AnyTerm, ...]] = {"esd": (ESD,), "meta_unlearning": (META_UNLEARNING,)}
"""Objectives that ask for what a denoiser answers: for pipelines, beside ``OBJECTIVES``."""

COPYING = frozenset(
    name for name, terms in OBJECTIVES.items() if any(isinstance(term, WeightTerm) for term in terms)
)
"""Built-in objectives whose attackers train a copy of the model."""


_SOURCES: dict[str, str] = {}
"""SHA-256 of the code that registered an objective which is not one of this package."""


def register_objective(name: str, *terms: AnyTerm) -> None:
    """Make a new objective available to ``ImmunizationConfig(objective=name)``, and to pipelines where it can be.

    Args:
        name: what ``objective`` calls it; it may be joined with others by '+'.
        terms: on features at the sites (``Term``) or on the weights (``weight_term``, ``WeightTerm``).

    Raises:
        ConfigError: a name that is taken or holds a '+', or no term.
    """
    if name in OBJECTIVES or name in OF_DENOISERS or not terms or "+" in name or not name.strip():
        raise ConfigError(f"expected a new objective name with one term or more, got {name!r} with {len(terms)} terms.")
    OBJECTIVES[name] = terms
    try:
        _SOURCES[name] = origin(sys._getframe(1)).sha256
    except ConfigError:  # typed into an interpreter: it has no source, and no run file can name it
        pass


def plugin_sources(objective: str) -> dict[str, str]:
    """SHA-256 of the source of each of the objectives joined with '+' that is a user's own: a run is another with it.

    Raises:
        ConfigError: a plug-in that cannot be imported.
    """
    names = [name.strip() for name in objective.split("+")]
    if any(name not in OBJECTIVES and name not in OF_DENOISERS for name in names):
        load_plugins()
    return {name: _SOURCES[name] for name in names if name in _SOURCES}


def terms_of(objective: str, known: Mapping[str, tuple[AnyTerm, ...]] = OBJECTIVES) -> tuple[AnyTerm, ...]:
    """Terms of one objective, or of several joined with '+'; a term named twice counts once.

    Raises:
        ConfigError: an objective that neither this package nor a plug-in has.
    """
    terms: dict[str, AnyTerm] = {}
    if any(name.strip() not in known for name in objective.split("+")):
        load_plugins()
        known = {**OBJECTIVES, **known}
    for name in objective.split("+"):
        if name.strip() not in known:
            close = difflib.get_close_matches(name.strip(), list(known), 1)
            raise ConfigError(
                f"expected objectives among {sorted(known)} joined with '+', got {name.strip()!r}."
                + (f" Did you mean {close[0]}?" if close else "")
            )
        terms.update({term.name: term for term in known[name.strip()]})
    return tuple(terms.values())


def refuse_one_class(terms: Iterable[AnyTerm], harmful_labels: Iterable[int]) -> None:
    """Raise DataError where a term tells harmful classes apart and there is one class only."""
    telling = [term.name for term in terms if term.tells_classes_apart]
    found = set(harmful_labels)
    if telling and len(found) < 2:
        raise DataError(
            f"expected at least two classes in harmful_dataset for {', '.join(telling)}, which tells them apart, got "
            f"{len(found)}: choose an objective that does not, such as condition_number, or give the task its classes."
        )


def on_features(terms: Iterable[AnyTerm]) -> tuple[Term, ...]:
    """Those that are measured at the sites."""
    return tuple(term for term in terms if isinstance(term, Term))


def on_weights(terms: Iterable[AnyTerm]) -> tuple[WeightTerm, ...]:
    """Those that are measured on the weights."""
    return tuple(term for term in terms if isinstance(term, WeightTerm))
