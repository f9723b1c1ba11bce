"""Train the base model that is to be immunized: a classifier or its head, or a small class-conditional denoiser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hf_immunize.errors import ConfigError
from hf_immunize.stages.words import read_words
from hf_immunize.tasks import Family, family_of
from hf_immunize.training.core.launching import leave_processes

_NO_PROMPTS = (
    "expected a task of classes or concepts to pretrain on, got one of prompts: a pipeline that reads prompts is "
    "downloaded, not trained here. Immunize it."
)


def options_of(family: Family) -> tuple[type, ...]:
    """The dataclasses that say what is trained. Raises ConfigError for a task of prompts."""
    if family.name == "classes":
        from transformers import TrainingArguments

        from hf_immunize.stages.pretrain_classifier import ClassifierOptions

        return ClassifierOptions, TrainingArguments
    if family.name == "concepts":
        from hf_immunize.stages.pretrain_denoiser import DenoiserOptions

        return (DenoiserOptions,)
    raise ConfigError(_NO_PROMPTS)


def pretrain_model(arguments: Any, *options: Any) -> None:
    """Train on the side that the model keeps, and leave the model in its output folder.

    Args:
        arguments: TaskArguments, with ClassifierOptions and ``transformers.TrainingArguments``; or ConceptArguments,
            with DenoiserOptions.

    Raises:
        ConfigError: a task of prompts, or options that contradict each other.
        RunMismatchError: the output folder holds another run.
        TrainingDivergedError: weights that are not finite in the end.
    """
    family = family_of(arguments)
    if family.name == "classes":
        from hf_immunize.stages.pretrain_classifier import pretrain_classifier

        return pretrain_classifier(arguments, *options)
    if family.name == "concepts":
        from hf_immunize.stages.pretrain_denoiser import pretrain_denoiser

        return pretrain_denoiser(arguments, *options)
    raise ConfigError(_NO_PROMPTS)


def main(argv: Sequence[str] | None = None, family: str | None = None, prog: str | None = None) -> None:
    """The stage on words of a command line."""
    pretrain_model(*read_words(options_of, argv, __doc__, family, prog))
    leave_processes()
