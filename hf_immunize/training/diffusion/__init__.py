"""Immunization of diffusion models: an Accelerate loop on the same terms, balance and guard as for classifiers."""

from hf_immunize.training.diffusion.config import DiffusionImmunizationConfig
from hf_immunize.training.diffusion.trainer import DiffusionImmunizationTrainer

__all__ = ["DiffusionImmunizationConfig", "DiffusionImmunizationTrainer"]
