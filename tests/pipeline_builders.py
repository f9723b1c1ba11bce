"""Tiny random pipelines of every class that reads prompts, tokenizers and text encoders included: no claims."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from denoiser_builders import BLOCKS, CROSS
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WORDS = "a photo of dog cat sks ohwx x portrait person".split()
LATENT = 4
KINDS = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline",
    "PixArtAlphaPipeline", "PixArtSigmaPipeline", "DiTPipeline",
)


def clip_tokenizer() -> CLIPTokenizer:
    """Every word one token, unknown ones letter by letter."""
    letters = [chr(code) for code in range(97, 123)]
    vocab, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            vocab.append(parts[0])
    tokens = [*dict.fromkeys(vocab), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        {token: place for place, token in enumerate(tokens)}, list(dict.fromkeys(merges)), model_max_length=8
    )


def clip_encoder(tokenizer: CLIPTokenizer, width: int, kind: type = CLIPTextModel) -> torch.nn.Module:
    return kind(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=width, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )).eval()


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in WORDS)]
    scores = [(piece, -float(place)) for place, piece in enumerate(pieces)]
    return T5Tokenizer(scores, extra_ids=0, model_max_length=8)


def t5_encoder(tokenizer: T5Tokenizer, width: int) -> torch.nn.Module:
    return T5EncoderModel(T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=16, num_layers=1, num_heads=2,
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
    )).eval()


def autoencoder(channels: int = LATENT, **config: float) -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        **config, block_out_channels=(4, 8), latent_channels=channels, norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()


def build_text_pipeline(kind: str, seed: int = 0) -> Any:
    """Encoders of width 12, latents of 4 channels at half the resolution."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline = _BUILDERS[kind](kind)
        for part in pipeline.components.values():
            for parameter in part.parameters() if isinstance(part, torch.nn.Module) else ():
                if not bool(parameter.any()):
                    torch.nn.init.normal_(parameter, std=0.05)
    return pipeline


def _sd(kind):
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=clip_encoder(tokenizer, 12), tokenizer=tokenizer,
        unet=diffusers.UNet2DConditionModel(**CROSS),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


def _sdxl(kind):
    tokenizer = clip_tokenizer()
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
             "projection_class_embeddings_input_dim": 12 + 6 * 4}
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=clip_encoder(tokenizer, 12), tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, 12, CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        unet=diffusers.UNet2DConditionModel(**{**CROSS, "cross_attention_dim": 24}, **added),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
    )


def _sd3(kind):
    tokenizer, third = clip_tokenizer(), t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            **BLOCKS, sample_size=8, in_channels=LATENT, out_channels=LATENT, joint_attention_dim=24,
            caption_projection_dim=16, pooled_projection_dim=24, pos_embed_max_size=8,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(shift_factor=0.1),
        text_encoder=clip_encoder(tokenizer, 12, CLIPTextModelWithProjection), tokenizer=tokenizer,
        text_encoder_2=clip_encoder(tokenizer, 12, CLIPTextModelWithProjection), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(third, 24), tokenizer_3=third,
    )


def _flux(kind):
    tokenizer, second = clip_tokenizer(), t5_tokenizer()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(shift_factor=0.1),
        text_encoder=clip_encoder(tokenizer, 12), tokenizer=tokenizer, text_encoder_2=t5_encoder(second, 12),
        tokenizer_2=second,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=4 * LATENT, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=12, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
        ),
    )


def _pixart(kind):
    tokenizer = t5_tokenizer()
    return getattr(diffusers, kind)(
        tokenizer=tokenizer, text_encoder=t5_encoder(tokenizer, 12), vae=autoencoder(),
        transformer=diffusers.PixArtTransformer2DModel(
            **{**BLOCKS, "num_attention_heads": 3}, in_channels=LATENT, out_channels=2 * LATENT,
            sample_size=128 if kind == "PixArtAlphaPipeline" else 8,  # at 128 it is told of resolution and aspect ratio
            cross_attention_dim=24, caption_channels=12,
        ),
        scheduler=diffusers.DDPMScheduler(),
    )


def _dit(kind):
    names = {0: "dog", 1: "cat, house cat"}
    pipeline = diffusers.DiTPipeline(
        transformer=diffusers.DiTTransformer2DModel(
            **BLOCKS, in_channels=LATENT, out_channels=2 * LATENT, sample_size=8, norm_num_groups=4,
            num_embeds_ada_norm=10,
        ),
        vae=autoencoder(), scheduler=diffusers.DDIMScheduler(clip_sample=False, steps_offset=1),
        id2label=names,
    )
    pipeline.register_to_config(id2label=names)  # as in the Hub's model_index.json
    return pipeline


_BUILDERS = dict(zip(KINDS, (_sd, _sdxl, _sd3, _flux, _pixart, _pixart, _dit), strict=True))
