"""Immunization: what to optimise, with which weights, and the Trainer that does it."""

from hf_immunize.training.core.terms import OBJECTIVES, Rows, Term, TermSettings, register_objective
from hf_immunize.training.vision.config import ImmunizationConfig
from hf_immunize.training.vision.trainer import ImmunizationTrainer

__all__ = [
    "OBJECTIVES",
    "ImmunizationConfig",
    "ImmunizationTrainer",
    "Rows",
    "Term",
    "TermSettings",
    "register_objective",
]
