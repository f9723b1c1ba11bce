"""Every trial of every preset exam, by name and digest of its settings, for a judge who has no attacks at hand.

``python -m hf_immunize.attacks.core.presets`` writes ``exam/presets.json`` again after an attack or a preset changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hf_immunize.attacks.core.plan import parse_settings, plan_trials
from hf_immunize.attacks.core.shape import Attack
from hf_immunize.exam import DIFFUSION_PROTOCOLS, PROTOCOLS, Protocol
from hf_immunize.exam.presets import PRESETS_FILE, settings_digest
from hf_immunize.records import atomic_write


def preset_trials() -> dict[str, Any]:
    """By preset and attack: the names of the attack's own settings, and of each trial a digest of their values."""
    from hf_immunize.attacks.diffusion import DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY
    from hf_immunize.attacks.vision import ATTACKS, REFERENCES, TRAINABILITY

    none: dict[str, Attack] = {}
    kinds = ((PROTOCOLS, ATTACKS, TRAINABILITY, REFERENCES),
             (DIFFUSION_PROTOCOLS, DIFFUSION_ATTACKS, DIFFUSION_TRAINABILITY, none))
    return {
        name: _of_table(protocol, attacks, protocol.attacks, protocol.settings)
        | _of_table(protocol, methods, protocol.trainability, protocol.benign_settings())
        | _of_table(replace(protocol, trials=None), references, tuple(references), ())
        for presets, attacks, methods, references in kinds
        for name, protocol in presets.items()
    }


def _of_table(
    protocol: Protocol, table: Mapping[str, Attack], names: tuple[str, ...], settings: tuple[str, ...]
) -> dict[str, Any]:
    chosen = parse_settings(settings, table)
    found = {}
    for name in names:
        trials = [(trial, asdict(config)) for config, trial in plan_trials(
            table[name], chosen.get(name), protocol.trials)]
        fields = sorted(trials[0][1])
        found[name] = {
            "family": table[name].family, "unit": table[name].unit, "fields": fields,
            "trials": {trial: settings_digest(config, fields) for trial, config in trials}
        }
    return found


def write_presets(path: Path = PRESETS_FILE) -> Path:
    """Write the table; by default into the package."""
    return atomic_write(path, json.dumps(preset_trials(), indent=1) + "\n")


if __name__ == "__main__":
    print(write_presets())
