"""Publishing: what a certificate says, written for the people who meet the model on the Hub, and checked by them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_immunize.hub.card import CardOptions, render_card, write_card
    from hf_immunize.hub.findings import Finding, Verification
    from hf_immunize.hub.load import load_verified, verify_model
    from hf_immunize.hub.local import is_hub_id, local_folder, working_folder
    from hf_immunize.hub.policy import Policy
    from hf_immunize.hub.publishing import Publication, publish
    from hf_immunize.hub.recheck import repeat_attacks, search_attacks
    from hf_immunize.hub.verify import verify_folder

_HOMES = {
    "CardOptions": "card",
    "Finding": "findings",
    "Policy": "policy",
    "Publication": "publishing",
    "Verification": "findings",
    "is_hub_id": "local",
    "load_verified": "load",
    "local_folder": "local",
    "publish": "publishing",
    "render_card": "card",
    "repeat_attacks": "recheck",
    "search_attacks": "recheck",
    "verify_folder": "verify",
    "verify_model": "load",
    "working_folder": "local",
    "write_card": "card",
}

__all__ = [
    "CardOptions",
    "Finding",
    "Policy",
    "Publication",
    "Verification",
    "is_hub_id",
    "load_verified",
    "local_folder",
    "publish",
    "render_card",
    "repeat_attacks",
    "search_attacks",
    "verify_folder",
    "verify_model",
    "working_folder",
    "write_card",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: checking files must not load what talks to the Hub."""
    if name in _HOMES:
        return getattr(import_module(f"hf_immunize.hub.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hf_immunize.hub' has no attribute {name!r}")
