"""Immunize vision and diffusion models against harmful fine-tuning, attack them, and certify what held."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_immunize.version import __version__

if TYPE_CHECKING:
    from hf_immunize.attacks import register_attack
    from hf_immunize.diffusion import register_family
    from hf_immunize.features import add_head
    from hf_immunize.hub import load_verified, publish, verify_folder
    from hf_immunize.linear import LinearImmunizer
    from hf_immunize.report import render_report
    from hf_immunize.stages.api.exam import Exam
    from hf_immunize.stages.api.immunizing import immunize
    from hf_immunize.stages.api.profiling import profile
    from hf_immunize.stages.api.result import ExamResult
    from hf_immunize.stages.api.trainer import ImmunizationTrainer
    from hf_immunize.training import ImmunizationConfig, Term, register_objective, weight_term
    from hf_immunize.training.diffusion import DiffusionImmunizationConfig, DiffusionImmunizationTrainer

_HOMES = {
    # training
    "DiffusionImmunizationConfig": "training.diffusion",
    "DiffusionImmunizationTrainer": "training.diffusion",
    "ImmunizationConfig": "training",
    "ImmunizationTrainer": "stages.api.trainer",
    "Term": "training",
    "add_head": "features",
    # extensions
    "register_attack": "attacks",
    "register_family": "diffusion",
    "register_objective": "training",
    "weight_term": "training",
    # the main job
    "Exam": "stages.api.exam",
    "ExamResult": "stages.api.result",
    "immunize": "stages.api.immunizing",
    "profile": "stages.api.profiling",
    # linear models
    "LinearImmunizer": "linear",
    # evidence and publishing
    "load_verified": "hub",
    "publish": "hub",
    "render_report": "report",
    "verify_folder": "hub",
}

__all__ = [
    "DiffusionImmunizationConfig",
    "DiffusionImmunizationTrainer",
    "Exam",
    "ExamResult",
    "ImmunizationConfig",
    "ImmunizationTrainer",
    "LinearImmunizer",
    "Term",
    "__version__",
    "add_head",
    "immunize",
    "load_verified",
    "profile",
    "publish",
    "register_attack",
    "register_family",
    "register_objective",
    "render_report",
    "verify_folder",
    "weight_term",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: reading a certificate must not need torch."""
    if name in _HOMES:
        return getattr(import_module(f"hf_immunize.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hf_immunize' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
