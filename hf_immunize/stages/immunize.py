"""Immunize a model against a harmful task, and write down how.

The model is a classifier or a diffusion pipeline, as the task says: classes, concepts, or folders with prompts. With
from_scratch there is no theta_0: random weights learn the primary task under the regularizers from the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_immunize.stages.base import ImmunizeOptions
from hf_immunize.stages.words import read_words, refuse_foreign
from hf_immunize.tasks import Family, family_of

__all__ = ["ImmunizeOptions", "config_of", "immunize_model", "main"]


def config_of(family: Family) -> type:
    """The dataclass that says how a family's models are trained."""
    if family.kind == "classifier":
        from hf_immunize.training import ImmunizationConfig

        return ImmunizationConfig
    from hf_immunize.training.diffusion import DiffusionImmunizationConfig

    return DiffusionImmunizationConfig


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
    if family.kind == "classifier":
        from hf_immunize.stages.immunize_classifier import immunize_classifier

        return immunize_classifier(arguments, options, args)
    from hf_immunize.stages.immunize_pipeline import immunize_pipeline

    return immunize_pipeline(arguments, options, args)


def main(argv: Sequence[str] | None = None, family: str | None = None, prog: str | None = None) -> None:
    """The stage on words of a command line."""
    immunize_model(*read_words(lambda found: (ImmunizeOptions, config_of(found)), argv, __doc__, family, prog))
