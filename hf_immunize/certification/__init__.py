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
    from hf_immunize.certification.bench import Bench, open_bench
    from hf_immunize.certification.certificate import ExamData, build_certificate
    from hf_immunize.certification.trials import repeat_trials
    from hf_immunize.certification.utility import correct_rows, measure_utility

_HOMES = {
    "Bench": "bench",
    "open_bench": "bench",
    "repeat_trials": "trials",
    "ExamData": "certificate",
    "build_certificate": "certificate",
    "correct_rows": "utility",
    "measure_utility": "utility",
}

__all__ = [
    "PROTOCOLS",
    "Bench",
    "Evidence",
    "ExamData",
    "Protocol",
    "Rule",
    "build_certificate",
    "correct_rows",
    "family_verdicts",
    "find_protocol",
    "find_rule",
    "judge_solve",
    "judge_steps",
    "judge_traces",
    "measure_trainability",
    "measure_utility",
    "open_bench",
    "overall_verdict",
    "repeat_trials",
    "strongest",
]


def __getattr__(name: str) -> Any:
    """Import a name that needs models when it is first used."""
    if name in _HOMES:
        return getattr(import_module(f"hf_immunize.certification.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hf_immunize.certification' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
