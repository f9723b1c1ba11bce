"""Publishing: what a certificate says, written for the people who meet the model on the Hub."""

from hf_immunize.hub.card import CardOptions, render_card, write_card

__all__ = ["CardOptions", "render_card", "write_card"]
