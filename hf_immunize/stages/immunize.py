"""Immunize a model against a harmful task, and write down how.

The model is a classifier or a diffusion pipeline, as the task says: classes, concepts, or folders with prompts. With
from_scratch there is no theta_0: random weights learn the primary task under the regularizers from the first step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_immunize.records import begin_run, fingerprint_of
from hf_immunize.stages.base import ImmunizeOptions, fetch_base, leave_finished
from hf_immunize.stages.words import read_words, refuse_foreign
from hf_immunize.tasks import Family, family_of
from hf_immunize.training.core.launching import leave_processes
from hf_immunize.training.core.registry import plugin_sources
from hf_immunize.training.vision.checkpoints import last_complete_checkpoint


def config_of(family: Family) -> type:
    """The dataclass that says how a family's models are trained."""
    if family.kind == "classifier":
        from hf_immunize.training import ImmunizationConfig

        return ImmunizationConfig
    from hf_immunize.training.diffusion import DiffusionImmunizationConfig

    return DiffusionImmunizationConfig


def defence_of(family: Family) -> type:
    """What differs between the two kinds of model: how one is loaded, trained, saved and told about."""
    if family.kind == "classifier":
        from hf_immunize.stages.immunize_classifier import ClassifierDefence

        return ClassifierDefence
    from hf_immunize.stages.immunize_pipeline import PipelineDefence

    return PipelineDefence


def memory_of(family: Family, options: ImmunizeOptions, args: Any) -> str:
    """What the run would hold in memory."""
    from hf_immunize.stages.dry_run import classifier_memory, pipeline_memory

    folder, _ = fetch_base(options)
    if family.kind == "classifier":
        return classifier_memory(folder, options, args)
    return pipeline_memory(folder, options, args)


def immunize_model(arguments: Any, options: ImmunizeOptions, args: Any) -> Any:
    """Train, guard, save model and record to ``args.output_dir``; return the trainer, None for a run that is finished.

    Args:
        arguments: the task: TaskArguments, ConceptArguments or PromptArguments.
        args: ImmunizationConfig for a classifier, DiffusionImmunizationConfig for a pipeline.

    Raises:
        ConfigError: options that contradict each other.
        RunMismatchError: the output folder holds another run.
        NotImmunizedError: with ``require``, a model that its harmful probe learns from as before.
    """
    family = family_of(arguments)
    refuse_foreign(options, family)
    if options.dry_run:
        print(memory_of(family, options, args))
        return None
    defence = defence_of(family)(arguments, options, args)
    task, folder = defence.task, Path(args.output_dir)
    seen = ((task.sides[0], "train"), (task.sides[0], "validation"), ("harmful", "defense"))
    rows, data = [task.examples(*part) for part in seen], [task.fingerprint(*part) for part in seen]
    inputs = {
        "base": defence.base.weights or defence.start,
        "task": task.described(task.sides[0], "harmful"),
        "data": {found.role: found.sha256 for found in data},
        "options": defence.options_told,
    }
    if sources := plugin_sources(args.objective):
        inputs["objective_sources"] = sources
    if begin_run(folder, defence.stage, inputs, write=defence.is_main):
        print(f"{folder}: already immunized, nothing to do")
        return None
    trainer = defence.trainer(*rows)
    start = time.perf_counter()
    trainer.train(last_complete_checkpoint(folder))
    seconds = time.perf_counter() - start
    defence.save(trainer)
    if defence.is_main:
        record = defence.record(trainer, data=data, fingerprint=fingerprint_of(inputs), seconds=seconds)
        record.write(folder / "immunization.json")
        leave_finished(folder, defence.stage, inputs, [defence.index, "immunization.json"])
        verdict = "" if record.outcome is None else f"{record.outcome.told.partition(':')[0]}, "
        print(f"{folder}: {verdict}{defence.told(record.guard)}, {record.guard.told_step} of {record.steps}, "
              f"{seconds:.0f} s")  # fmt: skip
    defence.leave(trainer)
    return trainer


def main(argv: Sequence[str] | None = None, family: str | None = None, prog: str | None = None) -> None:
    """The stage on words of a command line."""
    immunize_model(*read_words(lambda found: (ImmunizeOptions, config_of(found)), argv, __doc__, family, prog))
    leave_processes()
