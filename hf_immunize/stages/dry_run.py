"""What a run would hold in memory, from the config alone: no weight is read, and no row of data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification

from hf_immunize.models import load_processor
from hf_immunize.stages.base import ImmunizeOptions
from hf_immunize.training.core.memory import Memory, told
from hf_immunize.training.vision.config import ImmunizationConfig
from hf_immunize.training.vision.planning import plan_memory as plan_classifier


def classifier_memory(folder: Path, options: ImmunizeOptions, args: ImmunizationConfig) -> str:
    """Memory of immunizing a classifier by purpose, on 1, 2 and 8 devices."""
    trusted: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    image = image_shape(load_processor(folder, **trusted))
    config = AutoConfig.from_pretrained(folder, **trusted)

    def plan(**devices: Any) -> Memory:
        with torch.device("meta"):
            model = AutoModelForImageClassification.from_config(config, dtype=torch.float32, **trusted)
        return plan_classifier(model, args, image, **devices)

    return told(plan)


def image_shape(processor: Any) -> tuple[int, int, int]:
    """What the processor makes of a photograph."""
    mean = getattr(processor, "image_mean", None)
    photo = Image.new("L" if isinstance(mean, list | tuple) and len(mean) == 1 else "RGB", (640, 480))
    channels, height, width = processor(photo, return_tensors="pt")["pixel_values"].shape[1:]
    return channels, height, width


def pipeline_memory(folder: Path, options: ImmunizeOptions, args: Any) -> str:
    """Memory of immunizing a pipeline's denoiser by purpose, on 1, 2 and 8 devices."""
    from hf_immunize.diffusion import hollow_denoiser
    from hf_immunize.training.diffusion.planning import plan_memory as plan_denoiser

    def plan(**devices: Any) -> Memory:
        return plan_denoiser(hollow_denoiser(folder, options.denoiser_dtype), args, **devices)

    return told(plan)
