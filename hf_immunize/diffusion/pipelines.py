"""Ordinary diffusers pipelines: load one from safetensors, find its denoiser, draw a random one of the same shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from hf_immunize.diffusion.denoisers import DENOISERS
from hf_immunize.errors import ModelError


def load_pipeline(folder: str | Path) -> Any:
    """The pipeline of a folder, from safetensors only. Raises ModelError when it cannot be read."""
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(folder), use_safetensors=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"expected a diffusers pipeline saved with save_pretrained in {folder}, got {error}: check the path."
        ) from error
    component_of(pipeline)
    _keep_class_names(pipeline)
    return pipeline


def _keep_class_names(pipeline: Any) -> None:
    """Have ``save_pretrained`` write the class names of a DiTPipeline, which it would lose otherwise."""
    names: dict[str, list[str]] = {}
    for name, number in (getattr(pipeline, "labels", None) or {}).items():
        names.setdefault(str(number), []).append(name)
    if names:
        pipeline.register_to_config(id2label={number: ", ".join(parts) for number, parts in names.items()})


def component_of(pipeline: Any) -> str:
    """Name of the pipeline's denoiser (``unet`` or ``transformer``).

    Raises:
        ModelError: none of the pipeline's components is in ``DENOISERS``, or several are.
    """
    found = [name for name, part in pipeline.components.items() if type(part) in DENOISERS]
    if len(found) != 1:
        parts = {name: type(part).__name__ for name, part in pipeline.components.items() if part is not None}
        raise ModelError(
            f"expected one denoiser among {sorted(kind.__name__ for kind in DENOISERS)} in the pipeline, got "
            f"{found or 'none'} of {parts}."
        )
    return found[0]


def fresh_denoiser(model: nn.Module, seed: int) -> nn.Module:
    """The denoiser's architecture with random weights drawn from ``seed``: what training from scratch starts at."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh, dtype = type(model).from_config(model.config), next(model.parameters()).dtype
        # casting warns of layers to keep in float32 even where there is nothing to cast
        return fresh if fresh.dtype == dtype else fresh.to(dtype)
