"""A tiny random denoiser and fitting examples of every family. Random weights exercise code; they support no claim."""

from __future__ import annotations

import diffusers
import torch

from hf_immunize.diffusion import LatentDataset

TEXT = {"encoder_hidden_states": (5, 12)}
UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 4,
}
CROSS = {
    **UNET, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 12,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
BLOCKS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
POOLED = {**TEXT, "pooled_projections": (10,)}

# name: class, config, channels of the latents, shapes of the conditions, scheduler
FAMILIES = {
    "unet": (
        "UNet2DModel",
        {**UNET, "in_channels": 1, "out_channels": 1, "num_class_embeds": 10,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        1, {"class_labels": 10}, "ddpm",
    ),
    "sd": ("UNet2DConditionModel", CROSS, 4, TEXT, "ddpm"),
    "sdxl": (
        "UNet2DConditionModel",
        {**CROSS, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
         "projection_class_embeddings_input_dim": 10 + 6 * 4},
        4, {**TEXT, "text_embeds": (10,), "time_ids": (6,)}, "ddpm",
    ),
    "dit": (
        "DiTTransformer2DModel",
        {**BLOCKS, "in_channels": 4, "out_channels": 8, "sample_size": 8, "norm_num_groups": 4,
         "num_embeds_ada_norm": 10},
        4, {"class_labels": 10}, "ddpm",
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {**BLOCKS, "num_attention_heads": 3, "in_channels": 4, "out_channels": 8, "sample_size": 8,
         "cross_attention_dim": 24, "caption_channels": 12, "use_additional_conditions": True},
        4, {**TEXT, "resolution": (2,), "aspect_ratio": (1,)}, "ddpm",
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {**BLOCKS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 12,
         "caption_projection_dim": 16, "pooled_projection_dim": 10, "pos_embed_max_size": 8},
        4, POOLED, "flow",
    ),
    "flux": (
        "FluxTransformer2DModel",
        {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 10,
         "axes_dims_rope": (4, 6, 6), "guidance_embeds": True},
        4, POOLED, "flow",
    ),
}


def build_denoiser(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A tiny random denoiser; layers that such models initialise to zero are made random as well."""
    kind, config, *_ = FAMILIES[family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(diffusers, kind)(**config)
        for parameter in model.parameters():
            if not bool(parameter.any()):
                torch.nn.init.normal_(parameter, std=0.05)
    return model if dtype == torch.float32 else model.to(dtype)


def build_scheduler(family: str, **options):
    if FAMILIES[family][4] == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0)
    return diffusers.DDPMScheduler(num_train_timesteps=1000, **options)


def build_examples(
    family: str, rows: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32, label: int | None = None,
    size: int = 8,
) -> LatentDataset:
    """Random examples of concepts 0..9, or of one concept."""
    _, _, channels, shapes, _ = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 8 if label is None else torch.full((rows,), label)
    latents = torch.randn(rows, channels, size, size, generator=generator, dtype=dtype)
    conditions = {
        name: labels if name == "class_labels" else torch.randn(rows, *shape, generator=generator, dtype=dtype)
        for name, shape in shapes.items()
    }
    latents = latents + labels.to(dtype)[:, None, None, None] / 8
    return LatentDataset(latents, conditions, labels, [str(digit) for digit in range(10)])
