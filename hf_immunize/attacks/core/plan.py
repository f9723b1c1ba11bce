"""From option text to planned runs: ``lora.rank=4``, ``lora.learning_rate=1e-3,1e-2``."""

from __future__ import annotations

import difflib
import itertools
import math
import random
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from hf_immunize.attacks.core.shape import Attack, Run
from hf_immunize.errors import ConfigError
from hf_immunize.plugins import load_plugins

Settings = Mapping[str, Mapping[str, tuple[Any, ...]]]


def parse_settings(words: Sequence[str], table: Mapping[str, Attack]) -> dict[str, dict[str, tuple[Any, ...]]]:
    """``["lora.learning_rate=1e-3,1e-2"]`` as ``{"lora": {"learning_rate": (0.001, 0.01)}}``; later words win.

    Raises:
        ConfigError: text of another form, an unknown attack or field, or a value of the wrong type.
    """
    settings: dict[str, dict[str, tuple[Any, ...]]] = {}
    for word in words:
        target, equals, values = word.partition("=")
        name, dot, field_name = target.partition(".")
        if not (equals and dot):
            raise ConfigError(f"expected attack.field=value[,value...], like lora.rank=4,8, got {word!r}.")
        attack = find_attack(name, table)
        kinds = typing.get_type_hints(attack.config)
        if field_name not in kinds:
            raise ConfigError(f"expected a field of {name} in {sorted(kinds)}, got {field_name!r} in {word!r}.")
        parsed = tuple(_value(part.strip(), kinds[field_name], word) for part in values.split(","))
        settings.setdefault(name, {})[field_name] = parsed
    return settings


def find_attack(name: str, table: Mapping[str, Attack]) -> Attack:
    """Entry of the table, that of a plug-in included. Raises ConfigError for an unknown name or a broken plug-in."""
    if name not in table:
        load_plugins()  # which may put it into the table
    if name not in table:
        raise ConfigError(f"expected an attack in {sorted(table)}, got {name!r}.{nearest(name, table)}")
    return table[name]


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that this one is most like, as a question; nothing where none is."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" Did you mean {close[0]}?" if close else ""


def plan_runs(
    attack: Attack,
    seeds: Sequence[int],
    chosen: Mapping[str, Sequence[Any]] | None = None,
    trials: int | None = None,
) -> list[Run]:
    """Every trial for every seed. ``chosen`` replaces the default values of some fields.

    Raises:
        ConfigError: no seed, a repeated seed, or a repeated or missing value.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"expected at least one seed and none twice, got {list(seeds)}.")
    return [Run(config, trial, seed) for config, trial in plan_trials(attack, chosen, trials) for seed in seeds]


def plan_trials(
    attack: Attack, chosen: Mapping[str, Sequence[Any]] | None = None, trials: int | None = None
) -> list[tuple[Any, str]]:
    """Configs with the names of their trials: the whole grid of swept values, or ``trials`` of a wider one.

    With ``trials``, attacks whose fields have ``search`` values are given that many combinations of these, drawn by a
    Latin hypercube from a fixed seed: the same for every model, and every value of a field about equally often. One of
    them is always the ordinary one, every field at its default: it takes the place of a draw with the same rate.
    A trial is named after the fields that the attack sweeps by default and those that have several values.

    Raises:
        ConfigError: a repeated or missing value, or fewer than one trial.
    """
    chosen = chosen or {}
    if trials is not None and trials < 1:
        raise ConfigError(f"expected at least one trial, got {trials}.")
    searches = trials is not None and is_searchable(attack)
    options: dict[str, tuple[Any, ...]] = {}
    swept = []
    for field in fields(attack.config):
        default = field.default if field.default is not MISSING else None
        sweep = field.metadata.get("sweep")
        wide = field.metadata.get("search") if searches else None
        options[field.name] = tuple(chosen.get(field.name, wide or sweep or (default,)))
        if len(set(options[field.name])) < max(1, len(options[field.name])):
            raise ConfigError(f"expected different values of {field.name}, got {list(options[field.name])}.")
        if sweep or len(options[field.name]) > 1:
            swept.append(field.name)
    columns = list(options.values())
    drawn = _hypercube(columns, trials) if searches and trials is not None else list(itertools.product(*columns))
    if searches:
        ordinary = {field.name: field.default if field.default in chosen.get(field.name, (field.default,))
                    else options[field.name][0] for field in fields(attack.config)}
        drawn = _with_ordinary(drawn, ordinary)
    configs = [attack.config(**dict(zip(options, values, strict=True))) for values in drawn]
    return [
        (config, ",".join(f"{name}={_text(getattr(config, name))}" for name in swept) or "default")
        for config in configs
    ]


def is_searchable(attack: Attack) -> bool:
    """Whether a random search draws from more than this attack's default grid."""
    return any("search" in field.metadata for field in fields(attack.config))


def _hypercube(columns: Sequence[tuple[Any, ...]], trials: int) -> list[tuple[Any, ...]]:
    """``trials`` different combinations in which every value of a column occurs about equally often."""
    if math.prod(map(len, columns)) <= trials:
        return list(itertools.product(*columns))
    source = random.Random(0)
    drawn: dict[tuple[Any, ...], None] = {}
    while len(drawn) < trials:  # several values per column, so a second round finds what a collision left out
        rounds = [source.sample(column * math.ceil(trials / len(column)), trials) for column in columns]
        for values in zip(*rounds, strict=True):
            if len(drawn) < trials:
                drawn[values] = None
    return list(drawn)


def _with_ordinary(drawn: Sequence[tuple[Any, ...]], ordinary: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The drawn combinations with the ordinary one in place of a draw with its rate, so that no rate is lost."""
    values = tuple(ordinary.values())
    if values in drawn:
        return list(drawn)
    rate = list(ordinary).index("learning_rate") if "learning_rate" in ordinary else 0
    place = next((place for place, found in enumerate(drawn) if found[rate] == values[rate]), 0)
    return [*drawn[:place], values, *drawn[place + 1:]]


def describe_attacks(table: Mapping[str, Attack]) -> str:
    """One line per attack and field, for ``--help``."""
    lines = []
    for name, attack in table.items():
        lines.append(f"{name} ({attack.family}): {told_of(attack)}")
        lines += [f"  undoes {attack.covers}"] if attack.covers else []
        lines += [f"  needs {', '.join(attack.needs)}"] if attack.needs else []
        lines += [f"  does not apply to {attack.refuses}"] if attack.refuses else []
        for field in fields(attack.config):
            value = field.metadata.get("sweep", field.default)
            shown = ",".join(map(_text, value)) if isinstance(value, tuple) else value
            lines.append(f"  {name}.{field.name}={shown}  {field.metadata.get('help', '')}")
    return "\n".join(lines)


def told_of(attack: Attack) -> str:
    """The first line of what an attack's config says of it."""
    return (attack.config.__doc__ or "").splitlines()[0]


def attacks_table(table: Mapping[str, Attack]) -> str:
    """The table of docs/attacks.md, as Markdown."""
    lines = ["| attack | family | what is done | what it undoes | does not apply to |", "|---|---|---|---|---|"]
    for name, attack in table.items():
        needs = f" (needs: {', '.join(attack.needs)})" if attack.needs else ""
        told = f"{attack.family} | {told_of(attack)}{needs} | {attack.covers} | {attack.refuses}".rstrip()
        lines.append(f"| `{name}` | {told} |")
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _value(text: str, kind: Any, word: str) -> Any:
    """One value of a field's type; ``none`` where the type allows it."""
    choices = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in choices and text.lower() == "none":
        return None
    wanted = next(choice for choice in choices if choice is not type(None))
    try:
        if wanted is bool:
            return {"true": True, "false": False}[text.lower()]
        return int(float(text)) if wanted is int and float(text) == int(float(text)) else wanted(text)
    except (ValueError, KeyError, OverflowError) as error:
        raise ConfigError(f"expected {wanted.__name__} values in {word!r}, got {text!r}.") from error
