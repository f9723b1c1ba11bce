"""The main job, stage by stage: each reads options, models and records from disk and leaves records on disk."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "AttackOptions": "attack",
    "CardsOptions": "cards",
    "CertifyOptions": "certify",
    "ImmunizeOptions": "immunize",
    "ProfileOptions": "profile",
    "ReportOptions": "report",
    "attack_model": "attack",
    "certify_model": "certify",
    "immunize_model": "immunize",
    "pretrain_model": "pretrain",
    "profile_model": "profile",
    "write_cards": "cards",
    "write_report": "report",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a stage when it is first used: a report must not need torch."""
    if name in _HOMES:
        return getattr(import_module(f"hf_immunize.stages.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hf_immunize.stages' has no attribute {name!r}")
