"""Immunization: what to optimise, with which weights, and the Trainer that does it."""

from hf_immunize.training.core.registry import OBJECTIVES, register_objective
from hf_immunize.training.core.terms import Rows, Term, TermSettings
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
