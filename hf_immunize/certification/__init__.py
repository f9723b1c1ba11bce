"""The judge: which exam, what came of it, and the certificate over exactly these weights.

Verdicts from traces (``judge_traces``) need no torch; what loads models is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hf_immunize.certification.judge import Evidence, find_rule, judge_traces
from hf_immunize.certification.trainability import measure_trainability
from hf_immunize.certification.verdict import family_verdicts, judge_solve, judge_steps, overall_verdict, strongest
from hf_immunize.exam import PROTOCOLS, Protocol, Rule, find_protocol

if TYPE_CHECKING:
    from hf_immunize.certification.certificate import ExamData, build_certificate
    from hf_immunize.certification.repeating import Recheck, recheck
    from hf_immunize.certification.sit_again import exam_contexts, read_task, sit_again
    from hf_immunize.certification.utility import correct_rows, measure_utility

_HOMES = {
    "ExamData": "certificate",
    "build_certificate": "certificate",
    "Recheck": "repeating",
    "recheck": "repeating",
    "exam_contexts": "sit_again",
    "read_task": "sit_again",
    "sit_again": "sit_again",
    "correct_rows": "utility",
    "measure_utility": "utility",
}

__all__ = [
    "PROTOCOLS",
    "Evidence",
    "ExamData",
    "Protocol",
    "Recheck",
    "Rule",
    "build_certificate",
    "correct_rows",
    "exam_contexts",
    "family_verdicts",
    "find_protocol",
    "find_rule",
    "judge_solve",
    "judge_steps",
    "judge_traces",
    "measure_trainability",
    "measure_utility",
    "overall_verdict",
    "read_task",
    "recheck",
    "sit_again",
    "strongest",
]


def __getattr__(name: str) -> Any:
    """Import a name that needs models when it is first used."""
    if name in _HOMES:
        return getattr(import_module(f"hf_immunize.certification.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hf_immunize.certification' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
