"""An attack that trains the network, as one row: what it does first, what it trains, and its settings."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn

from hf_immunize.attacks.core.shape import Attack, Result, Run, lacking, not_applicable, setting
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.context import AttackContext

Prepare = Callable[[AttackContext, Run], nn.Module | str]
"""Makes the model that is trained; words say why the attack does not apply."""


def low_rates(default: float = 1e-3) -> Any:
    """Learning rates for attacks on all weights; those of ``FinetuneConfig`` go one decade higher."""
    return setting(default, "Peak learning rate.", sweep=(1e-5, 1e-4, 1e-3, 1e-2))


def row(
    told: str,
    covers: str,
    *,
    prepare: Prepare,
    family: str = "full fine-tuning",
    needs: tuple[str, ...] = (),
    refuses: str = "",
    spent: Callable[[Any], int] | None = None,
    own_threshold: bool = False,
    note: Callable[[AttackContext, Run], str] | None = None,
    base: type = FinetuneConfig,
    **settings: Any,
) -> Attack:
    """The attack of one row.

    Args:
        prepare: what makes the model that is trained.
        told: what ``--describe`` prints of it.
        covers: which defence it undoes, for the table in docs/attacks.md.
        refuses: which models it cannot be made on: those of which ``prepare`` returns words.
        spent: steps of a config's budget that ``prepare`` takes.
        note: what a trace says beside how the run ended.
        settings: fields of the config by name, made by ``setting``; a plain value fixes a field of ``base``.
    """
    return Attack(
        config=config_of(told, base, settings),
        run=partial(_run, prepare=prepare, needs=needs, spent=spent or (lambda config: 0), note=note),
        family=family, needs=needs, own_threshold=own_threshold, covers=covers,
        refuses=refuses,
    )  # fmt: skip


def config_of(told: str, base: type, settings: dict[str, Any]) -> type:
    """A frozen dataclass on ``base`` with these fields, documented by ``told``."""
    hints = typing.get_type_hints(base)
    inherited = {field.name: field for field in dataclasses.fields(base)}
    made = []
    for name, given in settings.items():
        if not isinstance(given, dataclasses.Field):
            given = setting(given, inherited[name].metadata["help"])
        made.append((name, hints.get(name, type(given.default)), given))
    found = dataclasses.make_dataclass("Config", made, bases=(base,), frozen=True, namespace={"__module__": __name__})
    found.__doc__ = told
    return found


def _run(
    context: AttackContext,
    runs: Sequence[Run],
    prepare: Prepare,
    needs: tuple[str, ...],
    spent: Callable[[Any], int],
    note: Callable[[AttackContext, Run], str] | None,
) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run."""
    why = lacking(needs, context)
    for planned, result in not_applicable(runs, why) if why else run_finetunes(context, runs, prepare, spent):
        told = note(context, planned) if note and result.outcome != "not_applicable" else None
        notes = "; ".join(text for text in (result.note, told) if text)
        yield planned, dataclasses.replace(result, note=notes or None)
