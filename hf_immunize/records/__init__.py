"""Everything that is written to disk, and how it is written: atomically, strictly, with provenance."""

from hf_immunize.records.base import SCHEMA_VERSION, Interval, Part, Record
from hf_immunize.records.certificate import (
    AtBudget,
    AtThreshold,
    Cell,
    Certificate,
    FamilyVerdict,
    Side,
    Trainability,
    Utility,
    VerdictName,
)
from hf_immunize.records.depth import (
    PROFILE_FILE,
    DepthPoint,
    DepthProfile,
    DepthProposal,
    DepthRule,
    ResetPoint,
)
from hf_immunize.records.files import atomic_write, loading_files, sha256_file, weight_files
from hf_immunize.records.generation import FrechetGap, SimilarityGap
from hf_immunize.records.immunization import ImmunizationRecord, OutcomeRecord, UtilityGuardRecord
from hf_immunize.records.plan import Plan, PlannedAttack, Plugin
from hf_immunize.records.provenance import HUB_SOURCE, DatasetFingerprint, HubSource, ModelFingerprint, Provenance
from hf_immunize.records.recheck import RecheckRecord, RepeatedTrial, SignedRecheck
from hf_immunize.records.rule import RULE_VERSION, Rule
from hf_immunize.records.run import RUN_FILE, RunRecord, begin_run, fingerprint_of, finish_run
from hf_immunize.records.spectrum import SpectrumRecord, half_sample_interval
from hf_immunize.records.trace import AttackTrace, Evaluation
from hf_immunize.records.utility import Answers, Losses, UtilityRows

__all__ = [
    "HUB_SOURCE",
    "PROFILE_FILE",
    "RULE_VERSION",
    "RUN_FILE",
    "SCHEMA_VERSION",
    "Answers",
    "AtBudget",
    "AtThreshold",
    "AttackTrace",
    "Cell",
    "Certificate",
    "DatasetFingerprint",
    "DepthPoint",
    "DepthProfile",
    "DepthProposal",
    "DepthRule",
    "Evaluation",
    "FamilyVerdict",
    "FrechetGap",
    "HubSource",
    "ImmunizationRecord",
    "OutcomeRecord",
    "Interval",
    "Losses",
    "ModelFingerprint",
    "Part",
    "Plan",
    "PlannedAttack",
    "Plugin",
    "Provenance",
    "RecheckRecord",
    "Record",
    "RepeatedTrial",
    "ResetPoint",
    "Rule",
    "RunRecord",
    "Side",
    "SignedRecheck",
    "SimilarityGap",
    "SpectrumRecord",
    "Trainability",
    "Utility",
    "UtilityGuardRecord",
    "UtilityRows",
    "VerdictName",
    "atomic_write",
    "begin_run",
    "fingerprint_of",
    "finish_run",
    "half_sample_interval",
    "loading_files",
    "sha256_file",
    "weight_files",
]
