"""Modules by name: what is trained, and which linear layers are sites, chosen as PEFT chooses ``target_modules``."""

from __future__ import annotations

import re

from torch import nn

from hf_immunize.errors import ModelError
from hf_immunize.features.blocks import block_names, find_stages, find_trunk, names_after_stages
from hf_immunize.features.capture import base_prefix
from hf_immunize.features.heads import find_classifier

ATTENTION = r".*att(entio)?n.*\.(q_proj|v_proj|query|value)"
"""Query and value projections, under their present and their former names: what LoRA trains by default."""


def match_modules(model: nn.Module, patterns: str) -> list[str]:
    """Names of the modules that ``patterns`` means, in the order of registration.

    A text with one of ``*+?[]()|^$\\`` is one regular expression over whole names; anything else is a comma-separated
    list of names or dotted ends of names.

    Raises:
        ModelError: a pattern that fits no module, or an expression that is none.
    """
    names = [name for name, _ in model.named_modules() if name]
    if re.search(r"[*+?\[\]()|^$\\]", patterns):
        try:
            found = [name for name in names if re.fullmatch(patterns, name)]
        except re.error as error:
            raise ModelError(f"expected a regular expression over module names, got {patterns!r}: {error}.") from error
        if not found:
            raise _nothing(model, patterns)
        return found
    chosen = set()
    for part in (part.strip() for part in patterns.split(",")):
        fitting = {name for name in names if part and (name == part or name.endswith(f".{part}"))}
        if not fitting:
            raise _nothing(model, part)
        chosen |= fitting
    return [name for name in names if name in chosen]


def _nothing(model: nn.Module, pattern: str) -> ModelError:
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-5:]
    return ModelError(
        f"expected a pattern that fits modules of {type(model).__name__}, got {pattern!r} which fits none: print "
        f"dict(model.named_modules()); its last linear layers are {last}."
    )


def trainable_modules(model: nn.Module, patterns: str) -> list[str]:
    """Modules that ``patterns`` leaves trainable; ``last:N`` means the trunk's last N stages and all that follows it.

    Stages are those of ``find_stages``: of a ViT, its blocks. ``last:0`` is what follows the trunk alone. Everything
    else is as in ``match_modules``.

    Raises:
        ModelError: nothing fits, or more stages or blocks were asked for than the trunk has.
    """
    if not (wanted := re.fullmatch(r"last:(\d+)", patterns.strip())):
        return match_modules(model, patterns)
    count = int(wanted.group(1))
    stages = find_stages(model)
    if count > len(stages):
        words = "blocks" if len(stages) == len(block_names(model)) else "stages"
        raise ModelError(
            f"expected at most {len(stages)} {words} after 'last:', got {count}: the trunk '{find_trunk(model)[0]}' "
            "has no more."
        )
    every = [f"{name}." for stage in stages for name in stage]
    # Lists beside the trunk that were registered after it hold earlier stages' modules as well.
    after = [
        name for name in names_after_stages(model)
        if not any(f"{name}.".startswith(part) or part.startswith(f"{name}.") for part in every)
    ]  # fmt: skip
    return [name for stage in stages[len(stages) - count :] for name in stage] + after


def linear_sites(model: nn.Module, patterns: str, head: str | None = None) -> list[str]:
    """Layers whose inputs are measured: ``head``, ``lora`` (what LoRA would train), or ``match_modules`` patterns.

    ``lora`` takes query and value projections of attention; where there are none, every linear layer but the head.

    Raises:
        ModelError: nothing fits, or a head is needed and there is none.
    """
    if patterns == "head":
        return [head or find_classifier(model)]
    if patterns == "lora":
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        # Decoders outside the base model (ViTMAE) are thrown away by whoever fine-tunes.
        inside = base_prefix(model) or ""
        found = [name for name in linear if name.startswith(inside) and re.fullmatch(ATTENTION, name) and name != head]
        if not found:
            head = head or find_classifier(model)
            found = [name for name in linear if name != head]
        if not found:
            raise ModelError(
                f"expected linear layers besides the head in {type(model).__name__} for 'lora', got none: name the "
                "modules whose inputs are to be measured."
            )
        return found
    return match_modules(model, patterns)
