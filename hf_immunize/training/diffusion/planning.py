"""What a denoiser's run will hold in memory, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hf_immunize.diffusion import denoiser_of, dtype_of_rows
from hf_immunize.training.core.memory import Activations, Memory, Options, fake, memory_of, watch_forward
from hf_immunize.training.core.registry import on_features, on_weights
from hf_immunize.training.diffusion.config import DiffusionImmunizationConfig
from hf_immunize.training.diffusion.setup import choose_trainable, named_terms


def plan_memory(
    model: Any, args: DiffusionImmunizationConfig, *, latents: tuple[int, int, int] | None = None,
    devices: int = 1, sharded: bool = False,
) -> Memory:
    """Bytes on one device and its host for immunizing ``model`` with ``args``.

    Args:
        model: a bare denoiser on the meta device, in the precision its weights will be held in; it is left there with
            what ``args.trainable_modules`` puts on it, as fake tensors, and of no more use.
        args: options of the run.
        latents: C, H, W of one row; as the model's config says if not given.
        devices, sharded: number of devices, with DDP or with FSDP2.
    """
    choose_trainable(denoiser_of(model), model, args.trainable_modules, args.lora_rank)
    terms = named_terms(args)
    autocast = {"bf16": torch.bfloat16}.get(args.mixed_precision)
    sides = 2 if on_features(terms) else 1
    rows = args.per_device_train_batch_size + (sides - 1) * args.per_device_harmful_batch_size
    kept = activations_of(model, rows, latents, autocast)
    attacker = ("lora" if args.attacker_rank else "all") if on_weights(terms) else None
    options = Options(
        optim=args.optim, teacher=args.distillation > 0 or "esd" in args.objectives, average=args.ema_decay > 0,
        guard=args.max_primary_drop is not None, accumulation=args.gradient_accumulation_steps,
        checkpointing=args.gradient_checkpointing, attacker=attacker, devices=devices, sharded=sharded,
        primary=args.per_device_train_batch_size / rows,
    )  # fmt: skip
    return memory_of(model, kept.bytes(options.checkpointing), options, autocast or next(model.parameters()).dtype)


def activations_of(
    model: Any, rows: int, latents: tuple[int, int, int] | None = None, autocast: torch.dtype | None = None
) -> Activations:
    """What one forward of ``rows`` rows keeps for backward; ``model`` on the meta device becomes fake tensors."""
    denoiser = denoiser_of(model)
    with fake(model.train()):
        shapes = condition_shapes(model)
        dtype = dtype_of_rows(model)
        conditions = {name: torch.empty(rows, *shape, dtype=dtype) for name, shape in shapes.items()}
        if "class_labels" in conditions:
            conditions["class_labels"] = torch.zeros(rows, dtype=torch.long)
        noisy = torch.empty(rows, *(latents or latent_shape(model)), dtype=dtype)
        steps = torch.zeros(rows, dtype=torch.long)
        return watch_forward(model, lambda: denoiser.call(model, noisy, steps, conditions), autocast)


def latent_shape(model: Any) -> tuple[int, int, int]:
    """C, H, W of the latents that a denoiser was made for."""
    denoiser = denoiser_of(model)
    size = denoiser.side(model)
    height, width = (size, size) if isinstance(size, int) else size
    return denoiser.channels(model), height, width


def condition_shapes(model: Any) -> Mapping[str, tuple[int, ...]]:
    """Shapes of one row of every condition that the denoiser needs."""
    config, tokens = model.config, denoiser_of(model).tokens
    width = getattr(config, "joint_attention_dim", None) or getattr(config, "caption_channels", None)
    width = width or getattr(config, "cross_attention_dim", None) or 0
    pooled = getattr(config, "pooled_projection_dim", None) or 0
    if getattr(config, "addition_embed_type", None) == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    known: dict[str, tuple[int, ...]] = {
        "encoder_hidden_states": (tokens, width), "pooled_projections": (pooled,), "text_embeds": (pooled,),
        "time_ids": (6,), "class_labels": (), "resolution": (2,), "aspect_ratio": (1,),
    }  # fmt: skip
    return {name: known[name] for name in denoiser_of(model).needs(model)}
