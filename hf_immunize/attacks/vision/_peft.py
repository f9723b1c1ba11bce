"""Adapters of the PEFT library around the attacked model, with a new head that is trained in full."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hf_immunize.attacks.core.shape import Result, Run, setting
from hf_immunize.attacks.vision._finetune import FinetuneConfig, run_finetunes
from hf_immunize.attacks.vision.context import AttackContext

ATTENTION = r".*att(entio)?n.*\.(q_proj|v_proj|query|value)"
"""Query and value projections, under their present and their former names."""

ALL_LINEAR = "all-linear"
"""Every linear layer and every convolution without groups, but the head."""


@dataclass(frozen=True)
class AdapterConfig(FinetuneConfig):
    """What every adapter attack is told beside the training options."""

    targets: str | None = setting(None, "Regular expression over module names. By default attention query and value "
                                  "projections; where there are none, every linear layer but the head; where there are "
                                  "none, every convolution.")


NOTHING_TO_ADAPT = "models without a linear layer or convolution beside the head"
"""What no adapter can be made on."""


def target_modules(model: nn.Module, head: str, pattern: str | None) -> list[str]:
    """Full names of the layers to adapt, the head left out; an empty list when the model has none."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != head]
    convolutions = [
        name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups == 1
    ]
    if pattern == ALL_LINEAR:
        return linear + convolutions
    if pattern is not None:
        return [name for name in linear + convolutions if re.fullmatch(pattern, name)]
    return [name for name in linear if re.fullmatch(ATTENTION, name)] or linear or convolutions


def run_adapters(
    context: AttackContext, runs: Sequence[Run], make: Callable[[Any, list[str]], PeftConfig]
) -> Iterator[tuple[Run, Result]]:
    """One Trainer per run; ``make`` turns an attack's config and its target layers into PEFT's config."""
    yield from run_finetunes(context, runs, lambda context, run: adapt(context, run, make))


def adapt(
    context: AttackContext, run: Run, make: Callable[[Any, list[str]], PeftConfig], model: nn.Module | None = None
) -> nn.Module | str:
    """The adapted model, its adapters drawn from the run's seed; or words on why the method does not apply.

    ``model`` is the attacked one with its new head, where the attacker has changed it before.
    """
    model = context.model_with_new_head(run.seed) if model is None else model
    targets = target_modules(model, context.head, run.config.targets)
    if not targets:
        return f"no linear layer or convolution to adapt (targets={run.config.targets!r})"
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        try:
            adapted = get_peft_model(model, make(run.config, targets))
        except (ValueError, NotImplementedError, TypeError) as error:
            kinds = sorted({type(model.get_submodule(name)).__name__ for name in targets})
            return f"PEFT cannot put this adapter on {', '.join(kinds)} layers: {error}"
    _show_geometry(adapted)
    for parameter in adapted.get_submodule(f"base_model.model.{context.head}").parameters():
        parameter.requires_grad_(True)
    return adapted


def _show_geometry(adapted: nn.Module) -> None:
    """Give adapters of convolutions the sizes of what they wrap: MobileNetV2 reads them to pad as TensorFlow does."""
    for module in adapted.modules():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else None
        if isinstance(base, nn.Conv2d):
            for name in ("kernel_size", "stride", "padding", "dilation", "groups"):
                if not hasattr(module, name):
                    setattr(module, name, getattr(base, name))
