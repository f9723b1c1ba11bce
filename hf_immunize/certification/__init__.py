"""The judge: which exam, what came of it, and the certificate over exactly these weights."""

from hf_immunize.certification.certificate import ExamData, build_certificate
from hf_immunize.certification.recheck import Recheck, recheck
from hf_immunize.certification.sit_again import exam_contexts, find_rule, read_task, sit_again
from hf_immunize.certification.trainability import measure_trainability
from hf_immunize.certification.utility import correct_rows, measure_utility
from hf_immunize.certification.verdict import family_verdicts, judge_solve, judge_steps, overall_verdict, strongest
from hf_immunize.exam import PROTOCOLS, Protocol, Rule, find_protocol

__all__ = [
    "PROTOCOLS",
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
    "measure_trainability",
    "measure_utility",
    "overall_verdict",
    "read_task",
    "recheck",
    "sit_again",
    "strongest",
]
