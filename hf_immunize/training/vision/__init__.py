"""Immunization of image models: a subclass of ``transformers.Trainer``."""

from hf_immunize.training.vision.config import ImmunizationConfig
from hf_immunize.training.vision.trainer import ImmunizationTrainer

__all__ = ["ImmunizationConfig", "ImmunizationTrainer"]
