"""What fits on devices of 80 GB: published configs on the meta device, and the memory model of hf_immunize.

    python benchmarks/dry_run.py

prints the table of docs/training.md. Nothing is downloaded: PRESETS holds the configs' published values. The model of
memory is checked against measured peaks by ``benchmarks/memory.py``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import torch
from torch import nn
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    SiglipConfig,
    SiglipForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_immunize.diffusion import denoiser_of
from hf_immunize.training.core.memory import Activations, Options, memory_of, trained
from hf_immunize.training.diffusion.planning import activations_of as denoiser_activations
from hf_immunize.training.diffusion.setup import choose_trainable
from hf_immunize.training.vision.planning import activations_of as classifier_activations

GB = 1e9
HALF = torch.bfloat16
SDXL = {
    "sample_size": 128, "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "cross_attention_dim": 2048,
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SD35 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 38,
    "attention_head_dim": 64, "num_attention_heads": 38, "joint_attention_dim": 4096, "caption_projection_dim": 2432,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192, "qk_norm": "rms_norm",
}  # fmt: skip
FLUX = {
    "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
    "joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True,
}  # fmt: skip


def _siglip() -> nn.Module:
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
              "image_size": 384, "patch_size": 14}
    return SiglipForImageClassification(SiglipConfig(vision_config=vision, num_labels=1000))


@dataclass(frozen=True)
class Preset:
    """A published network, and how it is trained."""

    make: Callable[[], nn.Module]
    image: tuple[int, int, int] | None = None
    trainable: str = "all"


PRESETS = {
    "ViT-L/16, 224 px": Preset(
        lambda: ViTForImageClassification(ViTConfig(
            hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096, num_labels=1000,
        )),
        (3, 224, 224),
    ),
    "SigLIP-So400m/14, 384 px": Preset(_siglip, (3, 384, 384)),
    "ConvNeXt-L, 224 px": Preset(
        lambda: ConvNextForImageClassification(ConvNextConfig(
            depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536], num_labels=1000,
        )),
        (3, 224, 224),
    ),
    "Swin-L, 224 px": Preset(
        lambda: SwinForImageClassification(SwinConfig(
            embed_dim=192, depths=[2, 2, 18, 2], num_heads=[6, 12, 24, 48], window_size=7, num_labels=1000,
        )),
        (3, 224, 224),
    ),
    "SDXL, all weights": Preset(lambda: diffusers.UNet2DConditionModel(**SDXL)),
    "SDXL, LoRA": Preset(lambda: diffusers.UNet2DConditionModel(**SDXL), trainable="lora"),
    "SD3.5-Large, LoRA": Preset(lambda: diffusers.SD3Transformer2DModel(**SD35), trainable="lora"),
    "Flux.1-dev, LoRA": Preset(lambda: diffusers.FluxTransformer2DModel(**FLUX), trainable="lora"),
}  # fmt: skip
PLACES = {"1": (1, False), "DDP": (8, False), "2, FSDP2": (2, True), "8, FSDP2": (8, True)}


def built(preset: Preset) -> nn.Module:
    """On the meta device; a base beside LoRA factors in bfloat16."""
    with torch.device("meta"):
        model = preset.make()
    if preset.image is None:
        model = model.to(HALF) if preset.trainable == "lora" else model
        choose_trainable(denoiser_of(model), model, preset.trainable)
    return model


def activations(preset: Preset, rows: int) -> Activations:
    """Of ``rows`` images of each task in one micro-batch."""
    if preset.image is not None:
        return classifier_activations(built(preset), preset.image, 2 * rows, HALF)
    return denoiser_activations(built(preset), 2 * rows, autocast=HALF)


def most_rows(model: nn.Module, kept: tuple[Activations, Activations], options: Options, budget: float) -> int:
    """The largest 2^k or 3·2^k of rows a task whose peak is within ``budget``; 0 for none.

    ``kept`` are the activations of one row a task and of two: they grow in proportion.
    """
    one, two = (found.bytes(options.checkpointing) for found in kept)
    fitting = 0
    for size in sorted({1, *(2**k for k in range(1, 11)), *(3 * 2**k for k in range(0, 10))}):
        if memory_of(model, one + (two - one) * (size - 1), options, HALF).peak <= budget:
            fitting = size
    return fitting


def row(name: str, preset: Preset, settings: argparse.Namespace) -> str:
    """One line of the table."""
    base = Options(teacher=True, guard=True, optim=settings.optim)
    model = built(preset)
    cells = [
        name, f"{sum(p.numel() for p in model.parameters()) / 1e6:,.0f}",
        f"{sum(p.numel() for p in trained(model)) / 1e6:,.1f}",
    ]
    plain, kept = memory_of(model, 0, base, HALF), (activations(preset, 1), activations(preset, 2))
    cells += [f"{(plain.resident + plain.gradients) / GB:.1f}", f"{(plain.host + plain.host_momentary) / GB:.1f}"]
    budget = (settings.device - settings.reserve) * GB
    for devices, sharded in PLACES.values():
        found = []
        for checkpointing in (False, True):
            options = replace(base, devices=devices, sharded=sharded, checkpointing=checkpointing)
            found.append(str(most_rows(model, kept, options, budget) or "no"))
        cells.append(" / ".join(found))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=list(PRESETS), choices=PRESETS, metavar="MODEL")
    parser.add_argument("--optim", default="adamw_torch_fused")
    parser.add_argument("--device", type=float, default=80, help="GB of a device")
    parser.add_argument("--reserve", type=float, default=8, help="GB for CUDA's context, workspaces and fragmentation")
    settings = parser.parse_args()
    heads: list[Any] = ["", "parameters, M", "trained, M", "GB before activations", "GB on the host", *PLACES]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in settings.models:
        print(row(name, PRESETS[name], settings), flush=True)


if __name__ == "__main__":
    main()
