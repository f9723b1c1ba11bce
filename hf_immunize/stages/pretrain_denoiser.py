"""The pretraining stage for small denoisers: class-conditional, in pixel space, from scratch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from tqdm.auto import tqdm

from hf_immunize.diffusion import DenoisingExam, LatentDataset, NoiseProcess, denoiser_of, denoising_losses
from hf_immunize.diffusion.tasks import ConceptArguments, ConceptTask
from hf_immunize.errors import ConfigError, TrainingDivergedError
from hf_immunize.models import DIVERGED, refuse_non_finite
from hf_immunize.options import option, required
from hf_immunize.records import begin_run
from hf_immunize.stages.base import leave_finished
from hf_immunize.stages.start import DEVICE_HELP, start

_STAGE = "pretrain_diffusion"


@dataclass
class DenoiserOptions:
    """Size of the denoiser (a UNet2DModel) and how it is trained."""

    output_dir: str = required("Folder of the pipeline.")
    block_channels: str = option("32,64", "Channels at each resolution, halving each time.")
    num_classes: int = option(10, "Classes the model has embeddings for.")
    prediction_type: str = option("epsilon", "epsilon, v_prediction or sample.")
    max_steps: int = option(2000, "Optimizer steps.")
    batch_size: int = option(64, "Images per step.")
    learning_rate: float = option(1e-3, "Peak learning rate of AdamW, decayed linearly.")
    seed: int = option(0, "Seed of weights, rows, noise and levels.")
    device: str = option("auto", DEVICE_HELP)

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 1), ("batch_size", 1), ("num_classes", 1), ("learning_rate", 1e-12)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"expected {name} of at least {least}, got {getattr(self, name)}.")
        parts = [part.strip() for part in self.block_channels.split(",")]
        if not all(part.isdecimal() and int(part) % 8 == 0 and int(part) for part in parts):
            raise ConfigError(f"expected block_channels like '32,64', multiples of 8, got {self.block_channels!r}.")


def pretrain_denoiser(arguments: ConceptArguments, options: DenoiserOptions) -> None:
    """See ``pretrain_model``."""
    _, device = start(options.device, "pretraining here is for small models")
    task = ConceptTask(arguments)
    examples, held = task.examples("retain", "train"), task.examples("retain", "validation")
    inputs = {
        "task": task.described(),
        "data": task.fingerprint("retain", "train").sha256,
        "options": {key: value for key, value in asdict(options).items() if key not in ("output_dir", "device")},
    }
    if begin_run(options.output_dir, _STAGE, inputs):
        print(f"{options.output_dir}: already trained, nothing to do")
        return
    pipeline = _build(arguments, options)
    denoiser_of(pipeline.unet).check(pipeline.unet, examples.latents, examples.conditions)
    _train(pipeline, examples, options, torch.device(device))
    refuse_non_finite(pipeline.unet, "the trained model", error=TrainingDivergedError, remedy=DIVERGED)
    exam = DenoisingExam(NoiseProcess.from_scheduler(pipeline.scheduler), held)
    found = exam.ask(denoiser_of(pipeline.unet), pipeline.unet)
    pipeline.to("cpu").save_pretrained(options.output_dir)
    leave_finished(options.output_dir, _STAGE, inputs, ["model_index.json"])
    name = Path(options.output_dir).name
    print(f"{name}: retain denoising loss {found.loss:.4f}, R2 {found.explained:.4f} on held-out images")


def _build(task: ConceptArguments, options: DenoiserOptions) -> Any:
    """A pixel-space pipeline with random weights: attention at every resolution but the first."""
    channels = tuple(int(part) for part in options.block_channels.split(","))
    torch.manual_seed(options.seed)
    unet = diffusers.UNet2DModel(
        sample_size=task.image_size, in_channels=task.channels, out_channels=task.channels,
        block_out_channels=channels, layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (len(channels) - 1)),
        up_block_types=(*["AttnUpBlock2D"] * (len(channels) - 1), "UpBlock2D"),
        num_class_embeds=options.num_classes,
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type=options.prediction_type
    )
    return diffusers.ConsistencyModelPipeline(unet, scheduler)


def _train(pipeline: Any, examples: LatentDataset, options: DenoiserOptions, device: torch.device) -> None:
    """The plain loop of diffusers' examples."""
    process, model = NoiseProcess.from_scheduler(pipeline.scheduler), pipeline.unet.to(device).train()
    denoiser, generator = denoiser_of(model), torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, options.max_steps)
    for _ in tqdm(range(options.max_steps), desc="pretrain", unit="step", disable=None):
        rows = torch.randint(len(examples), (options.batch_size,), generator=generator)
        batch = examples.batch(rows).to(device)
        noise = torch.randn(batch.latents.shape, generator=generator).to(device)
        levels = process.draw_levels(len(rows), generator).to(device)
        noisy = process.noisy(batch.latents, noise, levels)
        answer = denoiser.call(model, noisy, process.timesteps(levels), batch.conditions)
        denoising_losses(answer, process.target(batch.latents, noise, levels)).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
