"""An exam's benches set up again from what its traces say: each certified run gets the context that it was made in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_immunize.attacks import Attack, AttackContext
from hf_immunize.attacks.core.stored import holdings
from hf_immunize.certification.plugins import attack_tables, refuse_other_code
from hf_immunize.errors import ConfigError, RecordError
from hf_immunize.exam.means import Means
from hf_immunize.models import reads_images
from hf_immunize.plugins import load_plugins
from hf_immunize.records import AttackTrace
from hf_immunize.tasks import ExamTask, Family, attacker_fingerprints, attacker_holds, find_family

_DRAWN = ("exam_levels", "exam_seed")


def read_options(path: str | Path) -> dict[str, Any]:
    """The options of a task from the YAML file that the stages of the exam were given. Raises ConfigError."""
    try:
        loaded: Any = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"expected a task file such as recipes/digits-vit/task.yaml, got {path}: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"expected task options as a mapping in {path}, got {type(loaded).__name__}.")
    return {str(name): value for name, value in loaded.items()}


def open_bench(folder: str | Path, base: str | Path, options: Mapping[str, Any], device: str = "cpu") -> Bench:
    """The bench of an exam from two folders and the options of its task: classes, concepts or prompts.

    Raises:
        ConfigError: options of no task, of several, or without a dataset.
        DataError: data that is not there.
    """
    family, arguments = task_arguments(options)
    task = family.open(arguments, base if family.name == "prompts" else reads_images(folder, base))
    return Bench(Path(folder), Path(base), task, device)


def task_arguments(options: Mapping[str, Any]) -> tuple[Family, Any]:
    """The family of a task and its options as their dataclass. Raises ConfigError as ``open_bench``."""
    family = find_family(options)
    kind = family.arguments()
    known = {item.name: item for item in dataclasses.fields(kind)}
    if unknown := sorted(set(options) - set(known)):
        raise ConfigError(f"expected task options out of {', '.join(known)}, got {unknown}.")
    needed = [name for name, item in known.items()
              if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if options.get(name) is None]:
        raise ConfigError(f"expected {' and '.join(missing)} among the task options, got neither path nor Hub id: name "
                          "the data.")
    kept = {name: _as_option(value) for name, value in options.items()} if family.kind == "classifier" else options
    return family, kind(**kept)


def _as_option(value: Any) -> Any:
    """Labels and fractions may be read as numbers, but are words."""
    return value if value is None or isinstance(value, bool | list | int) else str(value)


@dataclass
class Bench:
    """Model, base and task of one exam.

    Args:
        folder, base: folders of the model under test and of its base; an adapter is put on that base.
        task: the rows, read as the exam read them.
        device: where attacks run now.
        eval_batch_size: rows at a time for pipelines; None: the default.
    """

    folder: Path
    base: Path
    task: ExamTask
    device: str = "cpu"
    eval_batch_size: int | None = None
    table: Mapping[str, Attack] = field(default_factory=attack_tables)
    _contexts: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    def attack(self, name: str) -> Attack:
        """An attack by name. Raises RecordError for one that neither this release nor a plug-in has."""
        if name not in self.table:
            load_plugins()
            self.table = attack_tables()
        if name not in self.table:
            raise RecordError(f"expected an attack of this release, got {name!r}: recheck with the one that made it.")
        return self.table[name]

    def context(self, trace: AttackTrace) -> Any:
        """The context that a trace was made in, its share of rows, module, levels and holdings taken from the trace.

        Raises:
            RecordError: other weights, rows or holdings than the trace tells of.
        """
        attack, told = self.attack(trace.attack), trace.config
        refuse_other_code(trace, self.table, trace.file_name)
        side = "benign" if trace.attack.startswith("benign_") else "harmful"
        names = [name for name in ("attack_fraction", "feature_module", *_DRAWN) if name in told]
        options = {**{name: told[name] for name in names}, "means": Means.of(told)}
        held = tuple(need for need in attack.needs if told.get(need) is not None)
        key = (trace.role, side, tuple(sorted(options.items())), held, attack.needs)
        if key not in self._contexts:
            self._contexts[key] = self._made(trace, side, options, held, attack)
        context = self._contexts[key]
        self._check(trace, side, context, attack)
        return context

    def _made(
        self, trace: AttackTrace, side: str, options: dict[str, Any], held: tuple[str, ...], attack: Attack
    ) -> Any:
        known = dict(attacker_holds(self.task, side))
        for need in attack.needs:
            if need not in held:
                known.pop(need, None)  # the attacker of the exam did not hold it
        folder = self.folder if trace.role == "subject" else self.base
        common = {"folder": folder, "role": trace.role, "device": self.device, **options, **known}
        if not trace.attack.removeprefix("benign_").startswith("diffusion_"):
            return AttackContext(**common, base=self.base if "base" in held else None, adapter_base=self.base)
        from hf_immunize.attacks.diffusion import DiffusionAttackContext

        size: dict[str, Any] = {} if self.eval_batch_size is None else {"eval_batch_size": self.eval_batch_size}
        return DiffusionAttackContext(**common, **size)

    def _check(self, trace: AttackTrace, side: str, context: Any, attack: Attack) -> None:
        """That the bench is the one that the trace speaks of."""
        if [part.sha256 for part in trace.data] != [part.sha256 for part in attacker_fingerprints(self.task, side)]:
            raise RecordError(
                f"expected the {side} rows that the certificate names, got others: give the task file of the exam "
                "(dataset, labels, splits, split_seed)."
            )
        if trace.role != "scratch" and not context.fingerprint.is_same(trace.model):
            raise RecordError(
                f"expected the {trace.role}'s weights and config.json to be those of the certificate, got others: "
                "certify these weights anew."
            )
        here = holdings(context, attack)
        if other := sorted(need for need in attack.needs if here[need] != trace.config.get(need)):
            raise RecordError(
                f"expected the attacker of {trace.attack} to hold the same {' and '.join(other)} as in the exam, got "
                "another: give the base and the task file of the exam."
            )
