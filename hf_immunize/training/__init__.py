"""Immunization: what to optimise, with which weights, and the Trainer that does it."""

from hf_immunize.training.core.registry import OBJECTIVES, register_objective
from hf_immunize.training.core.terms import Rows, Term, TermSettings
from hf_immunize.training.core.weight_measure import weight_term
from hf_immunize.training.core.weight_terms import AttackedTask, WeightObjective, WeightTerm
from hf_immunize.training.vision.config import ImmunizationConfig
from hf_immunize.training.vision.trainer import ImmunizationTrainer

__all__ = [
    "OBJECTIVES",
    "AttackedTask",
    "ImmunizationConfig",
    "ImmunizationTrainer",
    "Rows",
    "Term",
    "TermSettings",
    "WeightObjective",
    "WeightTerm",
    "register_objective",
    "weight_term",
]
