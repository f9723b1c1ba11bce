"""Train a class-conditional denoiser from scratch on the retained classes: the base that is to be immunized.

    accelerate launch recipes/pretrain_diffusion.py --config recipes/mnist-diffusion/smoke/task.yaml \
        --config recipes/mnist-diffusion/smoke/pretrain.yaml
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import diffusers
import torch
from attack_diffusion import start
from tqdm.auto import tqdm

from hf_immunize.diffusion import DenoisingExam, NoiseProcess, denoiser_of, denoising_losses
from hf_immunize.diffusion.tasks import ConceptArguments, ConceptTask
from hf_immunize.errors import ConfigError, ImmunizeError, TrainingDivergedError
from hf_immunize.models import DIVERGED, refuse_non_finite
from hf_immunize.options import parse_options
from hf_immunize.records import begin_run, finish_run, weight_files


@dataclass
class PretrainArguments:
    """Size of the denoiser (a UNet2DModel) and how it is trained."""

    output_dir: str = field(metadata={"help": "Folder of the pipeline."})
    block_channels: str = field(default="32,64", metadata={"help": "Channels at each resolution, halving each time."})
    num_classes: int = field(default=10, metadata={"help": "Classes the model has embeddings for."})
    prediction_type: str = field(default="epsilon", metadata={"help": "epsilon, v_prediction or sample."})
    max_steps: int = field(default=2000, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=64, metadata={"help": "Images per step."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of AdamW, decayed linearly."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, rows, noise and levels."})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda or mps."})

    def __post_init__(self) -> None:
        for name, least in (("max_steps", 1), ("batch_size", 1), ("num_classes", 1), ("learning_rate", 1e-12)):
            if not getattr(self, name) >= least:
                raise ConfigError(f"expected {name} of at least {least}, got {getattr(self, name)}.")
        parts = [part.strip() for part in self.block_channels.split(",")]
        if not all(part.isdecimal() and int(part) % 8 == 0 and int(part) for part in parts):
            raise ConfigError(f"expected block_channels like '32,64', multiples of 8, got {self.block_channels!r}.")


def build(task: ConceptArguments, options: PretrainArguments) -> diffusers.DiffusionPipeline:
    """A pixel-space pipeline with random weights: attention at every resolution but the first."""
    channels = tuple(int(part) for part in options.block_channels.split(","))
    torch.manual_seed(options.seed)
    unet = diffusers.UNet2DModel(
        sample_size=task.image_size, in_channels=task.channels, out_channels=task.channels,
        block_out_channels=channels, layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (len(channels) - 1)),
        up_block_types=(*["AttnUpBlock2D"] * (len(channels) - 1), "UpBlock2D"),
        num_class_embeds=options.num_classes,
    )
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type=options.prediction_type
    )
    return diffusers.ConsistencyModelPipeline(unet, scheduler)


def train(pipeline, examples, options: PretrainArguments, device: torch.device) -> None:
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


def main() -> None:
    task_options, options = parse_options((ConceptArguments, PretrainArguments), description=__doc__.splitlines()[0])
    state = start(options.device)
    if state.num_processes > 1:
        raise ConfigError(f"expected one process, got {state.num_processes}: pretraining here is for small models.")
    task = ConceptTask(task_options)
    examples, held = task.examples("retain", "train"), task.examples("retain", "validation")
    inputs = {
        "task": asdict(task_options) | {"dataset": task.source},
        "data": examples.fingerprint(source=task.source, role="retain train").sha256,
        "options": {key: value for key, value in asdict(options).items() if key not in ("output_dir", "device")},
    }
    if begin_run(options.output_dir, "pretrain_diffusion", inputs):
        print(f"{options.output_dir}: already trained, nothing to do")
        return
    pipeline = build(task_options, options)
    denoiser_of(pipeline.unet).check(pipeline.unet, examples.latents, examples.conditions)
    train(pipeline, examples, options, state.device)
    refuse_non_finite(pipeline.unet, "the trained model", error=TrainingDivergedError, remedy=DIVERGED)
    exam = DenoisingExam(NoiseProcess.from_scheduler(pipeline.scheduler), held)
    found = exam.ask(denoiser_of(pipeline.unet), pipeline.unet)
    pipeline.to("cpu").save_pretrained(options.output_dir)
    weights = [path.relative_to(options.output_dir).as_posix() for path in weight_files(options.output_dir)]
    finish_run(options.output_dir, "pretrain_diffusion", inputs, [*weights, "model_index.json"])
    name = Path(options.output_dir).name
    print(f"{name}: retain denoising loss {found.loss:.4f}, R2 {found.explained:.4f} on held-out images")


if __name__ == "__main__":
    try:
        main()
    except ImmunizeError as error:
        sys.exit(f"{type(error).__name__}: {error}")
