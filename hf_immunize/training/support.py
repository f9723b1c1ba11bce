"""Combinations of hardware options that are refused, each with its reason, rather than trained silently wrong."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_immunize.errors import ConfigError


def refuse_unsupported(args: Any) -> None:
    """Raise ConfigError for options that cannot give the gradient of the global batch, or were never shown to."""
    if args.deepspeed is not None:
        raise ConfigError(
            "expected no DeepSpeed: its engine runs backward on its own and has not been shown to give the "
            "gradient of the global batch. Use DDP or FSDP2."
        )
    if args.torch_compile:
        raise ConfigError(
            "expected torch_compile off: features are read by hooks, which a compiled model does not call. Compile the "
            "released model instead."
        )
    checkpointing = args.gradient_checkpointing
    if checkpointing:
        args.gradient_checkpointing_kwargs = {"use_reentrant": False} | (args.gradient_checkpointing_kwargs or {})
        if args.gradient_checkpointing_kwargs["use_reentrant"]:
            raise ConfigError(
                "expected gradient_checkpointing_kwargs with use_reentrant=False: reentrant checkpointing hands out "
                "features without a gradient, silently."
            )
    if args.cache_frozen_features and checkpointing:
        raise ConfigError(
            "expected cache_frozen_features or gradient_checkpointing, got both: checkpointing repeats a forward whose "
            "beginning was skipped. The cache alone saves more memory."
        )
    if args.cache_frozen_features and args.augmentation:
        raise ConfigError(
            "expected cache_frozen_features or augmentation, got both: cached activations are of unchanged images."
        )
    if args.precondition_gradients and checkpointing:
        raise ConfigError(
            "expected precondition_gradients or gradient_checkpointing, got both: the correction needs the graph of "
            "the forward a second time."
        )
    if args.attacker_lora_rank:
        _refuse_with_lora(args)


def _refuse_with_lora(args: Any) -> None:
    """What the attacker's LoRA updates cannot be combined with: other terms would see an attacked model's features."""
    if args.objective.strip() != "imma" or args.sites != "head":
        raise ConfigError(
            f"expected objective imma alone at sites=head with attacker_lora_rank, got {args.objective} at "
            f"{args.sites}: set attacker_lora_rank=0 for other objectives and sites."
        )
    if args.gradient_checkpointing or args.cache_frozen_features:
        raise ConfigError(
            "expected neither gradient_checkpointing nor cache_frozen_features with attacker_lora_rank, got one: a "
            "forward that is repeated or begins late would not have the attacker's updates."
        )


def is_sharded(model: nn.Module) -> bool:
    """Whether parameters are split over ranks (FSDP2, tensor parallelism)."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def refuse_sharded(args: Any, model: nn.Module) -> None:
    """Raise ConfigError for options that read or write whole parameters of a model that is split over ranks."""
    needs_whole = {
        "cache_frozen_features": args.cache_frozen_features,
        "precondition_gradients": args.precondition_gradients is not None,
        "ema_decay": args.ema_decay > 0,
        "distillation": args.distillation + args.feature_distillation > 0,
        "max_primary_drop": args.max_primary_drop is not None,
        "attacker_lora_rank": args.attacker_lora_rank > 0,
    }
    asked = [name for name, on in needs_whole.items() if on]
    if asked and is_sharded(model):
        raise ConfigError(
            f"expected a model that is whole on every rank for {asked}, got sharded parameters (FSDP2): turn these "
            "options off, or use DDP."
        )
