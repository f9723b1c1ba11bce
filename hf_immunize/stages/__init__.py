"""The main job, stage by stage: each reads options, models and records from disk and leaves records on disk."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_immunize.stages.attack import AttackOptions, attack_model
    from hf_immunize.stages.cards import CardsOptions, write_cards
    from hf_immunize.stages.certify import CertifyOptions, certify_model
    from hf_immunize.stages.immunize import ImmunizeOptions, immunize_model
    from hf_immunize.stages.pretrain import pretrain_model
    from hf_immunize.stages.report import ReportOptions, write_report

_HOMES = {
    "AttackOptions": "attack",
    "CardsOptions": "cards",
    "CertifyOptions": "certify",
    "ImmunizeOptions": "immunize",
    "ReportOptions": "report",
    "attack_model": "attack",
    "certify_model": "certify",
    "immunize_model": "immunize",
    "pretrain_model": "pretrain",
    "write_cards": "cards",
    "write_report": "report",
}

__all__ = [
    "AttackOptions",
    "CardsOptions",
    "CertifyOptions",
    "ImmunizeOptions",
    "ReportOptions",
    "attack_model",
    "certify_model",
    "immunize_model",
    "pretrain_model",
    "write_cards",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a stage when it is first used: a report must not need torch."""
    if name in _HOMES:
        return getattr(import_module(f"hf_immunize.stages.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hf_immunize.stages' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
