"""Publishing: what a certificate says, written for the people who meet the model on the Hub, and checked by them."""

from hf_immunize.hub.card import CardOptions, render_card, write_card
from hf_immunize.hub.findings import Finding, Verification
from hf_immunize.hub.load import load_verified, verify_model
from hf_immunize.hub.local import is_hub_id, local_folder, working_folder
from hf_immunize.hub.policy import Policy
from hf_immunize.hub.publish import Publication, publish
from hf_immunize.hub.recheck import repeat_attacks, search_attacks
from hf_immunize.hub.verify import verify_folder

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
