"""What a classifier's run will hold in memory, before anything is allocated."""

from __future__ import annotations

import torch
from torch import nn

from hf_immunize.training.core.memory import Activations, Memory, Options, fake, memory_of, watch_forward
from hf_immunize.training.vision.config import ImmunizationConfig
from hf_immunize.training.vision.frozen import freeze_all_but
from hf_immunize.training.vision.held import PROBED, is_large, part_of

_AUTOCAST = {"bf16": torch.bfloat16}


def plan_memory(
    model: nn.Module, args: ImmunizationConfig, image: tuple[int, int, int], *, devices: int = 1, sharded: bool = False
) -> Memory:
    """Bytes on one device and its host for immunizing ``model`` with ``args``.

    Args:
        model: on the meta device; it is left there as fake tensors and of no more use.
        args: options of the run.
        image: C, H, W of what the processor makes.
        devices, sharded: number of devices, with DDP or with FSDP2.
    """
    part, open_, held = part_of(args, model), args.distillation is None, bool(args.distillation)
    held = held or (open_ and (is_large(model) or PROBED in args.objectives))  # as for one that knows its task
    if part is not None:
        freeze_all_but(model, part)
    autocast = _AUTOCAST.get(str(args.mixed_precision))
    rows = args.per_device_train_batch_size + args.per_device_harmful_batch_size
    kept = activations_of(model, image, rows, autocast)
    options = Options(
        optim=str(getattr(args.optim, "value", args.optim)),
        teacher=bool(args.feature_distillation) or (held and (open_ or not args.cache_frozen_features)),
        average=args.ema_decay > 0, guard=args.max_primary_drop is not None,
        accumulation=args.gradient_accumulation_steps, checkpointing=bool(args.gradient_checkpointing),
        devices=devices, sharded=sharded, primary=args.per_device_train_batch_size / rows,
    )  # fmt: skip
    return memory_of(model, kept.bytes(options.checkpointing), options, autocast or torch.float32)


def activations_of(
    model: nn.Module, image: tuple[int, int, int], rows: int, autocast: torch.dtype | None = None
) -> Activations:
    """What one forward of ``rows`` images keeps for backward; ``model`` on the meta device becomes fake tensors."""
    with fake(model.train()):
        return watch_forward(model, lambda: model(pixel_values=torch.empty(rows, *image)), autocast)
