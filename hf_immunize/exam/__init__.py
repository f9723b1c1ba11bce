"""The plan of an exam: which attacks, how often, judged by which rule, and what they leave out.

Names and numbers alone: it can be read without an attack, a judge or torch.
"""

from hf_immunize.exam.checklist import diffusion_lines_not_run, lines_not_run
from hf_immunize.exam.protocol import (
    BENIGN,
    BENIGN_DIFFUSION,
    DIFFUSION_PROTOCOLS,
    DIFFUSION_RULE,
    PROTOCOLS,
    Protocol,
    find_protocol,
)
from hf_immunize.exam.rule import Rule

__all__ = [
    "BENIGN",
    "BENIGN_DIFFUSION",
    "DIFFUSION_PROTOCOLS",
    "DIFFUSION_RULE",
    "PROTOCOLS",
    "Protocol",
    "Rule",
    "diffusion_lines_not_run",
    "find_protocol",
    "lines_not_run",
]
