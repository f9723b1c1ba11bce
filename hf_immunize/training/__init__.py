"""Immunization: what to optimise, with which weights, and the Trainer that does it."""

from hf_immunize.training.config import ImmunizationConfig
from hf_immunize.training.objective import OBJECTIVES, Rows, Term, TermSettings, register_objective
from hf_immunize.training.trainer import ImmunizationTrainer

__all__ = [
    "OBJECTIVES",
    "ImmunizationConfig",
    "ImmunizationTrainer",
    "Rows",
    "Term",
    "TermSettings",
    "register_objective",
]
