"""What a model keeps and what it shall not learn, asked for in one way whether it is named by classes or by prompts."""

from hf_immunize.tasks.classes import ClassesTask
from hf_immunize.tasks.families import FAMILIES, Family, family_of, find_family
from hf_immunize.tasks.protocol import ATTACKER_SPLITS, ExamTask, attacker_fingerprints, attacker_holds

__all__ = [
    "ATTACKER_SPLITS",
    "FAMILIES",
    "ClassesTask",
    "ExamTask",
    "Family",
    "attacker_fingerprints",
    "attacker_holds",
    "family_of",
    "find_family",
]
