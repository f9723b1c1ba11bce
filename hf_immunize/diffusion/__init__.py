"""What defender and attacker of a diffusion model share: noise, denoisers, cached examples, pipelines, a fixed exam."""

try:
    import diffusers as _diffusers  # noqa: F401
except ImportError as error:
    raise ImportError("expected diffusers: pip install hf_immunize[diffusers].") from error

from hf_immunize.diffusion.denoisers import DENOISERS, denoiser_of, register_family
from hf_immunize.diffusion.drawing import (
    DRAWN_SHARES,
    decode,
    draw_latents,
    drawing_steps,
    grid_png,
    split_grid,
    to_images,
)
from hf_immunize.diffusion.exam import EVAL_BATCH_SIZE, SCORE, DenoisingExam, ExamResult
from hf_immunize.diffusion.examples import LatentBatch, LatentDataset, PromptConditions
from hf_immunize.diffusion.family import Denoiser, DenoiserFamily, PromptReader, dtype_of_rows, in_own_precision
from hf_immunize.diffusion.memory import fits_memory
from hf_immunize.diffusion.noise import NoiseProcess, denoising_losses
from hf_immunize.diffusion.pipelines import component_of, differences, fresh_denoiser, hollow_denoiser, load_pipeline
from hf_immunize.diffusion.schedules import schedule_of

__all__ = [
    "DENOISERS",
    "DRAWN_SHARES",
    "EVAL_BATCH_SIZE",
    "SCORE",
    "Denoiser",
    "DenoiserFamily",
    "DenoisingExam",
    "ExamResult",
    "LatentBatch",
    "LatentDataset",
    "NoiseProcess",
    "PromptConditions",
    "PromptReader",
    "component_of",
    "decode",
    "denoiser_of",
    "differences",
    "denoising_losses",
    "draw_latents",
    "drawing_steps",
    "dtype_of_rows",
    "fits_memory",
    "fresh_denoiser",
    "grid_png",
    "hollow_denoiser",
    "in_own_precision",
    "load_pipeline",
    "register_family",
    "schedule_of",
    "split_grid",
    "to_images",
]
