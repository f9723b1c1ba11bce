"""Attacks of one's own, beside those of the package: put into the table under a name, with the digest of their code."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from hf_immunize.attacks.core.shape import NEEDS, Attack
from hf_immunize.attacks.vision import ATTACKS
from hf_immunize.errors import ConfigError
from hf_immunize.plugins import origin

ON_PIPELINES, BENIGN = "diffusion_", "benign_"


def register_attack(name: str, attack: Attack) -> Attack:
    """Add an attack of your own to those that an exam can name (``attacks: [..., name]``); returns it as it is known.

    A name that begins with ``diffusion_`` is one on pipelines, whose run is given a ``DiffusionAttackContext``; any
    other is one on classifiers. Every process that attacks, certifies or verifies has to register it: make its module a
    plug-in (docs/extend/attack.md). Its traces and certificates carry the digest of the code that calls this.

    Raises:
        ConfigError: the name is taken, no identifier or begins with ``benign_``; a config that is no frozen dataclass
            with a docstring; a need that no exam knows; code without a source that can be read.
    """
    table = _table(name)
    if name in table or not name.isidentifier() or name.startswith(BENIGN):
        raise ConfigError(
            f"expected an identifier that is not in {sorted(table)} and does not begin with {BENIGN!r}, got {name!r}: "
            "choose another."
        )
    config: Any = attack.config
    made_by: Any = getattr(config, "__dataclass_params__", None)
    if not (dataclasses.is_dataclass(config) and made_by.frozen and config.__doc__):
        raise ConfigError(
            f"expected a frozen dataclass with a docstring as the config of {name!r}, got {config!r}: write "
            "@dataclass(frozen=True), and make its fields by hf_immunize.attacks.setting."
        )
    if unknown := sorted(set(attack.needs) - set(NEEDS)):
        raise ConfigError(f"expected needs of {name!r} among {sorted(NEEDS)}, got {unknown}: no exam gives others.")
    made = dataclasses.replace(attack, plugin=origin(sys._getframe(1)))
    if name.startswith(ON_PIPELINES):
        from hf_immunize.attacks.diffusion import guarded

        made = guarded(made)
    table[name] = made
    return made


def _table(name: str) -> dict[str, Attack]:
    if not name.startswith(ON_PIPELINES):
        return ATTACKS
    from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS

    return DIFFUSION_ATTACKS
