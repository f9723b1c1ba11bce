"""What a profile runs on a model: full fine-tuning after the last n blocks were drawn anew, and probes of every block.

These are attacks like any other, with traces like any other, but none of an exam: what they are told to do depends on
how many blocks the model has.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_immunize.attacks.core.shape import Attack, setting
from hf_immunize.attacks.vision import _preparations as first
from hf_immunize.attacks.vision import earlier_layer_probe
from hf_immunize.attacks.vision._blocks import block_sites
from hf_immunize.attacks.vision._row import config_of, row
from hf_immunize.features import block_names, find_stages

_RESET, _PROBE = "reset_", "block_probe_"
_FINE = 1.25
"""Evaluations are this factor of steps apart: finer than an exam's, since T(n) is compared between many n."""


def trunk_of(model: nn.Module, head: str) -> tuple[list[str], list[list[str]], list[str]]:
    """Blocks, stages, and the module whose input is each block's output. Raises ModelError without a list of blocks."""
    return block_names(model), find_stages(model), block_sites(model, head)


def reset_attacks(counts: Sequence[int], blocks: int, rates: Sequence[float], steps: int) -> dict[str, Attack]:
    """Full fine-tuning after the last n of ``blocks`` blocks were drawn anew, for every n of ``counts``.

    n = 0 is plain fine-tuning. On random weights (role ``scratch``) n = 0 is training from scratch.
    """
    return {f"{_RESET}{count:03d}": _reset(count, blocks, tuple(rates), steps) for count in counts}


def _reset(count: int, blocks: int, rates: tuple[float, ...], steps: int) -> Attack:
    fields: dict[str, Any] = {
        "learning_rate": setting(rates[0], "Peak learning rate.", sweep=rates), "steps": steps,
        "evaluation_ratio": _FINE,
    }  # fmt: skip
    if count:
        fields["share"] = setting(count / blocks, "Share of the blocks that is drawn anew.")
    return row(
        f"AdamW on all weights after the last {count} of {blocks} blocks were drawn anew.", "a defence of late blocks",
        prepare=first.reset_last if count else first.unfrozen, **fields,
    )


def block_probes(sites: Sequence[str]) -> dict[str, Attack]:
    """A ridge probe on the output of every block, standardized, its penalty swept."""
    last = max(len(sites) - 1, 1)
    return {f"{_PROBE}{place:03d}": _probe(place / last) for place in range(len(sites))}


def _probe(depth: float) -> Attack:
    config = config_of(
        "Ridge regression on the output of one block.", earlier_layer_probe.EarlierLayerProbe,
        {"depth": setting(depth, "Which block: 0 = output of the first, 1 = output of the last.")},
    )  # fmt: skip
    return dataclasses.replace(earlier_layer_probe.ATTACK, config=config)


def count_of(name: str) -> int | None:
    """The n of an attack of ``reset_attacks``; None for another."""
    return int(name.removeprefix(_RESET)) if name.startswith(_RESET) else None


def place_of(name: str) -> int | None:
    """Which block an attack of ``block_probes`` looks at; None for another."""
    return int(name.removeprefix(_PROBE)) if name.startswith(_PROBE) else None
