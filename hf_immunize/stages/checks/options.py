"""Every option of every stage, read into the dataclasses that the stage itself reads it into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_immunize.errors import ConfigError, ImmunizeError
from hf_immunize.options import make_options
from hf_immunize.stages.checks.findings import Finding
from hf_immunize.stages.workflow.run_file import RunFile
from hf_immunize.stages.workflow.stages import Stage
from hf_immunize.tasks import Family, find_family

Parsed = dict[str, tuple[Any, ...]]
"""Instances of the dataclasses of each stage, by its name; for a stage with a task the task's options come first."""


def kinds_of(stage: Stage, family: Family) -> tuple[type, ...]:
    """The dataclasses that a stage reads its options into."""
    if stage.verb == "fetch":
        from hf_immunize.stages.fetch import FetchOptions

        return (FetchOptions,)
    if stage.verb == "report":
        from hf_immunize.stages.report import ReportOptions

        return (ReportOptions,)
    task = family.arguments()
    if stage.verb == "pretrain":
        from hf_immunize.stages.pretrain import options_of

        return (task, *options_of(family))
    if stage.verb == "immunize":
        from hf_immunize.stages.base import ImmunizeOptions
        from hf_immunize.stages.immunize import config_of

        return (task, ImmunizeOptions, config_of(family))
    if stage.verb == "attack":
        from hf_immunize.stages.attack import AttackOptions

        return (task, AttackOptions)
    from hf_immunize.stages.certify import CertifyOptions

    return (task, CertifyOptions)


def check_options(run: RunFile, stages: Mapping[str, Stage]) -> tuple[Parsed, list[Finding]]:
    """The options of every stage, and one finding for each stage whose options are refused."""
    from hf_immunize.stages.words import refuse_foreign

    parsed: Parsed = {}
    found: list[Finding] = []
    for stage in stages.values():
        where = f"section {stage.kind}{f'.{stage.name}' if stage.kind == 'immunize' else ''} of {run.path}"
        try:
            family = find_family(stage.options)
            held = make_options(kinds_of(stage, family), stage.options, where)
            if stage.verb in ("immunize", "attack", "certify"):
                refuse_foreign(held[1], family)
            _check_names(stage, family, held)
            parsed[stage.name] = held
        except ImmunizeError as error:
            found.append(Finding(f"options of {stage.name}", "fails", _located(str(error), where)))
        except (ValueError, TypeError, ImportError) as error:  # what transformers' own options refuse
            found.append(Finding(f"options of {stage.name}", "fails", _located(f"{type(error).__name__}: "
                                                                               f"{error}", where)))
    return parsed, _unique(found) or [Finding("options", "ok", f"{len(stages)} stages, all of their options known")]


def _check_names(stage: Stage, family: Family, held: tuple[Any, ...]) -> None:
    """Raise ConfigError for an objective, an attack, one of its settings, or a protocol that nobody knows."""
    if stage.verb == "immunize":
        from hf_immunize.training.core.registry import terms_of

        terms_of(held[2].objective)
    elif stage.verb == "attack":
        from hf_immunize.stages.attack import AttackPlan

        AttackPlan.of(held[1], family).count()
    elif stage.verb == "certify" and held[1].protocol is not None:
        from hf_immunize.exam import DIFFUSION_PROTOCOLS, PROTOCOLS, find_protocol

        find_protocol(held[1].protocol, PROTOCOLS if family.kind == "classifier" else DIFFUSION_PROTOCOLS)


def _located(told: str, where: str) -> str:
    return told if where in told else f"{told} ({where})"


def _unique(found: list[Finding]) -> list[Finding]:
    """One finding for the same sentence about several stages: the base's attacks and the model's share a section."""
    first: dict[str, Finding] = {}
    for finding in found:
        first.setdefault(finding.told, finding)
    return list(first.values())


def refuse_bad_options(run: RunFile, stages: Mapping[str, Stage]) -> Parsed:
    """The options of every stage. Raises ConfigError with all that is wrong with them."""
    parsed, found = check_options(run, stages)
    if bad := [finding.told for finding in found if finding.level == "fails"]:
        raise ConfigError("\n".join(bad))
    return parsed
