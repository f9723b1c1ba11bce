"""Everything a recheck needs, from folders and a task file: for somebody who has only what was published."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from hf_immunize.attacks import AttackContext
from hf_immunize.certification.judge import find_rule
from hf_immunize.certification.repeating import Recheck, recheck
from hf_immunize.data import TaskArguments
from hf_immunize.errors import ConfigError, RecordError
from hf_immunize.models import load_processor
from hf_immunize.records import Certificate
from hf_immunize.tasks import ClassesTask, attacker_fingerprints, attacker_holds


def read_task(path: str | Path) -> TaskArguments:
    """The tasks of an exam from the YAML file that its stages were given. Raises ConfigError."""
    known = {field.name: field for field in dataclasses.fields(TaskArguments)}
    try:
        loaded: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"expected a task file such as recipes/digits-vit/task.yaml, got {path}: {error}") from error
    if not isinstance(loaded, dict) or not set(loaded) <= set(known):
        got = sorted(map(str, set(loaded) - set(known))) if isinstance(loaded, dict) else type(loaded).__name__
        raise ConfigError(f"expected task options out of {', '.join(known)} in {path}, got {got}.")
    missing = [name for name in ("primary_dataset", "harmful_dataset") if name not in loaded]
    if missing:
        raise ConfigError(f"expected {' and '.join(missing)} in {path}, got neither path nor Hub id: name the data.")
    return TaskArguments(**{
        name: value if value is None or isinstance(value, bool | list) or name == "split_seed" else str(value)
        for name, value in loaded.items()
    })


def sit_again(
    folder: str | Path, base: str | Path, task: TaskArguments, cells: int, seed: int = 0, device: str = "cpu"
) -> list[Recheck]:
    """Load the harmful data, the model and its base, and run ``cells`` random cells of the certificate again.

    Args:
        task: the same options that the exam was sat with; the rows are compared by content.
        seed: which cells are drawn.

    Raises:
        ConfigError: no cell asked for.
        RecordError: a rule of another release, or other rows, weights or traces than the certificate's.
    """
    if cells < 1:
        raise ConfigError(f"expected at least one cell to sit again, got {cells}.")
    certificate = Certificate.read(Path(folder) / "certificate.json")
    rule = find_rule(certificate)
    if rule is None:
        raise RecordError("expected a rule of this release, got another: recheck with the release that wrote it.")
    exam = ClassesTask(task, load_processor(folder))
    if [part.sha256 for part in attacker_fingerprints(exam, "harmful")] != [
        part.sha256 for part in certificate.harmful_data
    ]:
        raise RecordError(
            "expected the harmful rows that the certificate names, got others: give the task file of the exam "
            "(dataset, labels, splits, split_seed)."
        )
    return recheck(folder, exam_contexts(exam, folder, base, device=device), cells, seed, rule)


def exam_contexts(task: ClassesTask, folder: str | Path, base: str | Path, **told: Any) -> dict[str, AttackContext]:
    """Model and base as their attackers meet them, with the base and benign rows that attacks may have needed."""
    held = {**attacker_holds(task, "harmful"), "base": Path(base), **told}
    sides = (("subject", folder), ("control", base))
    return {role: AttackContext(folder=Path(path), role=role, **held) for role, path in sides}
