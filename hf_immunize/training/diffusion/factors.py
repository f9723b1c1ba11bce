"""LoRA factors that the defender trains in place of the weights, and how they become weights again."""

from __future__ import annotations

import torch
from torch import nn

from hf_immunize.diffusion import Denoiser
from hf_immunize.training.diffusion.sites import attention_projections


def put_factors(denoiser: Denoiser, model: nn.Module, rank: int) -> None:
    """Put LoRA factors on every attention projection, drawn from a fixed seed; nothing else asks for gradients."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=attention_projections(denoiser, model))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, model)


def merge_factors(model: nn.Module) -> None:
    """W + BA in every layer with factors, and the plain layer back in its place: an ordinary model."""
    from peft.tuners.lora import LoraLayer

    for name, layer in [(name, part) for name, part in model.named_modules() if isinstance(part, LoraLayer)]:
        layer.merge()
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
