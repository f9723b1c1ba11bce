"""LoRA factors that the defender trains in place of the weights, and how they become weights again."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_immunize.diffusion import Denoiser
from hf_immunize.training.core.attacker import widen_factors
from hf_immunize.training.diffusion.sites import attention_projections

NOTABLE = 0.01
"""Share of an update lost to rounding from which on it is worth a warning."""


def put_factors(denoiser: Denoiser, model: nn.Module, rank: int) -> None:
    """Put LoRA factors on every attention projection, drawn from a fixed seed; nothing else asks for gradients.

    The weights they stand beside may be bfloat16; the factors are float32, or wider where the weights are.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=attention_projections(denoiser, model))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, model)
    widen_factors(model)


@torch.no_grad()
def merge_factors(model: nn.Module) -> float:
    """W + BA in every layer with factors, and the plain layer back in its place: an ordinary model.

    The sum is taken in the factors' precision and rounded once, to that of W.

    Returns:
        What rounding took: ‖round(W + BA) − (W + BA)‖ / ‖BA‖ over all layers together. 0 where W is as wide as the
        factors. An update smaller than half of the distance between two bfloat16 numbers, |w|/256, is lost whole.
    """
    lost = moved = torch.zeros((), dtype=torch.float64)
    update: Any
    for name, layer in _layers(model):
        weight = layer.get_base_layer().weight
        update = sum(layer.get_delta_weight(adapter) for adapter in layer.active_adapters)
        exact = weight + update
        weight.copy_(exact)
        lost = lost + _square(weight - exact)
        moved = moved + _square(update)
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return float((lost / moved).sqrt()) if float(moved) > 0 else 0.0


def told_rounding(share: float, dtype: torch.dtype) -> str:
    """In words, what ``merge_factors`` returned for weights of ``dtype``."""
    kind = str(dtype).removeprefix("torch.")
    return (
        f"merged into {kind} weights, the update lost {100 * share:.0f} % of itself to rounding (norm of the rounding "
        "over norm of the update): keep the factors with merge_lora=false and model.save_lora_adapter(folder), or "
        "load the base in float32."
    )


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]


def _square(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square().cpu()
