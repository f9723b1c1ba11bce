"""The kinds of task there are, and which of them a set of options means."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_immunize.data import TaskArguments
from hf_immunize.errors import ConfigError
from hf_immunize.models import load_processor
from hf_immunize.tasks.classes import ClassesTask
from hf_immunize.tasks.protocol import ExamTask


@dataclass(frozen=True)
class Family:
    """One way of naming a task. diffusers is imported when a pipeline's task is asked for, and not before."""

    name: str
    kind: Literal["classifier", "pipeline"]
    """What is immunized and attacked."""
    marks: frozenset[str]
    """Options that a task of this family has to have, and no other family knows."""
    arguments: Callable[[], type]
    """The dataclass of its options."""
    reader: Callable[[str | Path], Any]
    """What a model's rows are made by, from its folder: an image processor, or the pipeline; None for nothing."""
    make: Callable[[Any, Any], ExamTask]
    """The task of these options, read by that."""

    def open(self, arguments: Any, folder: str | Path) -> ExamTask:
        """The task of these options, for the model in a folder."""
        return self.make(arguments, self.reader(folder))


def _make_classes(arguments: Any, processor: Any) -> ExamTask:
    return ClassesTask(arguments, processor)


def _concept_arguments() -> type:
    from hf_immunize.diffusion.tasks import ConceptArguments

    return ConceptArguments


def _make_concepts(arguments: Any, reader: Any = None) -> ExamTask:
    from hf_immunize.diffusion.tasks import ConceptTask

    return ConceptTask(arguments)


def _prompt_arguments() -> type:
    from hf_immunize.diffusion.prompts import PromptArguments

    return PromptArguments


def _load_pipeline(folder: str | Path) -> Any:
    from hf_immunize.diffusion import load_pipeline

    return load_pipeline(folder)


def _make_prompts(arguments: Any, pipeline: Any) -> ExamTask:
    from hf_immunize.diffusion.prompts import PromptTask

    return PromptTask(arguments, pipeline)


FAMILIES: dict[str, Family] = {
    "classes": Family(
        "classes", "classifier", frozenset({"primary_dataset", "harmful_dataset"}),
        lambda: TaskArguments, load_processor, _make_classes,
    ),
    "concepts": Family(
        "concepts", "pipeline", frozenset({"dataset"}),
        _concept_arguments, lambda folder: None, _make_concepts,
    ),
    "prompts": Family(
        "prompts", "pipeline", frozenset({"retain_images", "harmful_images", "retain_prompt", "harmful_prompt"}),
        _prompt_arguments, _load_pipeline, _make_prompts,
    ),
}  # fmt: skip


def find_family(given: Iterable[str], named: str | None = None) -> Family:
    """The family of a task by name, or by the options that were given; ``classes`` where none says otherwise.

    Raises:
        ConfigError: an unknown name, or options of several families.
    """
    if named is not None:
        if named not in FAMILIES:
            raise ConfigError(f"expected a family of tasks in {sorted(FAMILIES)}, got {named!r}.")
        return FAMILIES[named]
    names = set(given)
    found = {family.name: sorted(family.marks & names) for family in FAMILIES.values() if family.marks & names}
    if len(found) > 1:
        raise ConfigError(f"expected the options of one task, got {found}: give those of one of them.")
    return FAMILIES[next(iter(found), "classes")]


def family_of(arguments: Any) -> Family:
    """The family whose options these are. Raises ConfigError for an object of another class."""
    for family in FAMILIES.values():
        if isinstance(arguments, family.arguments()):
            return family
    raise ConfigError(f"expected TaskArguments, ConceptArguments or PromptArguments, got {type(arguments).__name__}.")
