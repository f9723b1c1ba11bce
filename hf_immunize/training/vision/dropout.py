"""Dropout layers that do not drop while a model is immunized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hf_immunize.training.vision.sites import inputs_of


@torch.no_grad()
def dropout_before(model: nn.Module, readers: Iterable[str], row: Mapping[str, Any]) -> list[str]:
    """Names of the dropout layers whose output one of the readers takes in as it is.

    A term is about the features that an attacker reads, who drops none: with four of five dropped, as MobileNetV2's
    config has it right before the head, it would be about noise.

    Args:
        row: with one image, of which a forward is made in evaluation mode.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _DropoutNd)}
    if not layers:
        return []
    made: dict[int, list[str]] = {}
    kept: list[Tensor] = []  # an address is one tensor's as long as it lives
    found: list[str] = []

    def make(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            kept.append(output)
            made.setdefault(id(output), []).append(name)

        return hook

    def read(_module: nn.Module, inputs: Any) -> None:
        found.extend(made.get(id(inputs[0]), []) if inputs else [])

    handles = [module.register_forward_hook(make(name)) for name, module in layers.items()]
    handles += [model.get_submodule(name).register_forward_pre_hook(read) for name in readers]
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        model(**{name: value.to(device) for name, value in inputs_of(model, row).items()})
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return sorted(set(found))


def hold_dropout(model: nn.Module, names: Iterable[str] | None) -> None:
    """Put these dropout layers into evaluation mode; None: all."""
    if names is None:
        for module in model.modules():
            if isinstance(module, _DropoutNd):
                module.eval()
        return
    for name in names:
        model.get_submodule(name).eval()
