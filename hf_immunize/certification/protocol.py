"""The plan of an exam has moved to ``hf_immunize.exam``; its names can still be imported from here."""

from hf_immunize.exam import DIFFUSION_PROTOCOLS, DIFFUSION_RULE, PROTOCOLS, Protocol, Rule, find_protocol

__all__ = ["DIFFUSION_PROTOCOLS", "DIFFUSION_RULE", "PROTOCOLS", "Protocol", "Rule", "find_protocol"]
